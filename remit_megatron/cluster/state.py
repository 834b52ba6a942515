"""Bytes of weights, gradients and optimizer state on one rank, as Megatron-Core 0.19.2 allocates them.

Megatron's DistributedDataParallel puts the parameters of a model chunk into one buffer, last one first, and their
gradients into a second one of the same layout. With the distributed optimizer

    - a parameter starts at a multiple of 64 elements;
    - the buffer is cut into buckets: a tied table has a bucket of its own; with ``overlap_grad_reduce`` a bucket of the
      first chunk of the first stage ends once it has ``ddp_bucket_size`` elements;
    - a bucket ends at a multiple of lcm(D, 128) elements, D being the ranks that share the optimizer state, and rank r
      of them owns the r-th of D equal parts of every bucket;
    - the weights live in the buffer, padding included, and the state of a rank is that of the elements it owns.

A 16-bit model has an fp32 master copy and two moments of each owned element (12 bytes); an fp32 model is its own master
(8 bytes). Without the distributed optimizer there is no padding and D = 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from remit_megatron.cluster.inventory import Inventory, Shapes
from remit_megatron.run.derived import layers_of_stage
from remit_megatron.runtime.errors import UserError

_START = 64
_END = 128
_BUSBW_END = 1 << 16  # ddp_pad_buckets_for_high_nccl_busbw

# Settings whose memory is not what is described above.
_NO_FORMULA = {
    "use_torch_fsdp2": "false",
    "optimizer_cpu_offload": "false",
    "cpu_offloading": "false",
    "fp8": "null",
    "fp4": "null",
    "num_experts": "a dense model",
    "reuse_grad_buf_for_mxfp8_param_ag": "false",
    "ddp_param_name_patterns_for_fp32_local_accumulation": "an empty list",
}


@dataclass(frozen=True)
class Parameter:
    """One parameter on a rank: its elements, and whether it is a tied table that two stages hold."""

    elements: int
    shared: bool = False


@dataclass(frozen=True)
class Bucket:
    """A stretch [start, end) of a buffer and the stretches in it that hold parameters, in elements."""

    start: int
    end: int
    filled: tuple[tuple[int, int], ...]

    def owned(self, shard: int, shards: int) -> int:
        """Elements of parameters in the ``shard``-th of ``shards`` equal parts."""
        width = (self.end - self.start) // shards
        low = self.start + shard * width
        return sum(max(0, min(end, low + width) - max(start, low)) for start, end in self.filled)


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds from the first step to the last.

    Attributes:
        parameters: elements of its parameters, without padding.
        weights, gradients, optimizer: bytes; the optimizer's step counters are left out.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Place:
    """Where a rank is: its pipeline stage, and which share of the optimizer state it owns."""

    stage: int
    shard: int


def check_known(args: argparse.Namespace) -> None:
    """Refuses settings that this arithmetic does not cover.

    Raises:
        UserError: naming the setting.
    """
    for name, expected in _NO_FORMULA.items():
        if value := getattr(args, name, None):
            raise UserError(f"megatron.{name}", value, f"{expected}: remit plan has no formula for it")
    if args.num_distributed_optimizer_instances > 1:
        found = args.num_distributed_optimizer_instances
        raise UserError("megatron.num_distributed_optimizer_instances", found, "1: remit plan has no formula for it")
    if args.optimizer not in ("adam", "sgd"):
        raise UserError("megatron.optimizer", args.optimizer, "adam or sgd: remit plan has no formula for it")


def shards_of(args: argparse.Namespace) -> int:
    """Ranks that share the optimizer state of the same parameters."""
    if not args.use_distributed_optimizer:
        return 1
    return args.data_parallel_size * args.context_parallel_size


def save_host_bytes(args: argparse.Namespace, *, parameters: int, per_node: int) -> tuple[int, int]:
    """Host memory in which Megatron puts the optimizer's state together before it writes a checkpoint.

    Args:
        args: Megatron's, of the layout.
        parameters: of a rank, of the stage that has most.
        per_node: ranks of a node.

    Returns:
        Bytes on the node that needs most, and how many of its ranks collect: those of the first replica with
        ``distrib_optim_fully_reshardable_mem_efficient``, else all. Both 0 where each rank saves its own.
    """
    if not args.use_distributed_optimizer or not args.dist_ckpt_optim_fully_reshardable:
        return 0, 0
    ranks = min(per_node, args.world_size)
    if args.distrib_optim_fully_reshardable_mem_efficient:
        # Ranks of one stage stand together, those of the first replica before the others.
        stages = max(1, ranks * args.pipeline_model_parallel_size // args.world_size)
        ranks = min(ranks, args.tensor_model_parallel_size * stages)
    return 12 * parameters * ranks, ranks


def place_of(args: argparse.Namespace, rank: int) -> Place:
    """Place of a global rank in Megatron's order: tensor, context, data, pipeline, the first one varying fastest."""
    pipeline = args.pipeline_model_parallel_size
    context, data = args.context_parallel_size, args.data_parallel_size
    rest = rank // args.tensor_model_parallel_size
    part, rest = rest % context, rest // context
    if args.use_tp_pp_dp_mapping:
        stage, replica = rest % pipeline, rest // pipeline
    else:
        replica, stage = rest % data, rest // data
    return Place(stage=stage, shard=part + context * replica if shards_of(args) > 1 else 0)


