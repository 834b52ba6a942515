"""What ``remit plan`` prints: tables of arithmetic, said to be such."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from remit_megatron.cluster.hardware import GIB
from remit_megatron.cluster.planner import Planner, StageMemory
from remit_megatron.cluster.search import CAUSES, Candidate, Layout, Search, reason, tie
from remit_megatron.cluster.simulate import SimulatedRank, describe_difference
from remit_megatron.cluster.state import save_host_bytes
from remit_megatron.cluster.timing import DataTime, StepTime
from remit_megatron.models.spec import LOCAL, TE
from remit_megatron.run.derived import PlanNumbers
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.progress import format_count, format_duration

_RUNNERS_UP = 4
# Keys that are not printed where the configuration has the right value.
_AS_IT_IS = {
    "context_parallel_size",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
}


@dataclass(frozen=True)
class Report:
    """Everything that a plan found.

    Attributes:
        numbers: what follows from the configuration.
        args: validated arguments of the layout that is shown.
        planner: of the run.
        shown: the configuration's own layout; where it is not possible on these GPUs, the best one.
        refusal: why the configuration's own is not possible; None where it is.
        asked: the keys of a layout as the configuration has them.
        stages: memory of the first, middle and last stage of the layout that is shown.
        time: of its step.
        found: other layouts.
        headroom: share of a GPU's memory that is left alone.
        simulated: ranks built on ``meta``; empty without ``--simulate``.
    """

    numbers: PlanNumbers
    args: argparse.Namespace
    planner: Planner
    shown: Candidate
    refusal: UserError | None
    asked: argparse.Namespace
    stages: list[StageMemory]
    time: StepTime
    found: Search
    headroom: float
    simulated: list[SimulatedRank]

    @property
    def limit(self) -> float:
        """Bytes of a GPU that a plan may use."""
        return self.planner.machine.gpu.memory * (1 - self.headroom)

    @property
    def own(self) -> Candidate | None:
        """The configuration's own layout; None where it is not possible on these GPUs."""
        return self.shown if self.refusal is None else None


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Aligned columns, the first one to the left and the others to the right; empty cells at the end are dropped."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)),
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines) + "\n"


def text(report: Report) -> str:
    """The whole report."""
    parts = [_run(report), _memory(report), _time(report), _layouts(report)]
    if report.simulated:
        parts.append(_simulation(report.simulated, wanted=report.args.transformer_impl))
    return _refused(report) + "\n".join(parts)


def _refused(report: Report) -> str:
    """One line where the configuration's own layout is not possible; empty where it is."""
    if report.refusal is None:
        return ""
    gpus = f"these {report.numbers.world_size:,} GPUs"
    return (
        f"the configuration's own layout does not fit {gpus} ({report.refusal}); what follows is the best that does\n\n"
    )


def _gib(number: float) -> str:
    return f"{number / GIB:.2f}"


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "".join(f"  {name:<{width}}  {value}\n" for name, value in rows)


def _run(report: Report) -> str:
    numbers, machine = report.numbers, report.planner.machine
    rate = f"{numbers.peak_learning_rate:.3g} at the peak, {numbers.last_learning_rate:.3g} at the last step"
    rows = [
        ("GPUs", f"{numbers.world_size} {machine.gpu.name}, {machine.per_node} a node"),
        ("layout", str(report.shown.layout)),
        ("parameters", f"{numbers.parameters:,} ({format_count(numbers.parameters)})"),
        ("batch", f"{numbers.samples_per_step:,} samples of {numbers.sequence_length:,} tokens"),
        ("tokens per batch", f"{numbers.tokens_per_step:,}"),
        ("microbatches", f"{numbers.microbatches} of {numbers.micro_batch_size} on each data-parallel rank"),
        ("steps", f"{numbers.steps:,}, {format_count(numbers.total_tokens)} tokens"),
        ("learning rate", rate),
        ("reference", _reference(report.planner)),
        ("layers", _layers(report.args)),
    ]
    return "run\n" + _facts(rows)


def _reference(planner: Planner) -> str:
    if planner.reference is None:
        return "none"
    words = {"pipeline": "live, on the student's pipeline", "replicated": "live, replicated", "cached": "cached scores"}
    assumed = "; its files are not here, taken to be like the student" if planner.reference.assumed else ""
    return words[planner.reference.placement] + assumed


def _layers(args: argparse.Namespace) -> str:
    if args.transformer_impl == LOCAL:
        return "local (megatron.transformer_impl)"
    return "Transformer Engine, which is taken to be installed there"


