"""Curves of post-training (Figures 13, 14): from runs of ``remit posttrain``, TRL's trainer_state.json or JSON lines,
the seeds of an arm as one."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from remit_megatron.analysis.parts import Chart, Part, Series, Table, number, write_analysis
from remit_megatron.analysis.runs import read_records, smoothed
from remit_megatron.runtime.errors import UserError

# Looked for in this order where no metric is named.
_METRICS = ("reward_mean", "reward", "eval_accuracy", "accuracy", "rewards/accuracies", "eval_loss", "loss")
_STEP_KEYS = ("step", "iteration", "global_step")
_EXPECTED = (
    "NAME=PATH[,PATH…]; a path is a run of remit posttrain, a trainer_state.json, a folder of a TRL run, or JSON lines "
    "with step"
)


def posttrain(*, arms: list[str], metric: str | None, window: int, output: Path) -> dict[str, Any]:
    """Writes posttrain.json, posttrain.png, posttrain.part.json.

    Args:
        arms: ``NAME=PATH[,PATH…]``; the paths are seeds of one arm.
        metric: which figure of the log; the first of a few common ones by default.
        window: logged values that one point is the mean of.

    Raises:
        UserError: a file cannot be read, or has not the metric.
    """
    if window < 1:
        raise UserError("--window", window, "at least 1")
    logs = [(name, [(path, read_log(path)) for path in paths]) for name, paths in map(_arm, arms)]
    everything = [log for _, seeds in logs for _, log in seeds]
    if metric is None:
        metric = next((name for name in _METRICS if all(any(name in r for r in log) for log in everything)), None)
        if metric is None:
            raise UserError(
                "--metric", "none", f"a figure that every log has; none has {', '.join(_METRICS)} in common"
            )
    curves = []
    for name, seeds in logs:
        rows = [_curve(log, metric, path, window) for path, log in seeds]
        curves.append({"arm": name, "seeds": len(seeds), **_mean(rows)})
    data = {"metric": metric, "window": window, "arms": curves}
    write_analysis(output, _part(data), data)
    return data


def _arm(text: str) -> tuple[str, list[Path]]:
    name, sign, paths = text.partition("=")
    if not sign or not name or not paths:
        raise UserError("ARM", text, _EXPECTED)
    return name, [Path(path) for path in paths.split(",")]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records with a step, in their order.

    Raises:
        UserError: there are none.
    """
    file = path
    if (path / "metrics.jsonl").is_file():
        file = path / "metrics.jsonl"
    elif path.is_dir():
        states = [*path.glob("trainer_state.json"), *path.glob("checkpoint-*/trainer_state.json")]
        if not states:
            raise UserError("ARM", f"{path} without a trainer_state.json", _EXPECTED)
        file = max(states, key=lambda state: int((re.search(r"checkpoint-(\d+)", str(state)) or [0, 1 << 60])[1]))
    if not file.is_file():
        raise UserError("ARM", f"no file {file}", _EXPECTED)
    if file.suffix == ".json":
        try:
            records = json.loads(file.read_text())["log_history"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(str(file), f"no log_history ({error})", "a trainer_state.json") from None
    else:
        records = read_records(file)
    found = []
    for record in records:
        step = next((record[key] for key in _STEP_KEYS if isinstance(record.get(key), int | float)), None)
        if step is not None:
            found.append({**record, "step": step})
    if not found:
        raise UserError(str(file), "no line with a step", _EXPECTED)
    return found


def _curve(log: list[dict[str, Any]], metric: str, path: Path, window: int) -> dict[float, float]:
    rows = [(float(r["step"]), float(r[metric])) for r in log if isinstance(r.get(metric), int | float)]
    rows = [(step, value) for step, value in rows if math.isfinite(value)]
    if not rows:
        names = sorted({key for record in log for key, value in record.items() if isinstance(value, int | float)})
        raise UserError("--metric", f"no {metric} in {path}", f"one of {', '.join(names)}")
    means = smoothed([value for _, value in rows], window)
    return {step: value for (step, _), value in zip(rows, means, strict=True) if value is not None}


def _mean(rows: list[dict[float, float]]) -> dict[str, Any]:
    """Means over the seeds at the steps that all have, with the standard error where there are several."""
    steps = sorted(set.intersection(*(set(row) for row in rows)))
    columns = [[row[step] for row in rows] for step in steps]
    errors = [statistics.stdev(c) / math.sqrt(len(c)) if len(c) > 1 else None for c in columns]
    return {"step": steps, "mean": [statistics.fmean(column) for column in columns], "stderr": errors}


def _part(data: dict[str, Any]) -> Part:
    series, rows = [], []
    for arm in data["arms"]:
        low = [m - e for m, e in zip(arm["mean"], arm["stderr"], strict=True) if e is not None]
        high = [m + e for m, e in zip(arm["mean"], arm["stderr"], strict=True) if e is not None]
        series.append(Series(arm["arm"], arm["step"], list(arm["mean"]), list(low), list(high)))
        if arm["step"]:
            last = number(arm["mean"][-1])
            error = arm["stderr"][-1]
            rows.append(
                [
                    arm["arm"],
                    str(arm["seeds"]),
                    number(arm["mean"][0]),
                    last if error is None else f"{last} ± {number(error, 2)}",
                    f"{arm['step'][-1]:g}",
                ]
            )
    metric = data["metric"]
    chart = Chart(f"{metric} over post-training", "step", metric, series)
    table = Table(["arm", "seeds", "first", "last", "steps"], rows, note="± and bands: standard error over seeds.")
    return Part("posttrain", "Post-training", f"{metric}, means of {data['window']} logged values.", [chart, table])
