"""Gradient norms of runs side by side: with and without the clip of the weights, RHO-1, plain training (Figure 8)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from remit_megatron.analysis.parts import Chart, Part, Series, Table, number, write_analysis
from remit_megatron.analysis.runs import Run, read_runs

_SPIKE = 3.0  # times the median of the steps around it
_AROUND = 50


def gradients(*, runs: list[str], output: Path) -> dict[str, Any]:
    """Writes gradients.json, gradients.png, gradients.part.json from the runs' metrics.jsonl.

    Raises:
        UserError: a path is no run.
    """
    found = read_runs(runs)
    data = {"runs": [_describe(run) for run in found]}
    write_analysis(output, _part(found, data["runs"]), data)
    return data


def _describe(run: Run) -> dict[str, Any]:
    norms = run.column("grad_norm")
    values = sorted(value for value in norms if value is not None)
    clip = (run.config.get("megatron") or {}).get("clip_grad")
    return {
        "run": run.name,
        "objective": run.objective,
        "clip_grad": clip,
        "steps": len(values),
        "median": statistics.median(values) if values else None,
        "p99": values[min(len(values) - 1, int(0.99 * len(values)))] if values else None,
        "maximum": values[-1] if values else None,
        "spikes": spikes(norms),
        "above_clip_grad": sum(value > clip for value in values) / len(values) if values and clip else None,
        "consumed_tokens": run.tokens,
        "grad_norm": norms,
    }


def spikes(norms: list[float | None]) -> int:
    """Steps whose norm is above three times the median of the fifty steps before it."""
    count = 0
    for position, value in enumerate(norms):
        before = [v for v in norms[max(0, position - _AROUND) : position] if v is not None]
        if value is not None and len(before) >= 10 and value > _SPIKE * statistics.median(before):
            count += 1
    return count


def _part(runs: list[Run], rows: list[dict[str, Any]]) -> Part:
    series = [Series(row["run"], row["consumed_tokens"], row["grad_norm"]) for row in rows]
    table = Table(
        [
            "run",
            "objective",
            "median",
            "99th percentile",
            "largest",
            f"steps above {_SPIKE:g} × the median before",
            "clipped",
        ],
        [
            [
                row["run"],
                row["objective"],
                number(row["median"]),
                number(row["p99"]),
                number(row["maximum"]),
                str(row["spikes"]),
                "–" if row["above_clip_grad"] is None else f"{100 * row['above_clip_grad']:.1f}%",
            ]
            for row in rows
        ],
        note="Norms before clip_grad; “clipped” is the share of the steps above it.",
    )
    chart = Chart("Gradient norm", "tokens", "norm before clipping", series, log_y=True)
    return Part("gradients", "Gradient norms", f"{len(runs)} runs, every step.", [chart, table])
