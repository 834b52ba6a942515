"""Where a live reference lives: sharded over the pipeline like the student, or whole on every pipeline rank."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.conversion.source import ModelSource
from remit_megatron.models.forward import Item, ModelForward
from remit_megatron.reference.idle import IdleFiller
from remit_megatron.reference.live import LiveReference, Signal
from remit_megatron.reference.replicated import ReplicatedReference
from remit_megatron.reference.source import Schedule, ScoreSource
from remit_megatron.runtime import parallel

logger = logging.getLogger(__name__)

# Share of the device's memory (on a CPU, of what is available) that stays free: fragmentation, and a forward pass of
# the reference while the student's activations are there.
MARGIN = 0.1


def placed_reference(
    source: ModelSource,
    arguments: Any,
    *,
    placement: str,
    forward: ModelForward,
    filler: IdleFiller,
    signal: Signal = "loss",
    micro_batch_size: int | None = None,
) -> ScoreSource:
    """Builds a reference and loads its weights; collective.

    Args:
        source, arguments: as in :meth:`LiveReference.load`.
        placement: ``pipeline``, ``replicated``, or ``auto``. Without pipeline stages they are the same.
        forward, micro_batch_size: as `LiveReference` takes them.
        filler: what runs a replicated reference in the student's pauses.
        signal: ``hidden`` is for ``pipeline``; ``auto`` knows.
    """
    common: dict[str, Any] = dict(forward=forward, micro_batch_size=micro_batch_size)
    stages = forward.groups.pp.size()

    def replicate() -> ReplicatedReference:
        return ReplicatedReference.load(source, arguments, filler=filler, **common)

    if placement == "replicated" and stages > 1:
        return replicate()
    pipeline = LiveReference.load(source, arguments, signal=signal, **common)
    if placement == "auto":
        if stages > 1 and signal == "loss" and arguments.rerun_mode == "disabled":
            return AutoPlacement(pipeline, replicate)
        logger.info("reference.placement auto: pipeline, as there is nothing to gain or no way to score ahead")
    return pipeline


class AutoPlacement:
    """A `ScoreSource` that begins with a reference in the pipeline and replicates it if the first step leaves room.

    What a step needs beside the weights (gradients, the optimizer's state, activations) is allocated in the first step,
    so that is measured rather than estimated. Both placements give the same scores.

    Args:
        pipeline: the reference as it is in the first step.
        replicate: builds the other one; collective.
    """

    def __init__(self, pipeline: LiveReference, replicate: Callable[[], ReplicatedReference]):
        self.source: LiveReference = pipeline
        self._replicate = replicate
        self._steps = 0

    def score(self, schedule: Schedule, buffers: list[list[Item]], **settings: Any) -> list[Tensor]:
        """See :meth:`ScoreSource.score`."""
        if self._steps == 1:
            self._choose()
        self._steps += 1
        return self.source.score(schedule, buffers, **settings)

    def _choose(self) -> None:
        pipeline = self.source
        share = sum(p.nbytes for chunk in pipeline.chunks for p in chunk.parameters())
        whole = torch.tensor([share], dtype=torch.float64, device=parallel.device())
        dist.all_reduce(whole, group=pipeline.forward.groups.pp)
        more = whole.item() - share
        # Of the rank that has least to spare: all must choose alike.
        spare = torch.tensor([free_bytes() - more], dtype=torch.float64, device=parallel.device())
        dist.all_reduce(spare, op=dist.ReduceOp.MIN)
        chosen = "replicated" if spare.item() >= 0 else "pipeline"
        logger.info(
            "reference.placement auto: %s; all layers take %.2f GB more on this rank, and the rank with least room "
            "would have %+.2f GB to spare",
            chosen,
            more / 1e9,
            spare.item() / 1e9,
        )
        if chosen == "replicated":
            pipeline.chunks.clear()  # before the other one is built: they need not both fit
            with parallel.same_fate("loading the reference"):
                self.source = self._replicate()


def free_bytes() -> float:
    """Memory that this rank could still allocate beyond its peak so far, less a margin.

    On a GPU: what the driver has left and what torch keeps reserved, less the peak of what was allocated. On a CPU:
    this rank's share of the host's available memory.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated() - MARGIN * total
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return available * (1 - MARGIN) / parallel.gather_objects(socket.gethostname()).count(socket.gethostname())
