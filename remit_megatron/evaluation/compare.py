"""``remit evaluate compare``: which of two models is better, item by item, from what an evaluation kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.evaluation import results
from remit_megatron.evaluation.statistics import (
    FEWEST_CLUSTERS,
    Paired,
    Verdict,
    compare_paired,
    compare_seeds,
    holm,
    mean_of_tasks,
)
from remit_megatron.runtime.errors import UserError

_EXPECTED = "[NAME=]DIR[,DIR…], each an output of remit evaluate of one model, or DIR:MODEL"
# Of a result, what must be the same in all that are compared and say it.
_SAME = ("metric", "filter", "shots", "items", "chat_template", "generation")


@dataclass(frozen=True)
class Evaluated:
    """One model in one output directory."""

    folder: Path
    model: str
    tasks: dict[str, dict[str, Any]]

    def samples(self, task: str) -> list[dict[str, Any]]:
        """The kept items of a task."""
        path = results.samples_path(self.folder, self.model, task)
        if not path.is_file():
            raise UserError(str(path), "no file", "the samples that remit evaluate wrote")
        return results.read_samples(path)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a model, or the same recipe with several seeds."""

    name: str
    runs: tuple[Evaluated, ...]

    def score(self, task: str) -> float:
        """Mean over the seeds."""
        return math.fsum(run.tasks[task]["score"] for run in self.runs) / len(self.runs)


def find_sides(words: list[str]) -> list[Side]:
    """What a command line compares. One directory with several models compares these."""
    sides = []
    for word in words:
        name, equals, rest = word.partition("=")
        given = bool(equals) and not Path(word).exists()
        runs = [run for place in (rest if given else word).split(",") for run in _evaluated(place)]
        if len(words) == 1 and not given and "," not in word:
            return [Side(run.model, (run,)) for run in runs]
        places = (rest if given else word).split(",")
        if len(runs) != len(places):
            names = ", ".join(run.model for run in runs)
            raise UserError(word, f"{len(runs)} models in it ({names})", _EXPECTED)
        sides.append(Side(name if given else runs[0].model, tuple(runs)))
    for number, side in enumerate(sides):
        same = [other for other in sides[:number] if other.name == side.name]
        if same:
            raise UserError("compare", f"two sides named {side.name}", "names: A=DIR B=DIR")
    if len(sides) < 2:
        raise UserError("compare", f"{len(sides)} side(s)", f"two or more of {_EXPECTED}")
    return sides


def _evaluated(place: str) -> list[Evaluated]:
    folder, colon, model = place.rpartition(":")
    path = Path(folder) if colon and not Path(place).is_dir() else Path(place)
    content, _ = results.read_output(path)
    if not content:
        raise UserError(place, "no results.json", _EXPECTED)
    if path != Path(place):
        if model not in content:
            raise UserError(place, f"no model {model}", f"one of {', '.join(content)}")
        content = {model: content[model]}
    return [Evaluated(path, name, tasks) for name, tasks in content.items()]


def compare(sides: list[Side], *, output: Path | None) -> str:
    """Compares the first side with each of the others.

    Args:
        output: gets compare.json and compare.md, or None.

    Returns:
        Markdown: the table of scores, then a table per comparison.
    """
    if len(sides) < 2:
        raise UserError("compare", "1 model", f"two or more of {_EXPECTED}")
    runs = [run for side in sides for run in side.runs]
    first = runs[0]
    tasks = [task for task in first.tasks if all(task in run.tasks for run in runs)]
    if not tasks:
        raise UserError("compare", "no task that all have", "results of the same suite")
    left_out = sorted({task for run in runs for task in run.tasks} - set(tasks))
    for run in runs[1:]:
        for task in tasks:
            for name in _SAME:
                found, expected = run.tasks[task].get(name), first.tasks[task].get(name)
                if found != expected and None not in (found, expected):
                    raise UserError(
                        f"{run.folder} {run.model} {task}: {name}", found, f"{expected}, as in {first.folder}"
                    )
    parts = [score_table(sides, tasks)]
    if left_out:
        parts.append(f"Not in all of them, and left out: {', '.join(left_out)}.\n")
    dtypes = {str(run.tasks[task]["dtype"]): None for run in runs for task in tasks if run.tasks[task].get("dtype")}
    if len(dtypes) > 1:
        parts.append(f"Not all computed in the same precision: {', '.join(dtypes)}.\n")
    found = {}
    for other in sides[1:]:
        verdicts = {task: _compare_task(sides[0], other, task) for task in tasks}
        corrected = dict(zip(tasks, holm([verdict.p for _, verdict in verdicts.values()]), strict=True))
        seeds = _seeds(sides[0], other, tasks)
        parts.append(_show(sides[0], other, verdicts, corrected, seeds))
        found[other.name] = {
            "against": sides[0].name,
            "items": {
                task: {**dataclasses.asdict(verdict), "p_holm": corrected[task]}
                for task, (_, verdict) in verdicts.items()
            },
            "mean": _mean(verdicts),
            "seeds": seeds,
        }
    text = "\n".join(parts)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        results.write_json(output / "compare.json", found)
        (output / "compare.md").write_text(text, encoding="utf-8")
    return text


