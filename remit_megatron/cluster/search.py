"""Layouts of a number of GPUs: which fit, and which is fastest by the model of time in :mod:`timing`.

Every even layout is tried: tensor parallelism within a node, pipeline stages with and without virtual ones, context
parallelism, micro-batch sizes, and three kinds of recomputation. Sequence parallelism goes with tensor parallelism.
Among layouts of (nearly) one time, the one with more tokens in a microbatch up to 8,192 comes first, because products
of small matrices run slower and the model of time does not know it; then the one with less memory.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from remit_megatron.cluster.activations import tokens_of_microbatch
from remit_megatron.cluster.hardware import GIB
from remit_megatron.cluster.planner import Planner
from remit_megatron.cluster.timing import StudentTime
from remit_megatron.models.build import padded_vocab_size
from remit_megatron.runtime.errors import UserError

# What a step's time goes to, by the names of StudentTime.
CAUSES = {
    "compute": "products of matrices",
    "imbalance": "uneven stages",
    "recompute": "recomputation",
    "bubble": "pipeline bubble",
    "tensor": "tensor-parallel communication",
    "context": "context-parallel communication",
    "pipeline": "hand-over between stages",
    "data": "gradients and weights between data-parallel ranks",
}

_RECOMPUTE = ("none", "mlp", "full")
_ENOUGH_TOKENS = 8192
_MAX_CONTEXT = 16
_SAME_TIME = 0.01
_CHECKED = 6
_REFUSED = 2

# Other ways in which a configuration says what a layout says, at the values that leave it to the layout.
_OTHER_WAYS: dict[str, Any] = {
    "num_layers_per_virtual_pipeline_stage": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes, the micro-batch, and what is recomputed (``none``, ``mlp``, ``full``, or ``own`` for
    the configuration's other settings)."""

    tensor: int
    pipeline: int
    virtual: int
    context: int
    data: int
    micro_batch: int
    sequence_parallel: bool
    recompute: str

    def __str__(self) -> str:
        virtual = f" (virtual {self.virtual})" if self.virtual > 1 else ""
        context = f" x context {self.context}" if self.context > 1 else ""
        recompute = {"none": "no recomputation", "mlp": "mlp recomputed", "full": "all recomputed"}
        axes = f"tensor {self.tensor} x pipeline {self.pipeline}{virtual}{context} x data {self.data}"
        return f"{axes}, micro-batch {self.micro_batch}, {recompute.get(self.recompute, 'own recomputation')}"

    @property
    def axes(self) -> tuple[int, int, int]:
        """Tensor, pipeline and context parallel sizes."""
        return self.tensor, self.pipeline, self.context

    def overrides(self) -> dict[str, Any]:
        """Keys under ``megatron`` that ask for this layout."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "num_virtual_stages_per_pipeline_rank": self.virtual if self.virtual > 1 else None,
            "context_parallel_size": self.context,
            "micro_batch_size": self.micro_batch,
            "sequence_parallel": self.sequence_parallel,
            **_recompute_arguments(self.recompute),
            **_OTHER_WAYS,
        }

    def arguments(self, args: argparse.Namespace) -> argparse.Namespace:
        """A copy of ``args`` with this layout, for the arithmetic; it is not validated."""
        own = copy.copy(args)
        for name, value in self.overrides().items():
            setattr(own, name, value)
        own.virtual_pipeline_model_parallel_size = self.virtual if self.virtual > 1 else None
        own.data_parallel_size = self.data
        own.padded_vocab_size = padded_vocab_size(own.vocab_size, own.make_vocab_size_divisible_by, self.tensor)
        return own


def _recompute_arguments(kind: str) -> dict[str, Any]:
    full = kind == "full"
    return {
        "recompute_granularity": {"none": None, "mlp": "selective", "full": "full"}[kind],
        "recompute_method": "uniform" if full else None,
        "recompute_num_layers": 1 if full else None,
        "recompute_modules": ["mlp"] if kind == "mlp" else None,
    }


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory (bytes on the fullest stage), time (seconds of a step) and tokens of a microbatch."""

    layout: Layout
    tokens: int
    memory: float
    stage: int
    seconds: float
    student: StudentTime

    def shares(self) -> dict[str, float]:
        """What beside the student's own products its part of the step goes to, as shares of it."""
        parts = {name: value for name, value in asdict(self.student).items() if name != "compute"}
        return {name: value / self.student.total for name, value in parts.items()}


