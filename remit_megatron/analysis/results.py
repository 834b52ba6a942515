"""``results.json`` of ``remit evaluate``: scores by model and task."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError

Z_95 = 1.959964  # standard errors on either side of a mean that make its 95% interval


@dataclass(frozen=True)
class Score:
    """One number of one model on one task.

    Attributes:
        column: what tables call the task.
        path: where the model was, by ``details.json`` beside the results; its name where that is not known.
    """

    model: str
    task: str
    score: float
    stderr: float | None
    metric: str
    filter: str
    shots: str
    items: int | None
    higher_is_better: bool = True
    column: str = ""
    path: str = ""

    @property
    def half(self) -> float | None:
        """Half of the 95% interval."""
        return None if self.stderr is None else Z_95 * self.stderr


def read_results(paths: list[str]) -> list[Score]:
    """All scores of result files, in their order; of a model and task that two files have, the later one's.

    Raises:
        UserError: a file is missing, is no JSON, or holds no score.
    """
    found: dict[tuple[str, str], Score] = {}
    for name in paths:
        path = Path(name)
        path = path / "results.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError("--results", f"no file {path}", "results.json of remit evaluate")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(str(path), f"no JSON ({error})", "results.json of remit evaluate") from None
        scores = list(_scores(content, []))
        if not scores:
            raise UserError(str(path), "no score", "per model and task: score, stderr, metric, filter, shots, items")
        homes = _paths(path.with_name("details.json"))
        for score in scores:
            placed = dataclasses.replace(score, path=homes.get(score.model, score.model))
            found[score.model, score.task] = placed
    return list(found.values())


def evaluation_commands(paths: list[str]) -> list[str]:
    """The command lines that made result files, from details.json beside them; of others nothing is known."""
    lines = []
    for name in paths:
        path = Path(name)
        details = (path if path.is_dir() else path.parent) / "details.json"
        try:
            content = json.loads(details.read_text())
            setting, models = content["setting"], content["models"]
            words = ["remit", "evaluate", *(f"{model}={about['path']}" for model, about in models.items())]
            words += ["--suite", str(content.get("suite_file") or setting["suite"])]
            words += ["--chat-template", "yes" if setting["chat_template"] else "no"]
            words += [word for key in ("limit", "data") if setting.get(key) for word in (f"--{key}", str(setting[key]))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        lines.append(shlex.join([*words, "--output", "NEW_DIRECTORY"]))
    return lines


def _paths(details: Path) -> dict[str, str]:
    try:
        return {name: str(about["path"]) for name, about in json.loads(details.read_text())["models"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # it only helps to find the run of a model


def _scores(value: Any, names: list[str]) -> Any:
    """Every object with a score and a metric, named by its own ``model`` and ``task`` or by the keys above it."""
    if isinstance(value, dict):
        if isinstance(value.get("score"), int | float) and "metric" in value:
            model = value.get("model") or (names[-2] if len(names) > 1 else "model")
            task = value.get("task") or (names[-1] if names else "task")
            yield _score(value, str(model), str(task))
            return
        inherited = value.get("model") or value.get("name")
        for key, item in value.items():
            if isinstance(item, dict | list):
                # A key that only groups ("tasks", "results") is no name of a model.
                grouping = key in {"tasks", "results", "models", "scores"}
                below = [*names, *([] if grouping else [key])]
                if grouping and isinstance(inherited, str) and key in {"tasks", "scores"}:
                    below = [*names[:-1], inherited] if names else [inherited]
                yield from _scores(item, below)
    elif isinstance(value, list):
        for item in value:
            yield from _scores(item, names)


def _score(value: dict[str, Any], model: str, task: str) -> Score:
    stderr = value.get("stderr")
    items = value.get("items")
    if not isinstance(stderr, int | float) or not math.isfinite(stderr):
        stderr = None
    return Score(
        model=model,
        task=task,
        score=float(value["score"]),
        stderr=None if stderr is None else float(stderr),
        metric=str(value["metric"]),
        filter=str(value.get("filter") or ""),
        shots="" if value.get("shots") is None else str(value["shots"]),
        items=int(items) if isinstance(items, int | float) else None,
        higher_is_better=value.get("higher_is_better") is not False,
        column=str(value.get("column") or task),
    )