def score_table(sides: list[Side], tasks: list[str]) -> str:
    """The paper's Table 1: a row per model, a column per task, their mean last; the best of each column in bold."""
    entries = [sides[0].runs[0].tasks[task] for task in tasks]
    columns: list[list[float]] = [[side.score(task) for side in sides] for task in tasks]
    shown = [
        [results.show_score(entry["metric"], score) for score in column]
        for entry, column in zip(entries, columns, strict=True)
    ]
    better = [entry["higher_is_better"] for entry in entries]
    if len(tasks) > 1 and not any(entry["metric"] in results.NO_SHARE for entry in entries):
        means = [math.fsum(column[i] for column in columns) / len(columns) for i in range(len(sides))]
        columns.append(means)
        shown.append([f"{100 * mean:.1f}" for mean in means])
        better.append(True)
    for column, texts, higher in zip(columns, shown, better, strict=True):
        best = (max if higher else min)(column)
        texts[:] = [f"**{text}**" if score == best else text for score, text in zip(column, texts, strict=True)]
    head = ["model", *(entry["column"] for entry in entries), *(["mean"] if len(columns) > len(tasks) else [])]
    rows = [[side.name + _times(side), *(texts[i] for texts in shown)] for i, side in enumerate(sides)]
    shots = ["shots", *(str(entry["shots"]) for entry in entries), *([""] if len(columns) > len(tasks) else [])]
    return "\n".join(results.table(head, [*rows, shots])) + "\n"


def _times(side: Side) -> str:
    return f" (mean of {len(side.runs)} seeds)" if len(side.runs) > 1 else ""


def _compare_task(a: Side, b: Side, task: str) -> tuple[Paired, Verdict]:
    pairs = pair(a, b, task)
    return pairs, compare_paired(pairs)


def pair(a: Side, b: Side, task: str) -> Paired:
    """The scores of two sides on the same items; of several seeds, each item's mean over them.

    Raises:
        UserError: they are not about the same items.
    """
    units = [_units([run.samples(task) for run in side.runs], task) for side in (a, b)]
    if units[0].keys() != units[1].keys():
        differ = sorted(units[0].keys() ^ units[1].keys())[:3]
        raise UserError(f"{task}: items", f"{len(differ)} or more in one only, as {differ[0]}", "the same items")
    if wrong := next((key for key in units[0] if units[0][key].identity != units[1][key].identity), None):
        raise UserError(f"{task}: item {wrong}", "another content than in the other", "the same items")
    # Through a chat template the same question is another prompt for another model.
    chat = a.runs[0].tasks[task].get("chat_template")
    if wrong := next((key for key in units[0] if not chat and units[0][key].prompt != units[1][key].prompt), None):
        raise UserError(f"{task}: item {wrong}", "another prompt than in the other", "the same prompts")
    keys = sorted(units[0])
    subtasks = sorted({key[0] for key in keys})
    score = [np.array([side[key].total for key in keys]) for side in units]
    weights = np.array([units[0][key].weight for key in keys])
    unit = "items" if np.all(weights == 1) else "prompts" if any(units[0][key].several for key in keys) else "documents"
    if len(subtasks) >= FEWEST_CLUSTERS:
        place = np.searchsorted(subtasks, [key[0] for key in keys])

        def of_subtasks(values: np.ndarray) -> np.ndarray:
            return np.bincount(place, weights=values, minlength=len(subtasks))

        return Paired(of_subtasks(score[0]), of_subtasks(score[1]), of_subtasks(weights), "subtasks")
    return Paired(score[0], score[1], weights, unit)


@dataclass
class _Unit:
    total: float
    weight: float
    identity: str
    prompt: str | None
    several: bool