def chunk_layers(args: argparse.Namespace, stage: int) -> list[int]:
    """Transformer layers of each virtual stage on a pipeline stage."""
    virtual, last = args.virtual_pipeline_model_parallel_size or 1, args.pipeline_model_parallel_size - 1
    if args.pipeline_model_parallel_layout is not None:
        return _layers_of_layout(args, stage)
    total = layers_of_stage(args, stage)
    # Embedding and loss may count as a layer of the first and the last chunk.
    embedding = int(bool(args.account_for_embedding_in_pipeline_split) and stage == 0)
    loss = int(bool(args.account_for_loss_in_pipeline_split) and stage == last)
    counts = [(total + embedding + loss) // virtual] * virtual
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def _layers_of_layout(args: argparse.Namespace, stage: int) -> list[int]:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = args.pipeline_model_parallel_layout
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    return [kinds.count(LayerType.decoder) for kinds in layout.layout[stage]]


def chunks_of_stage(inventory: Inventory, args: argparse.Namespace, stage: int) -> list[list[Parameter]]:
    """Parameters of each model chunk of a pipeline stage, in order of registration."""
    stages = args.pipeline_model_parallel_size
    shared = inventory.tied and stages > 1
    counts = chunk_layers(args, stage)
    chunks = []
    for number, count in enumerate(counts):
        parameters = _parameters(inventory.layer) * count
        if stage == 0 and number == 0:
            parameters = _parameters(inventory.embedding, shared=shared) + parameters
        if stage == stages - 1 and number == len(counts) - 1:
            parameters = parameters + _parameters(inventory.final)
            if shared or not inventory.tied:
                parameters += _parameters(inventory.head, shared=shared)
        chunks.append(parameters)
    return chunks


def _parameters(shapes: Shapes, *, shared: bool = False) -> list[Parameter]:
    return [Parameter(math.prod(shape), shared) for shape in shapes.values()]


def lay_out(
    parameters: Sequence[Parameter], *, shards: int, bucket_size: int | None, high_busbw: bool = False
) -> list[Bucket]:
    """Buckets of one buffer under the distributed optimizer.

    Args:
        parameters: of one model chunk, in order of registration.
        shards: ranks that share the optimizer state.
        bucket_size: elements from which on a bucket ends; None for no limit.
        high_busbw: end buckets at multiples of 65,536 elements too.
    """
    multiple = math.lcm(shards, _END, _BUSBW_END if high_busbw else 1)
    buckets: list[Bucket] = []
    filled: list[tuple[int, int]] = []
    start = position = 0

    def close() -> int:
        end = -(-position // multiple) * multiple
        buckets.append(Bucket(start, end, tuple(filled)))
        filled.clear()
        return end

    for parameter in reversed(parameters):
        position = -(-position // _START) * _START
        if parameter.shared and filled:
            start = position = close()
        filled.append((position, position + parameter.elements))
        position += parameter.elements
        if parameter.shared or (bucket_size is not None and position - start >= bucket_size):
            start = position = close()
    if filled:
        close()
    return buckets


def state_bytes(inventory: Inventory, args: argparse.Namespace, place: Place) -> StateBytes:
    """Bytes of weights, gradients and optimizer state of the rank at ``place``.

    Args:
        inventory: the model under the tensor-parallel size of ``args``.
        args: a validated Megatron namespace, or a copy of one with other parallel sizes.
        place: which rank.
    """
    chunks = chunks_of_stage(inventory, args, place.stage)
    elements = [sum(parameter.elements for parameter in chunk) for chunk in chunks]
    element = args.params_dtype.itemsize
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else element
    if not args.use_distributed_optimizer:
        total = sum(elements)
        return StateBytes(total, total * element, total * gradient, total * _state_bytes_per_element(args))
    shards, size = shards_of(args), _bucket_size(args, sum(elements))
    padded = owned = 0
    for number, chunk in enumerate(chunks):
        # What later stages and chunks reduce is not on the critical path: Megatron gives them one bucket.
        one = number > 0 or place.stage > 0 or args.overlap_param_gather_with_optimizer_step
        buckets = lay_out(
            chunk,
            shards=shards,
            bucket_size=None if one else size,
            high_busbw=args.ddp_pad_buckets_for_high_nccl_busbw,
        )
        padded += buckets[-1].end
        owned += sum(bucket.owned(place.shard, shards) for bucket in buckets)
    return StateBytes(sum(elements), padded * element, padded * gradient, owned * _state_bytes_per_element(args))


def _bucket_size(args: argparse.Namespace, elements: int) -> int | None:
    if not args.overlap_grad_reduce:
        return None
    if args.ddp_num_buckets is not None:
        return elements // args.ddp_num_buckets
    ranks = args.data_parallel_size * args.context_parallel_size
    return args.ddp_bucket_size or max(40_000_000, 1_000_000 * ranks)


def _state_bytes_per_element(args: argparse.Namespace) -> int:
    moments = 2 if args.optimizer == "adam" else int(args.sgd_momentum != 0)
    master = 4 if args.params_dtype.itemsize < 4 else 0
    if not args.use_precision_aware_optimizer:
        return master + 4 * moments
    # The master copy is then held by the fused optimizer, which may keep only what the 16-bit weights lack.
    if args.store_param_remainders and args.bf16 and args.main_params_dtype.itemsize == 4:
        master = 2
    elif master:
        master = args.main_params_dtype.itemsize
    return master + args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
