"""Seconds of a step, by arithmetic: products of matrices at a stated utilization, communication at stated bandwidths.

Legend: F seconds that the slowest pipeline stage needs for the forward pass of one microbatch, m microbatches of a step
on a data-parallel rank, p pipeline stages, v virtual ones per rank, B = 2 F.

    student            (3 + r) F (m + (p - 1) / v)       r: what recomputation repeats of F
    cached scores      student
    live, pipeline     student + F' (m + (p - 1) / v)     the reference's F' before the student's schedule
    live, replicated   max(student, ((3 + r) F + F') m)   every stage scores whole microbatches in its bubbles

With one model for both and r = 0 these are 3, 4 (m + p - 1) F and max(3 (m + p - 1), 4 m) F.

A matrix of a x b costs 2 a b operations a token, attention n (dk + dv) s a token (the causal half). Tensor parallelism
moves, in forward and again in backward, two all-gathers and two reduce-scatters of [t, h] a layer (or two all-reduces,
the same bytes); with sequence parallelism backward gathers two inputs once more. Context parallelism gathers keys and
values, and reduces their gradients. A pipeline hands [t, h] from stage to stage. Once a step the gradients are reduced
and the weights gathered over the data-parallel ranks. None of it is taken to overlap with computation, except the
last where ``overlap_grad_reduce`` and ``overlap_param_gather`` say so, behind one microbatch (:func:`data_time`). What
is left out: kernels' launches, the update itself, the data loader, slower products of small matrices.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from remit_megatron.cluster.activations import tokens_of_microbatch
from remit_megatron.cluster.hardware import Gpu
from remit_megatron.cluster.inventory import Inventory
from remit_megatron.cluster.state import chunk_layers


@dataclass(frozen=True)
class Machine:
    """GPUs of the run and the part of their peak that computation reaches, without bubbles and communication."""

    gpu: Gpu
    per_node: int
    utilization: float

    @property
    def flops(self) -> float:
        return self.gpu.flops * self.utilization


@dataclass(frozen=True)
class ForwardTime:
    """Seconds of one microbatch's forward pass through the slowest stage."""

    compute: float
    mean: float  # of compute over the stages
    tensor: float
    context: float
    mlp: float  # of compute: products of the feed-forward part
    layers: float  # of compute: without the head
    stages: tuple[float, ...]  # compute of every stage

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.context


@dataclass(frozen=True)
class DataTime:
    """Seconds of a step that the data-parallel ranks' communication takes, and those that the step waits for it.

    Attributes:
        reduced: reduction of the gradients, on the rank with the most parameters.
        gathered: gathering of the weights on that rank; 0 without the distributed optimizer.
        reduce_wait: of the step, for the reduction.
        gather_wait: of the step, for the gathering; the sum over the stages where they wait one after another.
    """

    reduced: float = 0.0
    gathered: float = 0.0
    reduce_wait: float = 0.0
    gather_wait: float = 0.0

    @property
    def total(self) -> float:
        return self.reduced + self.gathered

    @property
    def waited(self) -> float:
        return self.reduce_wait + self.gather_wait


