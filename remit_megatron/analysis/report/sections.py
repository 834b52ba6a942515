"""The sections of a report that come from run directories and results."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from html import escape

from remit_megatron.analysis.parts import Block, Chart, Part, Series, Table, Text, number
from remit_megatron.analysis.results import Z_95, Score
from remit_megatron.analysis.runs import Run, differences, smoothed
from remit_megatron.evaluation.results import NO_SHARE, show_score
from remit_megatron.runtime.progress import format_count, format_duration

_CAUSES = {
    "training": "training that counts",
    "saving": "saving",
    "validation": "validation",
    "starting": "starting",
    "lost": "lost, done again",
    "other": "other",
    "evaluation": "evaluation",
}


def _causes(runs: list[Run]) -> dict[str, str]:
    """Causes and their labels; a suite where one was scored."""
    told = any(run.evaluations for run in runs)
    return {cause: label for cause, label in _CAUSES.items() if told or cause != "evaluation"}


def overview(runs: list[Run]) -> Part:
    """One line a run: what it is, how far it got, what it reached, what it cost."""
    rows = []
    for run in runs:
        losses = run.column("lm_loss")
        planned = run.planned_steps
        steps = int(run.steps[-1])
        valid = run.validation[-1].get("lm_loss") if run.validation else None
        rows.append(
            [
                run.name,
                f"{steps}/{planned}" if planned else str(steps),
                number(smoothed(losses, max(1, len(losses) // 20))[-1]),
                number(valid),
                format_count(run.tokens[-1]),
                f"{number(run.device_hours[-1], 3)}",
                "–" if run.wall_time is None else f"{100 * run.wall_time.effective:.0f}%",
                run.objective,
            ]
        )
    # Losses on other data do not compare.
    same = {key: len({str((run.config.get("data") or {}).get(key)) for run in runs}) == 1 for key in ("train", "valid")}
    best = [(_best([row[column] for row in rows]), column) for key, column in (("train", 2), ("valid", 3)) if same[key]]
    table = Table(
        ["run", "steps", "lm_loss", "validation loss", "tokens", "device hours", "effective time", "objective"],
        rows,
        bold=[[row, column] for row, column in best if row is not None],
        note="lm_loss: mean of the last twentieth of the steps, nats, never weighted; best in bold where the data are "
        "the same. Effective time: the share of the running time that went into steps that count.",
    )
    unfinished = [run.name for run in runs if run.planned_steps and run.steps[-1] < run.planned_steps]
    state = f" Not at its end: {', '.join(unfinished)}." if unfinished else ""
    total = sum(run.tokens[-1] for run in runs)
    hours = sum(run.device_hours[-1] for run in runs)
    summary = (
        f"{len(runs)} run{'s' * (len(runs) > 1)}, {format_count(total)} tokens, {number(hours, 3)} device hours.{state}"
    )
    return Part("overview", "Overview", summary, [table])


def _best(cells: list[str]) -> int | None:
    values = [(float(cell), row) for row, cell in enumerate(cells) if cell != "–"]
    return min(values)[1] if len(values) > 1 else None


def configuration(runs: list[Run]) -> Part | None:
    """Keys whose values differ, and nothing else."""
    if len(runs) < 2:
        return None
    found = differences(runs)
    rows = [[key, *values] for key, values in found.items()]
    blocks: list[Block] = [Table(["key", *(run.name for run in runs)], rows)] if rows else []
    summary = f"{len(rows)} keys of the resolved configurations differ." if rows else "The configurations are the same."
    return Part("configuration", "What differed", summary, blocks)


def _curve(
    runs: Iterable[Run], key: str, title: str, unit: str, *, log_y: bool = False, settled: bool = False
) -> Chart | None:
    series = [Series(run.name, run.tokens, run.column(key)) for run in runs]
    series = [item for item in series if any(value is not None for value in item.y)]
    return Chart(title, "tokens", unit, series, "", log_y, settled) if series else None


def curves(runs: list[Run]) -> Part:
    """Losses, gradient norm, learning rate."""
    charts = [_curve(runs, "lm_loss", "Training loss", "lm_loss, nats", settled=True)]
    series = []
    for run in runs:
        tokens_at = dict(zip(run.steps, run.tokens, strict=True))
        points = [(tokens_at.get(float(r["iteration"])), r.get("lm_loss")) for r in run.validation]
        kept = [(x, y) for x, y in points if x is not None and y is not None]
        if kept:
            series.append(Series(run.name, [x for x, _ in kept], [y for _, y in kept]))
    if any(len(item.x) > 1 for item in series):
        charts.append(Chart("Validation loss", "tokens", "lm_loss, nats", series))
    charts.append(_curve(runs, "grad_norm", "Gradient norm", "before clipping", log_y=True))
    charts.append(_curve(runs, "learning_rate", "Learning rate", ""))
    most = max(len(run.metrics) for run in runs)
    note = "Longer curves are means of equal stretches; the band around them spans the extremes." if most > 240 else ""
    summary = f"Every step of metrics.jsonl. {note}".strip()
    return Part("curves", "Curves", summary, [chart for chart in charts if chart is not None])


def evaluations(runs: list[Run]) -> Part | None:
    """What a suite said while the runs trained: means over the tasks as curves, each task from first to last."""
    told = [run for run in runs if run.evaluations]
    if not told:
        return None
    records = [record["tasks"] for run in told for record in run.evaluations]
    tasks = [task for task in records[0] if all(task in record for record in records)]
    kinds: dict[str, list[str]] = {}
    for task in tasks:
        bits = records[0][task]["metric"] == "bits_per_byte"
        kinds.setdefault("Bits per byte of gold answers" if bits else "Accuracy", []).append(task)
    charts = []
    for title, kind in kinds.items():
        unit = kind[0] if len(kind) == 1 else f"mean of {len(kind)} tasks"
        series = []
        for run in told:
            y = [sum(record["tasks"][task]["score"] for task in kind) / len(kind) for record in run.evaluations]
            errors = [math.hypot(*(record["tasks"][task]["stderr"] for task in kind)) for record in run.evaluations]
            half = [Z_95 * error / len(kind) for error in errors]
            low, high = [a - b for a, b in zip(y, half, strict=True)], [a + b for a, b in zip(y, half, strict=True)]
            x = [float(record["consumed_tokens"]) for record in run.evaluations]
            series.append(Series(run.name, x, list(y), list(low), list(high)))
        charts.append(Chart(title, "tokens", unit, series))
    rows, bold = [], []
    for task in tasks:
        metric = records[0][task]["metric"]
        ends = [(run.evaluations[0]["tasks"][task], run.evaluations[-1]["tasks"][task]) for run in told]
        last = [after["score"] if metric != "bits_per_byte" else -after["score"] for _, after in ends]
        counts = dict.fromkeys(str(after["items"]) for _, after in ends)
        bold += _best_cells(last, row=len(rows)) if len(counts) == 1 else []
        cells = [
            f"{number(before['score'])} → {number(after['score'])} ± {number(Z_95 * after['stderr'], 2)}"
            for before, after in ends
        ]
        rows.append([task, metric, ", ".join(counts), *cells])
    note = "First → last. ± and bands are half of the 95% interval over the items; best last score in bold where the "
    note += "items are the same. "
    shares = [f"{run.name} {100 * run.evaluations[-1].get('share', 0.0):.1f}%" for run in told]
    note += f"Of the time that the last start took, evaluations took: {', '.join(shares)}."
    table = Table(["task", "metric", "items", *(run.name for run in told)], rows, bold=bold, note=note)
    suites = ", ".join(dict.fromkeys(str(run.evaluations[-1].get("suite")) for run in told))
    summary = f"Suite {suites}, by the runs' own forward passes."
    left_out = sorted({task for record in records for task in record} - set(tasks))
    summary += f" Not in all evaluations, and left out: {', '.join(left_out)}." if left_out else ""
    return Part("evaluations", "A suite while training", summary, [*charts, *([table] if rows else [])])


def weights(runs: list[Run]) -> Part | None:
    """How the weights moved, for runs that followed a reference."""
    guided = [run for run in runs if run.uses_reference]
    if not guided:
        return None
    charts = [
        _curve(guided, "delta_mean", "How far the student is behind", "mean L_student − L_ref, nats"),
        _curve(guided, "delta_std", "Spread of the difference", "standard deviation, nats"),
        _curve(guided, "weight_std", "Spread of the weights", "standard deviation"),
        _curve(guided, "weight_mean", "Mean weight", ""),
        _curve(guided, "weight_clipped_high", "Clipped from above", "share of the tokens"),
        _curve(guided, "weight_clipped_low", "Clipped from below", "share of the tokens"),
    ]
    rows = []
    for run in guided:
        first, last = run.metrics[0], run.metrics[-1]
        cells = [
            f"{number(first.get(k), 3)} → {number(last.get(k), 3)}" for k in ("delta_mean", "delta_std", "weight_std")
        ]
        dropped = sum(record.get("dropped_tokens") or 0 for record in run.metrics)
        rows.append([run.name, *cells, str(dropped)])
    table = Table(["run", "mean Δ", "std Δ", "std of weights", "dropped tokens"], rows, note="First step → last step.")
    others = [run.name for run in runs if run not in guided]
    note = f" Without a reference: {', '.join(others)}." if others else ""
    return Part(
        "weights",
        "Weights over training",
        f"As each step of the run had them.{note}",
        [*(chart for chart in charts if chart is not None), table],
    )


def benchmarks(scores: list[Score]) -> Part | None:
    """Task by model, with 95% intervals, best in bold."""
    if not scores:
        return None
    models = list(dict.fromkeys(score.model for score in scores))
    tasks = list(dict.fromkeys(score.task for score in scores))
    table = {(score.task, score.model): score for score in scores}
    rows, bold = [], []
    for task in tasks:
        some = next(table[task, model] for model in models if (task, model) in table)
        details = ", ".join(
            text for text in (some.metric, some.filter, f"{some.shots} shots" if some.shots else "") if text
        )
        cells, signed = [], []
        for model in models:
            score = table.get((task, model))
            cells.append("–" if score is None else show_score(score.metric, score.score, score.half))
            signed.append(None if score is None else score.score if score.higher_is_better else -score.score)
        bold += _best_cells(signed, row=len(rows))
        rows.append([some.column or task, details, "–" if some.items is None else str(some.items), *cells])
    # Shares only: bits per byte and accuracy have no mean.
    complete = [
        task
        for task in tasks
        if all((task, model) in table for model in models)
        and table[task, models[0]].higher_is_better
        and table[task, models[0]].metric not in NO_SHARE
    ]
    if len(complete) > 1:
        means = [sum(table[task, model].score for task in complete) / len(complete) for model in models]
        bold += _best_cells(means, row=len(rows))
        rows.append([f"mean of {len(complete)}", "", "", *(f"{100 * mean:.1f}" for mean in means)])
    note = "Percent, where the metric is a share of the items. ± is half of the 95% interval (1.96 standard errors). "
    note += "Best in bold; whether a difference is more than chance says remit evaluate compare."
    return Part(
        "benchmarks",
        "Benchmarks",
        f"{len(tasks)} tasks, {len(models)} models.",
        [Table(["task", "metric", "items", *models], rows, bold=bold, note=note)],
    )


def _best_cells(values: Sequence[float | None], *, row: int) -> list[list[int]]:
    """Cells of the highest of a row's values, all that share it; none where all of them do."""
    known = {value for value in values if value is not None}
    if len(known) < 2:
        return []
    return [[row, 3 + column] for column, value in enumerate(values) if value == max(known)]


