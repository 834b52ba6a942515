"""Score against tokens and device hours, and how much sooner a run reaches the baseline's score (Figures 1a, 16)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.analysis.parts import Chart, Part, Series, Table, Text, number, write_analysis
from remit_megatron.analysis.results import Z_95, Score, read_results
from remit_megatron.analysis.runs import Run, at_step, placed, read_runs, smoothed
from remit_megatron.runtime.errors import UserError

_SMOOTHING = 0.05  # of the steps of a run, for a loss that is measured on other samples in each step


@dataclass(frozen=True)
class Curve:
    """Score of a run over its course."""

    run: str
    steps: list[int]
    tokens: list[float]
    hours: list[float]
    score: list[float]
    error: list[float]


def efficiency(
    *, runs: list[str], baseline: str | None, results: list[str], task: str | None, output: Path
) -> dict[str, Any]:
    """Writes efficiency.json, efficiency.png, efficiency.part.json.

    Scores are those of ``results`` (``remit evaluate`` of the runs' checkpoints): of ``task``, or the mean of the tasks
    that every model has. Without results it is the validation loss, or the smoothed training loss of runs that have
    fewer than two validations.

    Raises:
        UserError: a run or a file cannot be read, or no score belongs to a run.
    """
    found = read_runs(runs)
    names = [run.name for run in found]
    base = found[0]
    if baseline is not None:
        matching = [run for run in found if run.name == baseline or run.path.absolute() == Path(baseline).absolute()]
        if not matching:
            raise UserError("--baseline", baseline, f"one of the runs: {', '.join(names)}")
        base = matching[0]
    if results:
        curves, label, higher = _from_results(found, read_results(results), task)
    else:
        curves, label = _from_losses(found)
        higher = False
    if base.name not in {curve.run for curve in curves}:
        raise UserError("--baseline", f"no score of {base.name}", "results of its checkpoints")
    goal_curve = next(curve for curve in curves if curve.run == base.name)
    goal = goal_curve.score[-1]
    rows = [_row(curve, goal_curve, goal, higher=higher) for curve in curves]
    data = {"score": label, "higher_is_better": higher, "baseline": base.name, "goal": goal, "runs": rows}
    data["curves"] = [vars(curve) for curve in curves]
    write_analysis(output, _part(curves, rows, label, base.name, goal), data)
    return data


def _from_results(runs: list[Run], scores: list[Score], task: str | None) -> tuple[list[Curve], str, bool]:
    tasks_of: dict[str, dict[str, Score]] = {}
    for score in scores:
        tasks_of.setdefault(score.model, {})[score.task] = score
    common = sorted(set.intersection(*(set(tasks) for tasks in tasks_of.values())))
    if task is not None:
        if task not in common:
            raise UserError("--task", task, f"a task that every model has: {', '.join(common) or 'there is none'}")
        common = [task]
    if not common:
        raise UserError("--results", "no task that every model has", "results of the same suite")
    directions = {score.higher_is_better for score in scores if score.task in common}
    if len(directions) > 1:
        raise UserError("--results", "tasks where more is better and tasks where less is", "one kind, or --task")
    paths = {score.model: score.path for score in scores}
    points: dict[str, list[tuple[int, float, float, float, float]]] = {run.name: [] for run in runs}
    for model, tasks in tasks_of.items():
        place = placed(paths[model], runs) or placed(model, runs)
        if place is None:
            continue
        run, step = place
        tokens, hours = at_step(run, run.tokens, step), at_step(run, run.device_hours, step)
        if tokens is None or hours is None:
            raise UserError("--results", f"{model}, step {step}", f"a step of {run.name}")
        value = sum(tasks[name].score for name in common) / len(common)
        error = math.sqrt(sum((tasks[name].stderr or 0.0) ** 2 for name in common)) / len(common)
        points[run.name].append((step, tokens, hours, value, error))
    curves = [
        Curve(name, *(list(column) for column in zip(*sorted(rows), strict=True)))  # type: ignore[arg-type]
        for name, rows in points.items()
        if rows
    ]
    if not curves:
        expected = "results of checkpoints of the runs (paths into a run directory, or its name)"
        raise UserError("--results", f"models {', '.join(sorted(tasks_of))}", expected)
    label = common[0] if len(common) == 1 else f"mean of {len(common)} tasks"
    return curves, label, directions == {True}


def _from_losses(runs: list[Run]) -> tuple[list[Curve], str]:
    if all(len(run.validation) >= 2 for run in runs):
        return [_validation_curve(run) for run in runs], "validation loss, nats"
    curves = []
    for run in runs:
        window = max(1, round(_SMOOTHING * len(run.metrics)))
        losses = smoothed(run.column("lm_loss"), window)
        kept = [i for i, loss in enumerate(losses) if loss is not None and i + 1 >= window]
        if not kept:
            raise UserError("RUN", f"{run.path} without lm_loss", "a run that trains")
        columns = (
            [int(run.steps[i]) for i in kept],
            [run.tokens[i] for i in kept],
            [run.device_hours[i] for i in kept],
        )
        curves.append(Curve(run.name, *columns, [losses[i] or 0.0 for i in kept], []))
    return curves, "training loss (lm_loss, smoothed), nats"


def _validation_curve(run: Run) -> Curve:
    rows = []
    hours = run.device_hours
    for record in run.validation:
        step, loss = int(record["iteration"]), record.get("lm_loss")
        tokens, spent = at_step(run, run.tokens, step), at_step(run, hours, step)
        if tokens is not None and spent is not None and loss is not None:
            rows.append((step, tokens, spent, float(loss)))
    steps, tokens_of, hours_of, losses = (list(column) for column in zip(*rows, strict=True))
    return Curve(run.name, steps, tokens_of, hours_of, losses, [])


def reached(x: list[float], score: list[float], goal: float, *, higher: bool) -> float | None:
    """Where a curve reaches ``goal`` for the first time, between its points in a straight line; None if never."""
    sign = 1 if higher else -1
    for position, value in enumerate(score):
        if sign * (value - goal) < 0:
            continue
        if position == 0 or value == score[position - 1]:
            return x[position]
        share = (goal - score[position - 1]) / (value - score[position - 1])
        return x[position - 1] + share * (x[position] - x[position - 1])
    return None


def _row(curve: Curve, base: Curve, goal: float, *, higher: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"run": curve.run, "final_score": curve.score[-1], "tokens": curve.tokens[-1]}
    row["device_hours"] = curve.hours[-1]
    for name, own, other in (("tokens", curve.tokens, base.tokens), ("device_hours", curve.hours, base.hours)):
        at = reached(own, curve.score, goal, higher=higher)
        # Both for the first time: a curve that wavers would otherwise be faster than itself.
        baseline_at = reached(other, base.score, goal, higher=higher)
        row[f"{name}_to_goal"] = at
        # A first point that is past the goal says only that it was passed before.
        row[f"{name}_speed_up"] = baseline_at / at if at and baseline_at else None
        row["at_first_point"] = at == own[0]
    return row


def _part(curves: list[Curve], rows: list[dict[str, Any]], label: str, baseline: str, goal: float) -> Part:
    charts = []
    for title, x_label, column in (("tokens", "tokens", "tokens"), ("device hours", "device hours", "hours")):
        series = []
        for curve in curves:
            band = [Z_95 * error for error in curve.error]
            low = [value - half for value, half in zip(curve.score, band, strict=False)]
            high = [value + half for value, half in zip(curve.score, band, strict=False)]
            series.append(Series(curve.run, getattr(curve, column), list(curve.score), list(low), list(high)))
        charts.append(Chart(f"Score against {title}", x_label, label, series))
    cells = []
    for row in rows:
        at_least = "≥ " if row["at_first_point"] else ""
        ups = [row["tokens_speed_up"], row["device_hours_speed_up"]]
        speed = ["not reached" if up is None else f"{at_least}{up:.2f} ×" for up in ups]
        cells.append(
            [row["run"], number(row["final_score"]), number(row["tokens"]), number(row["device_hours"]), *speed]
        )
    table = Table(
        ["run", "last score", "tokens", "device hours", "speed-up in tokens", "speed-up in device hours"],
        cells,
        note=f"Speed-up: what {baseline} took to its last score ({number(goal)}) over what the run took, each to the "
        "first time there.",
    )
    hours = Text(
        "Device hours are those of the steps that count, over all ranks; time lost or spent on saving is not in."
    )
    return Part("efficiency", "Score for tokens and hours", f"Score: {label}.", [*charts, table, hours])
