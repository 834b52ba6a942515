"""What a flywheel ends with: ``results.json`` and ``report.html``, from what its stages left behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remit_megatron import __version__
from remit_megatron.analysis.parts import Block, Chart, Part, Series, Table, Text, finite, number
from remit_megatron.analysis.report import sections
from remit_megatron.analysis.report.build import fitted
from remit_megatron.analysis.report.page import Page
from remit_megatron.analysis.results import Score, read_results
from remit_megatron.analysis.runs import Run, read_records, read_runs
from remit_megatron.flywheel.kinds import POSTTRAIN, RUN, result_place
from remit_megatron.flywheel.plan import SHORT, Plan, Planned
from remit_megatron.flywheel.records import read_record
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.progress import format_duration

RESULTS = "results.json"
REPORT = "report.html"
# What a curve of post-training shows, by kind; a log may lack it.
_FIGURES = {"sft": "loss", "dpo": "loss", "rlvr": "reward_mean"}


def write_summary(plan: Plan) -> list[Path]:
    """Writes both files from the stages that are done; returns them."""
    scores = list(_scores(plan))
    curves = list(_posttrain_curves(plan))
    content = {
        "seed": plan.config.seed,
        "rounds": plan.config.rounds,
        "objectives": list(plan.config.objectives),
        "stages": {planned.stage.id: _stage(planned) for planned in _done(plan)},
        "benchmarks": [_benchmark(planned, score) for planned, score in scores],
        "posttrain": [{**about, "first": series.y[0], "last": series.y[-1]} for about, series in curves],
        "checks": [
            {"round": planned.stage.round, "stage": planned.stage.id, **_check(planned)}
            for planned in _done(plan, "check")
        ],
    }
    write_atomic(plan.run_dir / RESULTS, json.dumps(finite(content), indent=1) + "\n")
    write_atomic(plan.run_dir / REPORT, fitted(_page(plan, scores, curves)))
    return [plan.run_dir / RESULTS, plan.run_dir / REPORT]


def _done(plan: Plan, *kinds: str) -> Iterator[Planned]:
    for planned in plan.planned.values():
        if kinds and planned.stage.kind not in kinds:
            continue
        record = read_record(planned.directory)
        if record is not None and record.status == "done":
            yield planned


def _stage(planned: Planned) -> dict[str, Any]:
    record = read_record(planned.directory)
    assert record is not None
    stage = planned.stage
    return {
        "round": stage.round,
        "objective": stage.objective,
        "kind": stage.kind,
        "key": planned.key,
        "directory": planned.directory.name,
        "seconds": round(record.seconds, 3),
        "starts": len(record.starts),
    }


def _scores(plan: Plan) -> Iterator[tuple[Planned, Score]]:
    for planned in _done(plan, "evaluate"):
        for score in read_results([str(result_place(planned.stage, planned.directory))]):
            yield planned, score


def _benchmark(planned: Planned, score: Score) -> dict[str, Any]:
    half = score.half
    return {
        "round": planned.stage.round,
        "objective": planned.stage.objective,
        "stage": planned.stage.id,
        "model": score.model,
        "task": score.task,
        "score": score.score,
        "stderr": score.stderr,
        "interval": None if half is None else [score.score - half, score.score + half],
        "metric": score.metric,
        "filter": score.filter,
        "shots": score.shots,
        "items": score.items,
    }


def _check(planned: Planned) -> dict[str, Any]:
    found = json.loads(result_place(planned.stage, planned.directory).read_text(encoding="utf-8"))
    return {"text": found["text"], "verdict": found["verdict"]}


def _posttrain_curves(plan: Plan) -> Iterator[tuple[dict[str, Any], Series]]:
    for planned in _done(plan, *POSTTRAIN):
        figure = _FIGURES[planned.stage.kind]
        records = read_records(planned.directory / RUN / "metrics.jsonl")
        points = [(float(record["iteration"]), record[figure]) for record in records if figure in record]
        points = [(step, float(value)) for step, value in points if isinstance(value, int | float)]
        if points:
            about = {"round": planned.stage.round, "objective": planned.stage.objective, "stage": planned.stage.id}
            series = Series(planned.stage.id, [step for step, _ in points], [value for _, value in points])
            yield {**about, "kind": planned.stage.kind, "figure": figure}, series


def _page(plan: Plan, scores: list[tuple[Planned, Score]], curves: list[tuple[dict[str, Any], Series]]) -> Page:
    runs = _runs(plan)
    several = plan.config.rounds > 1
    labelled = [
        dataclasses.replace(score, model=f"round {planned.stage.round}: {score.model}") if several else score
        for planned, score in scores
    ]
    parts: list[Part | None] = [_stages_part(plan), _checks_part(plan), sections.benchmarks(labelled)]
    if runs:
        parts += [sections.overview(runs), sections.configuration(runs), sections.curves(runs), sections.weights(runs)]
    parts += [_posttrain_part(curves), _reproduce_part(plan)]
    title = plan.run_dir.name
    return Page(title, f"remit flywheel {__version__}", [part for part in parts if part], [run.name for run in runs])


def _runs(plan: Plan) -> list[Run]:
    """The training runs, each once: rounds may share one."""
    places = {}
    for planned in _done(plan, "train"):
        path = planned.directory / RUN
        if any(read_records(path / "metrics.jsonl")):
            places.setdefault(path, planned.stage.id)
    runs = read_runs([str(path) for path in places]) if places else []
    for run, name in zip(runs, places.values(), strict=True):
        run.name = name
    return runs


def _stages_part(plan: Plan) -> Part:
    standing, rows = plan.standing(), []
    for id_, planned in plan.planned.items():
        record = standing[id_].record
        time = format_duration(record.seconds) if record else "–"
        rows.append([id_, planned.stage.kind, standing[id_].status, time, planned.key[:SHORT]])
    done = sum(row[2] == "done" for row in rows)
    table = Table(
        ["stage", "kind", "status", "time", "key"], rows, note="Stages of one key are the same work, done once."
    )
    return Part("stages", "Stages", f"{done} of {len(rows)} stages done, {plan.config.rounds} rounds.", [table])


def _checks_part(plan: Plan) -> Part | None:
    rows = [[planned.stage.id, str(_check(planned)["verdict"])] for planned in _done(plan, "check")]
    if not rows:
        return None
    table = Table(["stage", "verdict"], rows)
    return Part("checks", "References", "What following each reference promised, before it was followed.", [table])


def _posttrain_part(curves: list[tuple[dict[str, Any], Series]]) -> Part | None:
    blocks: list[Block] = []
    rows = []
    for figure, title in (("reward_mean", "Reward"), ("loss", "Loss")):
        series = [one for about, one in curves if about["figure"] == figure]
        if series:
            blocks.append(Chart(f"{title} over post-training", "step", figure, series))
        rows += [[one.name, figure, number(one.y[0]), number(one.y[-1]), f"{one.x[-1]:g}"] for one in series]
    if not blocks:
        return None
    blocks.append(Table(["stage", "figure", "first", "last", "steps"], rows))
    return Part("posttrain", "Post-training", "Every step as its run logged it.", blocks)


def _reproduce_part(plan: Plan) -> Part:
    command = f"remit flywheel {plan.run_dir / 'config.yaml'} run_dir=NEW_DIRECTORY"
    text = "config.yaml is the flywheel as it ran; each stage's stage.json says what its key is the digest of."
    return Part("reproduce", "How to reproduce it", text, [Text(command)])
