"""What an evaluation leaves behind: results.json, results.md, details.json, and every item of every task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import write_atomic

RESULTS = "results.json"
DETAILS = "details.json"
TABLE = "results.md"
# Metrics that are no share of the items; everything else is shown in percent.
NO_SHARE = {"word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte", "bleu", "chrf", "ter"}
LOWER_IS_BETTER = {"word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte", "ter", "brier_score"}


def samples_path(output: Path, model: str, task: str) -> Path:
    """``samples/<model>/<task>.jsonl``."""
    return output / "samples" / model / f"{task}.jsonl"


def sample_lines(
    samples: Iterable[dict[str, Any]], *, subtask: str | None, metric: str, filter_name: str
) -> list[dict]:
    """Lines of a samples file from lm-eval's logged samples: those of one filter, in the order of the items.

    A line has ``doc_id``, ``score`` (a number), ``response``; where they apply ``subtask``, ``answer`` (what the filter
    took from the response), ``scores`` (several per item) and ``weight`` (what the item counts); and the hashes of item
    and prompt, by which two files are found to be about the same.
    """
    lines = []
    for sample in samples:
        if sample["filter"] != filter_name:
            continue
        line: dict[str, Any] = {"doc_id": sample["doc_id"]}
        if subtask:
            line["subtask"] = subtask
        line |= _score(sample[metric])
        line |= _response(sample)
        line |= {"target": _plain(sample["target"])}
        line |= {name: sample[name] for name in ("doc_hash", "prompt_hash", "target_hash")}
        line["metrics"] = {name: _plain(sample[name]) for name in sample["metrics"] if name in sample}
        lines.append(line)
    return sorted(lines, key=lambda line: line["doc_id"])


def _score(value: Any) -> dict[str, Any]:
    if isinstance(value, tuple):  # log-likelihood and the bytes or words it is over
        amount, weight = float(value[0]), float(value[1])
        return {"score": -amount / (weight * math.log(2)), "weight": weight}
    if isinstance(value, list):  # IFEval: one for each instruction of a prompt
        scores = [float(part) for part in value]
        return {"score": math.fsum(scores) / max(1, len(scores)), "scores": scores}
    return {"score": float(value)}


def _response(sample: dict[str, Any]) -> dict[str, Any]:
    """The text that the model wrote; of a choice, the one it finds likeliest, and what it gives to each."""
    said = [part[0] if part else None for part in sample["resps"]]
    pairs = [part for part in said if isinstance(part, tuple | list)]
    if said and len(pairs) == len(said):
        likelihoods = [float(part[0]) for part in pairs]
        best = max(range(len(said)), key=likelihoods.__getitem__)
        return {"response": sample["arguments"][best][-1], "loglikelihoods": likelihoods}
    answer = sample["filtered_resps"][0] if sample["filtered_resps"] else None
    return {"response": _plain(said[0] if said else None), "answer": _plain(answer)}


def _plain(value: Any) -> Any:
    """JSON of what a task may hold."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.item() if hasattr(value, "item") else str(value)


def write_samples(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes a samples file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a samples file."""
    # Lines end at line feeds alone: texts may hold the other characters at which `splitlines` cuts.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of ours, or nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_output(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of results.json and of details.json; nothing where they are not there.

    Raises:
        UserError: one of them is another program's: lm-eval has files of these names, too.
    """
    found = []
    for name, is_ours in ((RESULTS, _are_results), (DETAILS, _are_details)):
        try:
            content = read_json(folder / name)
        except ValueError as error:
            raise UserError(str(folder / name), f"no JSON ({error})", "what remit evaluate wrote") from None
        if content and not is_ours(content):
            raise UserError(str(folder / name), "a file of another program", "what remit evaluate wrote")
        found.append(content)
    return found[0], found[1]


def _are_results(content: Any) -> bool:
    tasks = list(content.values()) if isinstance(content, dict) else [None]
    scores = [score for found in tasks if isinstance(found, dict) for score in found.values()]
    needed = {"score", "metric", "filter", "shots", "items", "column"}
    return all(isinstance(found, dict) for found in tasks) and all(
        isinstance(score, dict) and needed <= score.keys() and isinstance(score["score"], int | float)
        for score in scores
    )


def _are_details(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(name), dict) for name in ("setting", "models"))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def show_score(metric: str, score: float, stderr: float | None = None) -> str:
    """``41.2 ± 1.4``: percent, where the metric is a share of the items."""
    factor, digits = (1, 3) if metric in NO_SHARE else (100, 1)
    text = f"{factor * score:.{digits}f}"
    return text if stderr is None or math.isnan(stderr) else f"{text} ± {factor * stderr:.{digits}f}"


def markdown(results: dict[str, dict[str, dict[str, Any]]], *, about: str, skipped: dict[str, str]) -> str:
    """A table with a row per task and a column per model: score, standard error, metric, filter, effective shots.

    Args:
        results: as in results.json.
        about: what stands above the table.
        skipped: tasks that were not run, and why.
    """
    models = list(results)
    tasks = list(dict.fromkeys(task for model in models for task in results[model]))
    rows, notes = [], []
    for task in tasks:
        entry = next(results[model][task] for model in models if task in results[model])
        shots = str(entry["shots"])
        if entry.get("prompt_examples"):
            shots += f" (+{entry['prompt_examples']} in the prompt)"
        scores = []
        for model in models:
            found = results[model].get(task)
            text = show_score(found["metric"], found["score"], found["stderr"]) if found else "-"
            scores.append(text + (f" ({found['cut']} prompts cut)" if found and found["cut"] else ""))
        rows.append([entry["column"], shots, entry["metric"], entry["filter"], str(entry["items"]), *scores])
        if entry.get("note"):
            notes.append(f"- {entry['column']}: {entry['note']}")
    rows += [[task, "", "", "", "", *("not run" for _ in models)] for task in skipped]
    notes += [f"- {task}: {why}" for task, why in skipped.items()]
    head = ["task", "shots", "metric", "filter", "items", *models]
    lines = [about, "", *table(head, rows), "", "± is the standard error over the items."]
    if any(entry["cut"] for model in models for entry in results[model].values()):
        lines.append("Prompts cut: too long for the model; their beginning, the first shots, was left out.")
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, aligned so that it also reads as text."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