def _memory(report: Report) -> str:
    stages, placement = report.stages, report.stages[0].placement
    reference = "reference" if placement == "none" else f"reference ({placement})"
    first = stages[0]
    rows = [
        ["", *(f"stage {stage.stage}" for stage in stages)],
        ["layers", *(str(stage.layers) for stage in stages)],
        ["parameters", *(f"{stage.state.parameters:,}" for stage in stages)],
        ["weights", *(_gib(stage.state.weights) for stage in stages)],
        ["gradients", *(_gib(stage.state.gradients) for stage in stages)],
        ["optimizer state", *(_gib(stage.state.optimizer) for stage in stages)],
        [reference, *(_gib(stage.reference_bytes) for stage in stages)],
        ["microbatches held", *(f"{stage.activations.in_flight:g}" for stage in stages)],
        ["activations of one", *(_gib(stage.activations.microbatch) for stage in stages)],
        ["activations of all", *(_gib(stage.activations.layers) for stage in stages)],
        ["recomputed unit", *(_gib(stage.activations.recomputed) for stage in stages)],
        ["last norm, head's input", *(_gib(stage.activations.ends) for stage in stages)],
        ["logits and loss", *(_gib(stage.activations.logits) for stage in stages)],
        ["temporary (estimate)", *(_gib(stage.activations.working) for stage in stages)],
        ["total", *(_gib(stage.total) for stage in stages)],
    ]
    if first.activations.recomputed == 0:
        rows = [row for row in rows if row[0] != "recomputed unit"]
    fits = "fits" if max(stage.total for stage in stages) <= report.limit else "DOES NOT FIT"
    memory = report.planner.machine.gpu.memory
    end = f"  {fits}: {_gib(report.limit)} GiB of {_gib(memory)} may be used ({report.headroom:.0%} left alone)\n"
    return "memory of one GPU in GiB (arithmetic)\n" + table(rows) + end + _host_of_save(report)


def _host_of_save(report: Report) -> str:
    parameters = max(stage.state.parameters for stage in report.stages)
    held, ranks = save_host_bytes(report.args, parameters=parameters, per_node=report.planner.machine.per_node)
    if not held:
        return ""
    who = "one rank" if ranks == 1 else f"{ranks} ranks"
    return f"  host memory of a save: {_gib(held)} GiB on the node that collects most ({who}, 12 bytes a parameter)\n"


def _time(report: Report) -> str:
    time, numbers = report.time, report.numbers
    machine = report.planner.machine
    parts = {name: value for name, value in asdict(time.student).items() if value or name == "compute"}
    rows = [["student", "s/step", "share"]]
    whole = time.student.total
    rows += [[CAUSES[name], f"{value:.3f}", f"{value / whole:.1%}"] for name, value in parts.items()]
    peak = max(report.stages, key=lambda stage: stage.total)
    sources = [("no reference", None, time.cached)]
    if peak.reference is not None:
        held = peak.reference
        sources = [
            ("live, pipeline", held.pipeline, time.live),
            ("live, replicated", held.replicated, time.replicated),
            ("cached", held.cached, time.cached),
        ]
        sources = [source for source in sources if source[1] is not None]
    scores = [["scores", "GiB", "s/step", "tokens/s", "whole run", "reference's share"]]
    for name, memory, seconds in sources:
        assert seconds is not None
        scores.append(
            [
                name,
                "" if memory is None else _gib(memory),
                f"{seconds:.3f}",
                format_count(numbers.tokens_per_step / seconds),
                format_duration(numbers.steps * seconds),
                f"{1 - time.cached / seconds:.1%}",
            ]
        )
    gpu = machine.gpu
    head = (
        "time (arithmetic, not a measurement)\n"
        f"  assumed: {machine.utilization:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s outside bubbles and communication "
        f"(--mfu), {gpu.link / 1e9:.0f} GB/s within a node,\n  {gpu.network / 1e9:.0f} GB/s a GPU between nodes\n"
    )
    return head + table(rows) + _hidden(time.data) + "\n" + table(scores)


def _hidden(data: DataTime) -> str:
    """What of the communication between data-parallel ranks computation hides; empty where the step waits for all."""
    hidden = data.total - data.waited
    start = f"  {CAUSES['data']}: {data.total:.3f} s a step, "
    if hidden > 0:
        passes = ["the first forward"] if data.gather_wait < data.gathered else []
        passes += ["the last backward"] if data.reduce_wait < data.reduced else []
        return f"{start}of which {hidden:.3f} s behind {' and '.join(passes)} pass\n"
    if hidden < 0:
        return f"{start}but stages wait for their weights one after another (overlap_param_gather)\n"
    return ""


def _layouts(report: Report) -> str:
    found, own = report.found, report.own
    tried = len(found.fitting) + len(found.too_large)
    lines = [f"layouts of these GPUs: {tried:,} tried, {len(found.fitting):,} fit"]
    if not found.fitting:
        lines.append("  none fits; more GPUs, a shorter sequence or more recomputation would")
    else:
        best = found.fitting[0]
        lines.append(f"  best          {best.layout}")
        lines.append(f"                {_why(best)}")
        equals = tie(found)
        if equals is not None:
            lines.append(f"                {equals}")
        lines.append(f"  configured    {own.layout if own else 'not possible on these GPUs'}")
        if own is None:
            lines.append(f"                {report.refusal}")
        elif own.layout == best.layout:
            lines.append("                the best one")
        elif own.memory > report.limit:
            lines.append(f"                does not fit: {_gib(own.memory)} GiB on stage {own.stage}")
        else:
            lines.append(f"                {reason(own, best)}")
        for other in runners_up(found):
            lines.append(f"  runner-up     {other.layout}")
            lines.append(f"                {reason(other, best)}")
        lines += _too_fast(found, best)
        lines.append("  to take the best: " + " ".join(settings(best.layout, report.asked)))
    return "\n".join(lines) + "\n"


