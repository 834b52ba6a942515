"""The real model, gradient buffers and optimizer of one rank, built on ``meta``: what the plan's bytes are checked by.

Megatron's own code runs, with the arguments of the run: GPTModel with the family's layers, DistributedDataParallel with
its buckets, the optimizer with its shards and state. Nothing is computed and nothing takes memory, so a rank of a
thousand fits a laptop.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule
from megatron.training.models.gpt import GPTModelBuilder
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

from remit_megatron.cluster.fake_world import CudaTypeNames, MetaTensors, fake_world
from remit_megatron.cluster.inventory import Inventory, Shapes
from remit_megatron.cluster.state import StateBytes, place_of, state_bytes
from remit_megatron.models.build import model_config

_LAYER = re.compile(r"decoder\.layers\.\d+\.")


@dataclass(frozen=True)
class SimulatedRank:
    """What one rank would hold, counted from its tensors, beside what the arithmetic says.

    Attributes:
        rank, stage, shard: the rank, its pipeline stage, the part of the optimizer state it owns.
        layers: the kind of layers that was built, ``transformer_engine`` or ``local``.
        tensors: number of its parameters.
        built: bytes of the tensors that Megatron made.
        planned: bytes by :func:`remit_megatron.cluster.state.state_bytes`.
        misshapen: parameters whose shape is not the whole model's divided by the tensor-parallel size.
        seconds: time it took to build.
    """

    rank: int
    stage: int
    shard: int
    layers: str
    tensors: int
    built: StateBytes
    planned: StateBytes
    misshapen: tuple[str, ...]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether plan and reality are the same to the byte, and all shapes are right."""
        return self.built == self.planned and not self.misshapen


def interesting_ranks(world_size: int) -> list[int]:
    """First, middle and last."""
    return sorted({0, world_size // 2, world_size - 1})


def simulate_rank(
    hf_config: dict[str, Any],
    arguments: Callable[[int], argparse.Namespace],
    rank: int,
    *,
    sharded: Inventory,
    whole: Inventory,
) -> SimulatedRank:
    """Builds one rank of the run.

    Args:
        hf_config: content of the model's ``config.json``.
        arguments: a rank's validated Megatron namespace.
        rank: global rank.
        sharded: the model under the run's tensor-parallel size, with the layers that can be built here.
        whole: the same model under tensor-parallel size 1.

    Raises:
        UserError: the model and the layout do not fit.
        RuntimeError: this process has a process group.
    """
    started = time.perf_counter()
    args = arguments(rank)
    place = place_of(args, rank)
    config = model_config(hf_config, args)
    config.transformer.perform_initialization = False
    with fake_world(args, world_size=args.world_size, rank=rank) as groups:
        with MetaTensors():
            chunks = GPTModelBuilder(config).build_distributed_models(
                groups, ddp_config=get_megatron_ddp_config(args), wrap_with_ddp=True
            )
        with CudaTypeNames():
            # Annotated as the configuration alone; it also says which parameters have settings of their own.
            both: Any = get_megatron_optimizer_config(args)
            settings, overrides = both
            optimizer = get_megatron_optimizer(
                settings, list[MegatronModule](chunks), config_overrides=overrides, use_gloo_process_groups=False
            )
            parts = getattr(optimizer, "chained_optimizers", [optimizer])
            built = _count(args, chunks, parts)
        shapes: Shapes = {}
        for number, chunk in enumerate(chunks):
            for name, parameter in chunk.named_parameters():
                shapes[f"{number}:{name.removeprefix('module.').removeprefix('module.')}"] = tuple(parameter.shape)
    return SimulatedRank(
        rank=rank,
        stage=place.stage,
        shard=place.shard,
        layers=config.transformer.transformer_impl,
        tensors=len(shapes),
        built=built,
        planned=state_bytes(sharded, args, place),
        misshapen=tuple(_misshapen(shapes, whole, args.tensor_model_parallel_size)),
        seconds=time.perf_counter() - started,
    )


def _count(args: argparse.Namespace, chunks: list, parts: list) -> StateBytes:
    """Bytes of every tensor once, by what it is for."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    held = [buffer.param_data for buffer in buffers if buffer.param_data is not None] or parameters
    weights, gradients = _bytes(held), _bytes([buffer.grad_data for buffer in buffers])
    # Of fp32 models the optimizer's parameters are the weights, or views of them.
    own_copies = args.params_dtype.itemsize < 4
    optimizer = 0
    for part in parts:
        inner = part.optimizer
        steps = [group for group in inner.param_groups if group["params"]]
        master = [parameter for group in steps for parameter in group["params"]]
        for parameter in master:
            parameter.grad = torch.empty_like(parameter)
        inner.step()
        optimizer += _bytes(master) if own_copies else 0
        states = [value for state in inner.state.values() for name, value in state.items() if name != "step"]
        optimizer += _bytes([value for value in states if isinstance(value, torch.Tensor)])
    return StateBytes(sum(p.numel() for p in parameters), weights, gradients, optimizer)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _misshapen(shapes: Shapes, whole: Inventory, tensor: int) -> Iterator[str]:
    """Parameters that are neither whole nor cut into ``tensor`` equal parts along one axis."""
    known = whole.embedding | whole.final | whole.head
    for full_name, shape in shapes.items():
        name = full_name.partition(":")[2]
        inner = _LAYER.sub("", name, count=1)
        expected = whole.layer.get(inner) if inner != name else known.get(name)
        if expected is None or len(expected) != len(shape):
            yield f"{name}: found {shape}; expected a shard of {expected}"
            continue
        table = name in whole.embedding or name in whole.head
        # Tables are padded to a multiple that depends on the tensor-parallel size.
        cut = [
            axis
            for axis, (part, full) in enumerate(zip(shape, expected, strict=True))
            if part != full and not (part * tensor == full or (table and axis == 0 and part * tensor >= full))
        ]
        if cut or sum(part != full for part, full in zip(shape, expected, strict=True)) > 1:
            yield f"{name}: found {shape}; expected {expected} or 1/{tensor} of it along one axis"


def describe_difference(simulated: SimulatedRank) -> str:
    """One line on what differs; empty where nothing does."""
    parts = []
    for name in ("parameters", "weights", "gradients", "optimizer"):
        built, planned = getattr(simulated.built, name), getattr(simulated.planned, name)
        if built != planned:
            parts.append(f"{name}: Megatron {built:,}, plan {planned:,} ({planned - built:+,})")
    return "; ".join([*parts, *simulated.misshapen[:3]])
