"""Memory and time of one run under one layout: arithmetic, no measurement.

Bytes of weights, gradients and optimizer state are exact (``remit plan --simulate`` compares them with Megatron's own
buffers); activations follow from what each operation keeps; what exists for moments is an estimate; seconds rest on a
stated utilization.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from remit_megatron.cluster.activations import ActivationBytes, activation_bytes, tokens_of_microbatch
from remit_megatron.cluster.inventory import Inventory, take_inventory
from remit_megatron.cluster.state import Place, StateBytes, check_known, chunk_layers, chunks_of_stage, state_bytes
from remit_megatron.cluster.timing import Machine, StepTime, step_time
from remit_megatron.models.build import check_layout, megatron_arguments, padded_vocab_size

Placement = Literal["none", "pipeline", "replicated", "cached"]

# What the scorer holds at once of the logits on a GPU (remit_megatron.kernels.token_logprob).
_SCORING_BLOCK = 256 << 20


@dataclass(frozen=True)
class ReferencePlan:
    """The frozen model of a run.

    Attributes:
        hf_config: content of its ``config.json``.
        placement: how the run gets its scores.
        signal: ``loss``, one number per token, or ``hidden`` states.
        assumed: its files are not here, and it is taken to be of the student's architecture.
    """

    hf_config: dict[str, Any]
    placement: Placement
    signal: str = "loss"
    assumed: bool = False


@dataclass(frozen=True)
class ReferenceBytes:
    """The reference's memory on one rank under each placement; None where its signal cannot be had that way."""

    pipeline: float
    replicated: float | None
    cached: float | None


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a pipeline stage, at the moment when it holds most."""

    stage: int
    layers: int
    state: StateBytes
    activations: ActivationBytes
    reference: ReferenceBytes | None
    placement: Placement

    @property
    def reference_bytes(self) -> float:
        """Of the placement that the run has."""
        if self.reference is None or self.placement == "none":
            return 0.0
        held = getattr(self.reference, self.placement)
        assert held is not None, self.placement
        return held

    @property
    def total(self) -> float:
        return self.state.total + self.activations.total + self.reference_bytes


class Planner:
    """What is the same for every layout of a run.

    Args:
        student: content of its ``config.json``.
        args: validated Megatron arguments of the run.
        machine: GPUs, and how much of their peak is reached.
        reference: the frozen model; None without one.
        student_passes: further forward passes of the student in each step.
        document_mask: attention stops at document boundaries.
        linear_loss: output layer and loss are computed together.
        fused: kernels of a GPU; False for those of a CPU (see :mod:`remit_megatron.cluster.activations`).

    Raises:
        UserError: a setting that the arithmetic does not cover, or a reference that does not fit the student's layout.
    """

    def __init__(
        self,
        student: dict[str, Any],
        args: argparse.Namespace,
        *,
        machine: Machine,
        reference: ReferencePlan | None = None,
        student_passes: int = 0,
        document_mask: bool = False,
        linear_loss: bool = False,
        fused: bool = True,
    ):
        check_known(args)
        self.args, self.machine, self.reference = args, machine, reference
        self._student, self._passes = student, student_passes
        self._kernels = {"document_mask": document_mask, "linear_loss": linear_loss, "fused": fused}
        self._inventories: dict[tuple[str, int], Inventory] = {}
        if reference is not None:
            check_layout(self._reference_values, args)

    @cached_property
    def _same(self) -> bool:
        """Whether the reference is of the student's architecture."""
        return self.reference is not None and self.reference.hf_config == self._student

    @cached_property
    def _reference_values(self) -> dict[str, Any]:
        assert self.reference is not None
        return {"multi_latent_attention": False} | megatron_arguments(self.reference.hf_config)

    def inventory(self, tensor_parallel: int, *, of: Literal["student", "reference"] = "student") -> Inventory:
        """Parameters of one tensor-parallel rank; built once per size."""
        key = ("student" if self._same else of, tensor_parallel)
        if key not in self._inventories:
            config = self._student if key[0] == "student" or self.reference is None else self.reference.hf_config
            self._inventories[key] = take_inventory(config, self.args, tensor_parallel=tensor_parallel)
        return self._inventories[key]

    def reference_arguments(self, args: argparse.Namespace) -> argparse.Namespace:
        """``args`` with the reference's architecture."""
        if self._same:
            return args
        values = self._reference_values
        own = argparse.Namespace(**{**vars(args), **values})
        own.padded_vocab_size = padded_vocab_size(
            values["vocab_size"], args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
        return own

    def microbatches(self, args: argparse.Namespace) -> int:
        """Of one step, on each data-parallel rank."""
        return args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)

    def memory(self, args: argparse.Namespace, stage: int, *, shard: int = 0) -> StageMemory:
        """Bytes on a rank of pipeline stage ``stage``.

        Args:
            args: the run's arguments, or a copy of them with another layout.
            stage: pipeline stage.
            shard: which part of the optimizer state the rank owns; the first holds no padding.
        """
        inventory = self.inventory(args.tensor_model_parallel_size)
        return StageMemory(
            stage=stage,
            layers=sum(chunk_layers(args, stage)),
            state=state_bytes(inventory, args, Place(stage=stage, shard=shard)),
            activations=activation_bytes(
                inventory, args, stage=stage, microbatches=self.microbatches(args), **self._kernels
            ),
            reference=self._reference_bytes(args, stage),
            placement="none" if self.reference is None else self.reference.placement,
        )

    def _reference_bytes(self, args: argparse.Namespace, stage: int) -> ReferenceBytes | None:
        if self.reference is None:
            return None
        own, tensor = self.reference_arguments(args), args.tensor_model_parallel_size
        inventory, element = self.inventory(tensor, of="reference"), args.params_dtype.itemsize
        tokens, steps = tokens_of_microbatch(args), self.microbatches(args)
        last = stage == args.pipeline_model_parallel_size - 1
        scores = 0.0
        if last and self.reference.signal == "loss":
            scores = 4.0 * tokens * steps
        elif last:
            part = tensor if args.sequence_parallel else 1
            scores = tokens * steps * own.hidden_size * element / part
        weights = sum(parameter.elements for chunk in chunks_of_stage(inventory, own, stage) for parameter in chunk)
        # Beside the student's activations, because it runs in the bubbles: a block of logits, and a layer's states.
        beside = _SCORING_BLOCK + tokens * element * (3 * own.ffn_hidden_size / tensor + 3 * own.hidden_size)
        numbers = self.reference.signal == "loss"  # whole distributions are neither kept nor handed over
        return ReferenceBytes(
            pipeline=weights * element + scores,
            replicated=inventory.all_parameters * element + beside + scores if numbers else None,
            cached=scores if numbers else None,
        )

    def peak(self, args: argparse.Namespace) -> StageMemory:
        """The stage with the most: the first, which holds most activations, the last, which has the logits, or the one
        between."""
        last = args.pipeline_model_parallel_size - 1
        stages = sorted({0, min(1, last), last})
        return max((self.memory(args, stage) for stage in stages), key=lambda memory: memory.total)

    def time(self, args: argparse.Namespace) -> StepTime:
        """Seconds of a step; without those of a replicated reference where it gives more than a number per token."""
        tensor = args.tensor_model_parallel_size
        inventory = self.inventory(tensor)
        parameters = [
            sum(parameter.elements for chunk in chunks_of_stage(inventory, args, stage) for parameter in chunk)
            for stage in range(args.pipeline_model_parallel_size)
        ]
        reference = None
        if self.reference is not None:
            reference = (self.inventory(tensor, of="reference"), self.reference_arguments(args))
        time = step_time(
            inventory,
            args,
            self.machine,
            microbatches=self.microbatches(args),
            parameters=parameters,
            reference=reference,
            student_passes=self._passes,
        )
        whole = self.reference is not None and self.reference.signal != "loss"
        return replace(time, replicated=None) if whole else time

    def seconds(self, time: StepTime) -> float:
        """Seconds of a step with the run's own source of scores."""
        placement = "none" if self.reference is None else self.reference.placement
        chosen = {"pipeline": time.live, "replicated": time.replicated}.get(placement)
        return time.cached if chosen is None else chosen