@dataclass(frozen=True)
class StudentTime:
    """Seconds of a step with scores from a cache, by cause; ``compute`` is the mean over the stages, ``imbalance``
    what the slowest one takes longer, ``data`` what the step waits for (:attr:`DataTime.waited`)."""

    compute: float
    imbalance: float
    recompute: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step under each source of scores; None where the run has no such source. ``cached`` is also that of
    a step without a reference."""

    student: StudentTime
    data: DataTime
    microbatch: float
    reference: float | None
    cached: float
    live: float | None
    replicated: float | None


def layer_flops(inventory: Inventory, args: argparse.Namespace) -> tuple[float, float]:
    """(operations of one layer's forward pass on one microbatch and rank, those of its feed-forward part)."""
    t, tensor = tokens_of_microbatch(args), args.tensor_model_parallel_size
    if args.multi_latent_attention:
        width = args.qk_head_dim + args.qk_pos_emb_head_dim + args.v_head_dim
    else:
        width = 2 * args.kv_channels
    scores = args.num_attention_heads // tensor * width * args.seq_length * t
    mlp = 2 * t * (3 if args.swiglu else 2) * args.hidden_size * args.ffn_hidden_size / tensor
    return 2 * t * inventory.matrix_elements + scores, mlp


def head_flops(inventory: Inventory, args: argparse.Namespace) -> float:
    """Operations of the output layer's forward pass on one microbatch and rank."""
    return 2.0 * tokens_of_microbatch(args) * inventory.head_elements


def forward_time(inventory: Inventory, args: argparse.Namespace, machine: Machine) -> ForwardTime:
    """Seconds of the slowest stage for one microbatch: the last one's head counts."""
    last = args.pipeline_model_parallel_size - 1
    flops, mlp = layer_flops(inventory, args)
    head = head_flops(inventory, args)
    counts = [sum(chunk_layers(args, stage)) for stage in range(last + 1)]
    stages = [(count * flops + (head if stage == last else 0.0)) / machine.flops for stage, count in enumerate(counts)]
    compute, slowest = max((seconds, stage) for stage, seconds in enumerate(stages))  # ties are the last one's
    layers = counts[slowest]
    return ForwardTime(
        compute=compute,
        mean=(sum(counts) * flops + head) / len(counts) / machine.flops,
        tensor=layers * _tensor_seconds(args, machine),
        context=layers * _context_seconds(args, machine),
        mlp=layers * mlp / machine.flops,
        layers=layers * flops / machine.flops,
        stages=tuple(stages),
    )


def _bandwidth(machine: Machine, span: int) -> float:
    """Bytes a second and GPU among ranks that lie ``span`` apart from the first to the last."""
    return machine.gpu.link if span <= machine.per_node else machine.gpu.network


def _tensor_seconds(args: argparse.Namespace, machine: Machine) -> float:
    """Forward of one layer: two all-gathers and two reduce-scatters of [t, h]."""
    size = args.tensor_model_parallel_size
    moved = tokens_of_microbatch(args) * args.hidden_size * args.params_dtype.itemsize * (size - 1) / size
    return 4 * moved / _bandwidth(machine, size)


def _context_seconds(args: argparse.Namespace, machine: Machine) -> float:
    """Forward of one layer: keys and values from the other ranks of the context group."""
    size, tensor = args.context_parallel_size, args.tensor_model_parallel_size
    if args.multi_latent_attention:
        width = args.num_attention_heads * (args.qk_head_dim + args.qk_pos_emb_head_dim + args.v_head_dim)
    else:
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        width = 2 * groups * args.kv_channels
    tokens = args.micro_batch_size * args.seq_length
    moved = tokens * width / tensor * args.params_dtype.itemsize * (size - 1) / size
    return moved / _bandwidth(machine, size * tensor)


def data_time(
    args: argparse.Namespace,
    machine: Machine,
    parameters: Sequence[int],
    *,
    forward: Sequence[float],
    first_backward: float,
) -> DataTime:
    """Once a step: gradients reduced, and weights gathered with the distributed optimizer.

    What a rank does meanwhile hides them, only its computation (other communication wants the same links), and only
    that of one microbatch: Megatron reduces in the backward pass of the last one (those before run under ``no_sync``),
    and gathers when the first one's forward pass asks for a weight. Buckets are taken to be small, so that neither
    the first bucket's gathering nor the last one's reduction is left over.

    Args:
        args: a validated Megatron namespace, or a copy of one with other parallel sizes.
        machine: GPUs and their links.
        parameters: of a rank of every pipeline stage.
        forward: seconds of computation of one microbatch's forward pass on every stage.
        first_backward: those of its backward pass on the first stage, with what it recomputes.
    """
    ranks = args.data_parallel_size * args.context_parallel_size
    if ranks == 1:
        return DataTime()
    stages, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    # Seconds for one byte of every parameter.
    seconds = [count * (ranks - 1) / ranks / _bandwidth(machine, args.world_size // stages) for count in parameters]
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else args.params_dtype.itemsize
    if args.use_distributed_optimizer:
        reduces, gathers = gradient, args.params_dtype.itemsize
    else:  # an all-reduce: the sums travel back as the gradients did, in the same operation
        reduces, gathers = 2 * gradient, 0
    reduced, gathered = reduces * max(seconds), gathers * max(seconds)
    reduce_wait, gather_wait = reduced, gathered
    if args.overlap_grad_reduce:
        # The first stage ends last, and every other one has at least that stage's last backward pass as a pause.
        reduce_wait = max(0.0, reduced - first_backward)
        if virtual > 1 and args.align_grad_reduce:
            # The interleaved schedule starts a virtual stage's reduction behind its last backward pass, not within.
            reduce_wait = max(reduce_wait, reduced / virtual)
    if args.overlap_param_gather:
        waits = [max(0.0, gathers * byte - time) for byte, time in zip(seconds, forward, strict=True)]
        # The interleaved schedule starts all stages' gathering at once. In the plain one a stage starts when the first
        # microbatch arrives, so that it is held up by every stage.
        gather_wait = max(waits) if virtual > 1 else sum(waits)
    return DataTime(reduced, gathered, reduce_wait, gather_wait)


def _handover_seconds(args: argparse.Namespace, machine: Machine) -> float:
    """One microbatch's hidden states to the next stage."""
    stages = args.pipeline_model_parallel_size
    if stages == 1:
        return 0.0
    part = args.tensor_model_parallel_size if args.sequence_parallel else 1
    moved = tokens_of_microbatch(args) * args.hidden_size * args.params_dtype.itemsize / part
    return moved / _bandwidth(machine, args.world_size // stages + 1)


def step_time(
    student: Inventory,
    args: argparse.Namespace,
    machine: Machine,
    *,
    microbatches: int,
    parameters: Sequence[int],
    reference: tuple[Inventory, argparse.Namespace] | None = None,
    student_passes: int = 0,
) -> StepTime:
    """Seconds of a step under the formulas at the top.

    Args:
        student: the model under the tensor-parallel size of ``args``.
        args: a validated Megatron namespace, or a copy of one with other parallel sizes.
        machine: GPUs and utilization.
        microbatches: m.
        parameters: of a rank of every pipeline stage.
        reference: its inventory, and ``args`` with its architecture; None without a reference.
        student_passes: further forward passes of the student in each step (a selection over the global batch).
    """
    stages, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    forward = forward_time(student, args, machine)
    repeated = _recomputed(args, forward)
    again = 0.5 if args.sequence_parallel else 0.0  # backward gathers the inputs of qkv and fc1 once more
    whole = args.recompute_granularity == "full"
    passes = 3 + student_passes
    tensor = (2 + student_passes + again + whole) * forward.tensor
    context = (2 + student_passes + whole) * forward.context
    handover = (2 + student_passes) * virtual * _handover_seconds(args, machine)
    microbatch = passes * forward.compute + repeated + tensor + context + handover
    first = forward.stages[0]
    # What the slowest stage repeats is at most what the first one's whole forward pass takes.
    data = data_time(args, machine, parameters, forward=forward.stages, first_backward=2 * first + min(repeated, first))
    times = StudentTime(
        compute=microbatches * passes * forward.mean,
        imbalance=microbatches * passes * (forward.compute - forward.mean),
        recompute=microbatches * repeated,
        bubble=(stages - 1) / virtual * microbatch,
        tensor=microbatches * tensor,
        context=microbatches * context,
        pipeline=microbatches * handover,
        data=data.waited,
    )
    if reference is None:
        return StepTime(times, data, microbatch, None, times.total, None, None)
    score = forward_time(*reference, machine).total
    work = microbatches * (microbatch + score) + times.data
    handed = score + virtual * _handover_seconds(reference[1], machine)
    live = times.total + handed * (microbatches + (stages - 1) / virtual)
    return StepTime(times, data, microbatch, score, times.total, live, max(times.total, work))


def _recomputed(args: argparse.Namespace, forward: ForwardTime) -> float:
    """Seconds that a microbatch's backward repeats of its forward; norms and attention sums cost next to nothing."""
    if args.recompute_granularity == "full":
        share = 1.0
        if args.recompute_method == "block":
            share = min(1.0, args.recompute_num_layers / max(chunk_layers(args, 0)))
        return share * forward.layers
    if args.recompute_granularity == "selective" and "mlp" in args.recompute_modules:
        return forward.mlp
    return 0.0