def throughput(runs: list[Run]) -> Part:
    """Speed, and what the reference took of it."""
    rows = []
    for run in runs:
        seconds = [value for value in run.column("step_seconds")[1:] if value is not None]
        reference = [value or 0.0 for value in run.column("reference_seconds")[1:]]
        speeds = sorted(value for value in run.column("tokens_per_second")[1:] if value is not None)
        mfu = [value for value in run.column("mfu") if value is not None]
        rows.append(
            [
                run.name,
                str(run.ranks),
                format_count(speeds[len(speeds) // 2]) if speeds else "–",
                number(sum(seconds) / len(seconds), 3) if seconds else "–",
                f"{100 * sum(reference) / sum(seconds):.1f}%" if seconds and sum(seconds) else "–",
                f"{100 * sum(mfu) / len(mfu):.1f}%" if mfu else "–",
            ]
        )
    table = Table(
        ["run", "ranks", "tokens/s, median", "seconds a step, mean", "the reference's share", "MFU"],
        rows,
        note="Without the first step. The reference's share is the part of a step in which it scored and the student "
        "waited.",
    )
    chart = _curve(runs, "tokens_per_second", "Throughput", "tokens/s")
    return Part("throughput", "Throughput", "Of the whole job.", [*([chart] if chart else []), table])


def effective_time(runs: list[Run]) -> Part | None:
    """Running time by cause."""
    rows = []
    for run in runs:
        wall = run.wall_time
        if wall is None:
            continue
        shares = [f"{100 * wall.causes[cause] / wall.total:.1f}%" if wall.total else "–" for cause in _causes(runs)]
        starts = f"{len(wall.resumed_at)}"
        resumed = ", ".join(str(step) for step in wall.resumed_at if step) or "–"
        rows.append([run.name, format_duration(wall.total), *shares, starts, resumed, format_duration(wall.stopped)])
    if not rows:
        return None
    columns = ["run", "running", *_causes(runs).values(), "starts", "resumed at step", "stopped between"]
    note = "From the log of rank 0 and TensorBoard's times; before a process's first line (imports) nothing is known."
    if any(run.wall_time and len(run.wall_time.resumed_at) > 1 for run in runs):
        note += " What a killed process did after its last record is not known either: lost is a lower bound."
    return Part("time", "Effective training time", "Where the running time went.", [Table(columns, rows, note=note)])


def time_bars(runs: list[Run]) -> str:
    """The same as bars, for the page."""
    rows = []
    for run in runs:
        wall = run.wall_time
        if wall is None or not wall.total:
            continue
        pieces = "".join(
            f'<span class="b{number}" style="flex:{wall.causes[cause]:.2f}" title="{label}: '
            f'{format_duration(wall.causes[cause])}"></span>'
            for number, (cause, label) in enumerate(_causes(runs).items())
            if wall.causes[cause] > 0.002 * wall.total
        )
        rows.append(f'<span>{escape(run.name)}</span><div class="share">{pieces}</div>')
    if not rows:
        return ""
    legend = "".join(
        f'<li><span class="chip c{number}"></span>{label}</li>' for number, label in enumerate(_causes(runs).values())
    )
    return f'<ul class="legend">{legend}</ul><div class="shares">{"".join(rows)}</div>'


def reproduce(runs: list[Run], evaluations: Sequence[str] = ()) -> Part:
    """Commands, and what computed; the configurations follow in the page.

    Args:
        runs: of the report.
        evaluations: command lines of the scores in it.
    """
    lines = []
    for run in runs:
        config = run.path / "config.yaml"
        lines.append(
            f"remit train {shlex.quote(str(config))} run_dir=NEW_DIRECTORY"
            + (f" --nproc {run.ranks}" if run.ranks > 1 else "")
        )
    blocks: list[Block] = [Text(line) for line in (*lines, *evaluations)]
    sources = []
    for run in runs:
        reference = (run.config.get("reference") or {}).get("checkpoint")
        begins = run.config.get("init") or "from scratch"
        seed = str(run.config.get("seed", "–"))
        sources.append([run.name, str(begins), str(reference or "none"), seed, run.made_with or "–"])
    blocks.append(Table(["run", "begins with", "reference", "seed", "made with"], sources))
    summary = "config.yaml of each run is resolved: it says every value. On the same layout the same numbers come out."
    return Part("reproduce", "How to reproduce it", summary, blocks)
