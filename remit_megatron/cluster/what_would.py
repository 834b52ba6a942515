"""What to say where a number of GPUs can take a run under no layout at all: one line, with what they could take."""

from __future__ import annotations

import argparse
from typing import Any

from remit_megatron.cluster.hardware import GIB
from remit_megatron.cluster.planner import Planner
from remit_megatron.cluster.run_layouts import RunLayouts
from remit_megatron.cluster.search import Search, axes, layouts
from remit_megatron.runtime.errors import UserError

# A larger batch that is proposed may have this share more samples; beyond it, the smallest is.
_LITTLE_MORE = 0.05
_BATCHES_TRIED = 4


def no_layout(planner: Planner, runs: RunLayouts, refusal: UserError, found: Search) -> UserError:
    """The error to raise.

    Args:
        planner: of the run.
        runs: its layouts.
        refusal: why the configuration's own layout is not possible.
        found: by a search that found nothing that fits.
    """
    gpu, world = planner.machine.gpu, runs.world_size
    possible = (item for item in sorted(found.too_large, key=lambda item: item.memory) if runs.accepts(item.layout))
    least = next(possible, None)
    own = f"(the configuration's own: {refusal})"
    if least is not None:
        share = found.limit / gpu.memory
        return UserError(
            "--nodes",
            f"{runs.nodes} ({world:,} {gpu.name}), whose memory no possible layout fits {own}",
            f"GPUs of {least.memory / share / GIB:.1f} GiB at least, for {least.layout}",
        )
    ways = []
    if (nodes := _fewer_nodes(planner, runs, limit=found.limit)) is not None:
        ways.append(f"{nodes} ({nodes * planner.machine.per_node:,} GPUs)")
    if (batch := _larger_batch(planner, runs, limit=found.limit)) is not None:
        ways.append(f"megatron.global_batch_size {batch}")
    what = ", or ".join(ways) or "another configuration: fewer nodes or a larger batch would not do either"
    return UserError("--nodes", f"{runs.nodes} ({world:,} GPUs), which no layout of this run can occupy {own}", what)


def _fewer_nodes(planner: Planner, runs: RunLayouts, *, limit: float) -> int | None:
    for nodes in range(runs.nodes - 1, 0, -1):
        found = _possible(planner, runs, limit=limit, world_size=nodes * planner.machine.per_node)
        if found is not None:
            return nodes if found else None  # what does not fit the memory of these GPUs does not fit that of fewer
    return None


def _larger_batch(planner: Planner, runs: RunLayouts, *, limit: float) -> int | None:
    args = planner.args
    before, ranks = args.global_batch_size, {data for *_, data in axes(args, gpus_per_node=planner.machine.per_node)}
    batches = {-(-before // data) * data: data for data in sorted(ranks)}

    def key(batch: int) -> tuple[float, int]:
        more = batch / before - 1
        return (more if more > _LITTLE_MORE else 0.0), -batches[batch]

    for batch in sorted(batches, key=key)[:_BATCHES_TRIED]:
        if batch > before and _possible(planner, runs, limit=limit, global_batch_size=batch):
            return batch
    return None


def _possible(planner: Planner, runs: RunLayouts, *, limit: float, **replaced: Any) -> bool | None:
    """Whether some layout fits with ``replaced`` arguments; None where there is none, fitting or not."""
    args = argparse.Namespace(**(vars(planner.args) | replaced))
    asked: set[tuple[int, int, int]] = set()
    some = None
    for layout in layouts(args, gpus_per_node=planner.machine.per_node):
        own = layout.arguments(args)
        if layout.axes in asked or not runs.allows(layout, own):
            continue
        if planner.peak(own).total > limit:
            some = False
            continue
        asked.add(layout.axes)
        if runs.accepts(layout, **replaced):
            return True
    return some