def _units(seeds: list[list[dict[str, Any]]], task: str) -> dict[tuple[str, int], _Unit]:
    """(subtask, item) -> its score, summed over what it counts."""
    found: dict[tuple[str, int], _Unit] = {}
    for lines in seeds:
        for line in lines:
            key = (line.get("subtask") or "", line["doc_id"])
            scores = line.get("scores")
            weight = float(len(scores)) if scores else float(line.get("weight", 1.0))
            unit = found.setdefault(key, _Unit(0.0, weight, line["doc_hash"], line.get("prompt_hash"), bool(scores)))
            if unit.identity != line["doc_hash"] or unit.weight != weight:
                raise UserError(f"{task}: item {key}", "another content for another seed", "the same items")
            unit.total += line["score"] * weight / len(seeds)
    counts = {len(lines) for lines in seeds}
    if counts != {len(found)}:
        raise UserError(f"{task}: items", f"{sorted(counts)} in the seeds", "the same items, each once")
    return found


def _mean(verdicts: dict[str, tuple[Paired, Verdict]]) -> dict[str, float] | None:
    if len(verdicts) < 2:
        return None
    value, low, high = mean_of_tasks([pairs for pairs, _ in verdicts.values()])
    return {"difference": value, "low": low, "high": high}


def _seeds(a: Side, b: Side, tasks: list[str]) -> dict[str, dict[str, float]] | None:
    """The seed level: scores of whole trainings, paired by their place in the lists."""
    if len(a.runs) == len(b.runs) == 1:
        return None
    if len(a.runs) != len(b.runs):
        raise UserError(
            "compare", f"{len(a.runs)} and {len(b.runs)} seeds", "the same seeds on both sides, in one order"
        )
    of_run: dict[str, Callable[[Evaluated], float]] = {
        task: (lambda run, task=task: run.tasks[task]["score"]) for task in tasks
    }
    if len(tasks) > 1:
        of_run["mean"] = lambda run: math.fsum(run.tasks[task]["score"] for task in tasks) / len(tasks)
    found = {}
    for name, score in of_run.items():
        values = compare_seeds([score(run) for run in a.runs], [score(run) for run in b.runs])
        found[name] = dict(zip(("difference", "low", "high", "p"), values, strict=True))
    corrected = holm([found[task]["p"] for task in tasks])
    for task, value in zip(tasks, corrected, strict=True):
        found[task]["p_holm"] = value
    return found


def _show(
    a: Side,
    b: Side,
    verdicts: dict[str, tuple[Paired, Verdict]],
    corrected: dict[str, float],
    seeds: dict[str, dict[str, float]] | None,
) -> str:
    entries = a.runs[0].tasks
    rows = []
    for task, (_, verdict) in verdicts.items():
        interval = _interval(entries[task]["metric"], verdict.difference, verdict.low, verdict.high)
        rows.append(
            [entries[task]["column"], interval, _p(verdict.p), _p(corrected[task]), verdict.units, verdict.test]
        )
    if (mean := _mean(verdicts)) and not any(entries[task]["metric"] in results.NO_SHARE for task in verdicts):
        rows.append(["mean of the tasks", _interval("acc", **mean), "", "", "", ""])
    head = ["task", "difference [95%]", "p", "p (Holm)", "over", "test"]
    lines = [f"## {b.name} against {a.name}, on other items", ""]
    lines += results.table(head, rows)
    lines += [
        "",
        "What other items of the same tasks would say of these very models. Training them again is not in it.",
    ]
    if seeds:
        rows = []
        for task, found in seeds.items():
            metric = entries[task]["metric"] if task in entries else "acc"
            interval = _interval(metric, found["difference"], found["low"], found["high"])
            name = entries[task]["column"] if task in entries else "mean of the tasks"
            rows.append([name, interval, _p(found["p"]), _p(found["p_holm"]) if "p_holm" in found else ""])
        lines += ["", f"## {b.name} against {a.name}, trained again", ""]
        lines += results.table(["task", "difference [95%]", "p", "p (Holm)"], rows)
        lines += ["", f"Paired t-test over {len(a.runs)} seeds: what other seeds of both would say on these items."]
    else:
        lines.append(
            "Whether another seed of the training would say the same needs several seeds: A=DIR,DIR B=DIR,DIR."
        )
    return "\n".join(lines) + "\n"


def _interval(metric: str, difference: float, low: float, high: float) -> str:
    factor, digits = (1, 3) if metric in results.NO_SHARE else (100, 1)
    return f"{factor * difference:+.{digits}f} [{factor * low:+.{digits}f}, {factor * high:+.{digits}f}]"


def _p(value: float) -> str:
    return "no spread" if math.isnan(value) else "<0.0001" if value < 0.0001 else f"{value:.4f}"