@dataclass(frozen=True)
class Search:
    """What was found: fitting layouts, best first, and the fastest of those that do not fit."""

    fitting: list[Candidate]
    too_large: list[Candidate]
    limit: float


def own_layout(args: argparse.Namespace) -> Layout:
    """The layout that a validated namespace has."""
    modules = args.recompute_modules or []
    kind = {None: "none", "full": "full"}.get(args.recompute_granularity, "mlp" if modules == ["mlp"] else "own")
    if kind == "full" and (args.recompute_method, args.recompute_num_layers) != ("uniform", 1):
        kind = "own"
    return Layout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        virtual=args.virtual_pipeline_model_parallel_size or 1,
        context=args.context_parallel_size,
        data=args.data_parallel_size,
        micro_batch=args.micro_batch_size,
        sequence_parallel=args.sequence_parallel,
        recompute=kind,
    )


def layouts(args: argparse.Namespace, *, gpus_per_node: int) -> Iterator[Layout]:
    """Even layouts of ``args.world_size`` GPUs for the model, sequence length and global batch of ``args``.

    Args:
        args: a validated namespace; its own layout plays no part.
        gpus_per_node: tensor parallelism stays within that many.
    """
    batch, length = args.global_batch_size, args.seq_length
    for tensor, pipeline, part, data in axes(args, gpus_per_node=gpus_per_node):
        for micro in divisors(batch // data) if batch % data == 0 else ():
            if micro > 1 and micro * length // part > 4 * _ENOUGH_TOKENS:
                break
            yield from _variants(args, tensor, pipeline, part, data, micro)


def axes(args: argparse.Namespace, *, gpus_per_node: int) -> Iterator[tuple[int, int, int, int]]:
    """Tensor, pipeline, context and data parallel sizes whose product is ``args.world_size``, for the model and the
    sequence length of ``args``, whatever the batch."""
    world, length = args.world_size, args.seq_length
    for tensor in divisors(gpus_per_node):
        if world % tensor or not _divides_model(args, tensor):
            continue
        for pipeline in divisors(args.num_layers):
            for part in (1, 2, 4, 8, _MAX_CONTEXT):
                model = tensor * pipeline * part
                sliced = tensor * part if tensor > 1 else part
                if world % model or (part > 1 and length % (2 * part)) or length % sliced:
                    continue
                yield tensor, pipeline, part, world // model


def _variants(
    args: argparse.Namespace, tensor: int, pipeline: int, context: int, data: int, micro: int
) -> Iterator[Layout]:
    microbatches = args.global_batch_size // (data * micro)
    per_stage = args.num_layers // pipeline
    # The interleaved schedule wants whole rounds of microbatches.
    virtual_sizes = divisors(per_stage) if pipeline > 1 and microbatches % pipeline == 0 else [1]
    for virtual in virtual_sizes:
        for recompute in _RECOMPUTE:
            yield Layout(tensor, pipeline, virtual, context, data, micro, tensor > 1, recompute)


def _divides_model(args: argparse.Namespace, tensor: int) -> bool:
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return not any(size % tensor for size in (args.num_attention_heads, groups, args.ffn_hidden_size))


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def candidate(planner: Planner, layout: Layout, args: argparse.Namespace | None = None) -> Candidate:
    """Memory and time of one layout.

    Args:
        planner: of the run.
        layout: sizes.
        args: a namespace of that layout; None derives one from the planner's.
    """
    own = layout.arguments(planner.args) if args is None else args
    peak, time = planner.peak(own), planner.time(own)
    return Candidate(layout, tokens_of_microbatch(own), peak.total, peak.stage, planner.seconds(time), time.student)


def search(
    planner: Planner,
    *,
    limit: float,
    allowed: Callable[[Layout], bool] = lambda layout: True,
    accepted: Callable[[Layout], bool] = lambda layout: True,
) -> Search:
    """Tries all layouts.

    Args:
        planner: of the run.
        limit: bytes that a rank may use.
        allowed: quick check of a layout, before its memory and time.
        accepted: thorough check; asked of the best until ``_CHECKED`` different combinations of axes have passed. What
            differs in its micro-batch only is left out unasked where ``_REFUSED`` of its kind were not accepted.
    """
    fitting, too_large = [], []
    for layout in layouts(planner.args, gpus_per_node=planner.machine.per_node):
        if not allowed(layout):
            continue
        try:
            found = candidate(planner, layout)
        except UserError:  # shards that the family's layers cannot be cut into
            continue
        (fitting if found.memory <= limit else too_large).append(found)
    too_large.sort(key=lambda found: found.seconds)
    return Search(_checked(rank(fitting), accepted), too_large, limit)


def _checked(ranked: list[Candidate], accepted: Callable[[Layout], bool]) -> list[Candidate]:
    """``ranked`` without those of its first ones that are not accepted."""
    kept: list[Candidate] = []
    passed: set[tuple[int, int, int]] = set()
    refused: Counter[Layout] = Counter()
    for item in ranked:
        key, kind = item.layout.axes, replace(item.layout, micro_batch=0)
        if key in passed or len(passed) >= _CHECKED:
            kept.append(item)
        elif refused[kind] >= _REFUSED:
            continue
        elif accepted(item.layout):
            kept.append(item)
            passed.add(key)
        else:
            refused[kind] += 1
    return kept


class _Standing(NamedTuple):
    """By what layouts are ordered; less is better."""

    slower: int  # than the fastest, in whole steps of _SAME_TIME
    missing: int  # tokens of a microbatch that enough ones would have more
    memory: float


def _standings(found: list[Candidate]) -> list[_Standing]:
    """One for each of ``found``, which has one candidate at least."""
    fastest = min(item.seconds for item in found)
    return [
        _Standing(
            slower=int((item.seconds / fastest - 1) / _SAME_TIME),
            missing=max(_ENOUGH_TOKENS - item.tokens, 0),
            memory=item.memory,
        )
        for item in found
    ]


def rank(found: list[Candidate]) -> list[Candidate]:
    """Best first: by time, in steps of one percent; then by tokens of a microbatch, up to enough; then by memory."""
    if not found:
        return []
    ordered = sorted(zip(_standings(found), found, strict=True), key=lambda pair: pair[0])
    return [item for _, item in ordered]


def tie(found: Search) -> str | None:
    """Why the best layout stands before others that are as fast; None where none is.

    Args:
        found: with one fitting layout at least.
    """
    best, *_ = standings = _standings(found.fitting)
    same = [standing for standing in standings if standing.slower == 0]
    if best.slower or len(same) == 1:
        return None
    why = "the least memory"
    if len({standing.missing for standing in same}) > 1:
        why = f"the most tokens in a microbatch (counted up to {_ENOUGH_TOKENS:,}), then the least memory"
    return f"of {len(same):,} within {_SAME_TIME:.0%} of the fastest: {why}"


def reason(item: Candidate, best: Candidate) -> str:
    """One line on why a layout stands behind the best one."""
    mine, others = item.shares(), best.shares()
    worst = max(mine, key=lambda name: mine[name] - others[name])
    if item.seconds <= best.seconds * (1 + _SAME_TIME):
        return f"as fast; {item.memory / GIB:.1f} GiB"
    text = f"{item.seconds / best.seconds:.2f} x the time"
    if mine[worst] > others[worst]:
        text += f": {CAUSES[worst]} {mine[worst]:.0%} of the step (best {others[worst]:.0%})"
    return f"{text}; {item.memory / GIB:.1f} GiB"