def _why(best: Candidate) -> str:
    shares = {name: share for name, share in best.shares().items() if share >= 0.005}
    lost = ", ".join(f"{CAUSES[name]} {share:.1%}" for name, share in shares.items()) or "nothing"
    return f"{best.seconds:.3f} s/step, {_gib(best.memory)} GiB on stage {best.stage}; of the student's step: {lost}"


def _too_fast(found: Search, best: Candidate) -> list[str]:
    """The fastest layout that does not fit, where it would be faster."""
    faster = [item for item in found.too_large if item.seconds < best.seconds * 0.99][:1]
    lines = []
    for item in faster:
        lines.append(f"  does not fit  {item.layout}")
        missing = f"{_gib(item.memory)} GiB on stage {item.stage}, {_gib(item.memory - found.limit)} too many"
        lines.append(f"                {missing}; {item.seconds / best.seconds:.2f} x the time")
    return lines


def runners_up(found: Search) -> list[Candidate]:
    """The next best layouts, one for each combination of parallel axes."""
    seen = {found.fitting[0].layout.axes}
    others = []
    for item in found.fitting:
        if item.layout.axes not in seen:
            seen.add(item.layout.axes)
            others.append(item)
    return others[:_RUNNERS_UP]


def settings(layout: Layout, args: argparse.Namespace) -> list[str]:
    """Overrides that turn the layout of ``args`` into ``layout``, as on the command line."""
    wanted = layout.overrides()
    if args.recompute_granularity is None and layout.recompute == "none":
        wanted = {name: value for name, value in wanted.items() if not name.startswith("recompute_")}
    words = []
    for name, value in wanted.items():
        own = getattr(args, name)
        if value == own and (value is None or name in _AS_IT_IS):
            continue
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        words.append(f"megatron.{name}={shown}".replace("'", "").replace(" ", ""))
    return words


def _simulation(ranks: list[SimulatedRank], *, wanted: str) -> str:
    rows = [["rank", "stage", "share", "parameters", "weights", "gradients", "optimizer", "", "seconds"]]
    for item in ranks:
        place = [str(item.rank), str(item.stage), str(item.shard)]
        for name, side in (("Megatron", item.built), ("plan", item.planned)):
            counts = [f"{value:,}" for value in (side.parameters, side.weights, side.gradients, side.optimizer)]
            rows.append([*(place if name == "Megatron" else [""] * 3), *counts, name, f"{item.seconds:.1f}"])
        rows[-1].pop()
    lines = [f"  rank {item.rank} differs: {describe_difference(item)}" for item in ranks if not item.agrees]
    lines = lines or ["  all shapes and bytes agree"]
    head = "simulation: bytes of the model, buffers and optimizer that Megatron built on meta, and of the plan\n"
    layers = "Transformer Engine's" if ranks[0].layers == TE else "local ones"
    if ranks[0].layers != wanted:
        layers += ", on both sides: Transformer Engine's, which the memory above is for, cannot be built here"
    head += f"  layers: {layers}\n"
    return head + table(rows) + "\n".join(lines) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """The report for machines; bytes, seconds, counts."""

    def layout(item: Candidate) -> dict[str, Any]:
        return asdict(item) | {"fits": item.memory <= report.limit}

    machine = report.planner.machine
    return {
        "arithmetic": "bytes of weights, gradients and optimizer state are exact; activations, temporaries and seconds "
        "are arithmetic, not measurements",
        "gpu": asdict(machine.gpu) | {"per_node": machine.per_node, "utilization": machine.utilization},
        "memory_limit": report.limit,
        "numbers": asdict(report.numbers),
        "configured": layout(report.own) if report.own else None,
        "configured_refused": None if report.refusal is None else str(report.refusal),
        "shown": "best" if report.own is None else "configured",
        "stages": [
            asdict(stage) | {"total": stage.total, "reference_bytes": stage.reference_bytes} for stage in report.stages
        ],
        "seconds_per_step": asdict(report.time),
        "best": layout(report.found.fitting[0]) if report.found.fitting else None,
        "runners_up": [layout(item) for item in runners_up(report.found)] if report.found.fitting else [],
        "tried": len(report.found.fitting) + len(report.found.too_large),
        "fitting": len(report.found.fitting),
        "simulation": [asdict(item) | {"agrees": item.agrees} for item in report.simulated],
    }
