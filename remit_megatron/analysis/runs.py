"""A run directory as its files say it: configuration, curves, starts and stops. Nothing of it is changed."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from remit_megatron.analysis.wall_time import WallTime, wall_time
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.run_length import planned_steps


@dataclass
class Run:
    """One run.

    Attributes:
        name: the directory's name, longer where several runs share it.
        config: content of config.yaml, resolved.
        metrics: lines of metrics.jsonl, by step.
        validation: lines of validation.jsonl.
        evaluations: lines of evaluation.jsonl, by step; the last one of a step that was done again.
    """

    path: Path
    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    validation: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def column(self, key: str) -> list[float | None]:
        """A value of every step; None where the step has none."""
        return [_number(record.get(key)) for record in self.metrics]

    @property
    def tokens(self) -> list[float]:
        """Consumed tokens after each step."""
        return [float(record["consumed_tokens"]) for record in self.metrics]

    @property
    def steps(self) -> list[float]:
        return [float(record["iteration"]) for record in self.metrics]

    @cached_property
    def ranks(self) -> int:
        """Processes of the largest job that worked on the run, one a device: each has a log."""
        return max(1, len(list((self.path / "logs").glob("rank_*.log"))))

    @cached_property
    def made_with(self) -> str:
        """Device and versions of the last start that says them, from events.jsonl; empty where none does."""
        try:
            starts = [
                line for line in read_records(self.path / "events.jsonl") if isinstance(line.get("versions"), dict)
            ]
        except UserError:
            return ""  # a file that no run depends on
        if not starts:
            return ""
        versions = [f"{name} {value}" for name, value in starts[-1]["versions"].items()]
        return ", ".join([str(starts[-1].get("device", "unknown device")), *versions])

    @property
    def device_hours(self) -> list[float]:
        """Device hours after each step that counts: what was lost is in ``wall_time``."""
        total, result = 0.0, []
        for seconds in self.column("step_seconds"):
            total += (seconds or 0.0) * self.ranks / 3600
            result.append(total)
        return result

    @cached_property
    def wall_time(self) -> WallTime | None:
        """Where the time went, or None without a log of rank 0."""
        training = sum(seconds or 0.0 for seconds in self.column("step_seconds"))
        evaluating = sum(_number(record.get("seconds")) or 0.0 for record in self.evaluations)
        log = self.path / "logs" / "rank_0.log"
        return wall_time(log, training_seconds=training, evaluation_seconds=evaluating)

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run, where the configuration says it in steps or samples."""
        return planned_steps(self.config.get("megatron") or {}, self.metrics[-1] if self.metrics else None)

    @property
    def uses_reference(self) -> bool:
        """Whether any step had weights or differences other than 1 and 0."""
        return any(record.get("delta_std") or record.get("weight_std") for record in self.metrics)

    @property
    def objective(self) -> str:
        """The objective with the settings that it takes."""
        section = self.config.get("objective") or {}
        name = str(section.get("name", "?"))
        keys = {"remit": ("epsilon", "centering"), "rho1": ("keep", "scope"), "kd": ("temperature", "ntp_weight")}
        settings = [f"{key} {_shown(section[key])}" for key in keys.get(name, ()) if key in section]
        return f"{name} ({', '.join(settings)})" if settings else name


def read_runs(paths: list[str]) -> list[Run]:
    """Reads run directories.

    Raises:
        UserError: a path is no run directory, or has no steps yet.
    """
    if not paths:
        raise UserError("RUN", "nothing", "at least one run directory")
    found = [Path(path) for path in paths]
    return [_read(path, name) for path, name in zip(found, _names(found), strict=True)]


def _read(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise UserError("RUN", f"no directory {path}", "a run directory: config.yaml, metrics.jsonl")
    for file in ("config.yaml", "metrics.jsonl"):
        if not (path / file).is_file():
            raise UserError("RUN", f"{path} without {file}", "a run directory: config.yaml, metrics.jsonl")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
    except yaml.YAMLError as error:
        raise UserError(
            str(path / "config.yaml"), f"no YAML ({error})", "the resolved configuration of a run"
        ) from None
    if not isinstance(config, dict):
        raise UserError(str(path / "config.yaml"), type(config).__name__, "the resolved configuration of a run")
    metrics = read_records(path / "metrics.jsonl")
    if not metrics:
        raise UserError("RUN", f"{path} without a step in metrics.jsonl", "a run that has begun")
    for record in metrics:
        if not {"iteration", "consumed_tokens"} <= record.keys():
            raise UserError(
                str(path / "metrics.jsonl"), f"a line {record}"[:200], "iteration and consumed_tokens in each"
            )
    evaluations = {record["iteration"]: record for record in _evaluations(path / "evaluation.jsonl")}
    by_step = [evaluations[step] for step in sorted(evaluations)]
    return Run(path, name, config, metrics, read_records(path / "validation.jsonl"), by_step)


def _evaluations(path: Path) -> list[dict[str, Any]]:
    records = read_records(path)
    for record in records:
        if not {"iteration", "consumed_tokens", "tasks"} <= record.keys():
            raise UserError(str(path), f"a line {record}"[:200], "iteration, consumed_tokens and tasks in each")
    return records


def read_records(path: Path) -> list[dict[str, Any]]:
    """Objects of a ``.jsonl`` file. The last line may be half written: the run may be at it right now.

    Raises:
        UserError: another line is no JSON object.
    """
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                continue
            raise UserError(f"{path} line {number}", f"{line[:60]!r}", "a JSON object") from None
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number}", f"{line[:60]!r}", "a JSON object")
        records.append(record)
    return records


def _names(paths: list[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [path.absolute().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UserError("RUN", "the same directory twice", "different run directories")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """Keys of the configuration whose values are not the same in all runs, with each run's value."""
    # A section that one run does not have at all is one line, not one for each of its keys.
    whole = {key for run in runs for key in run.config if not isinstance(run.config[key], dict)}
    flat = [_flatten(run.config, whole=whole) for run in runs]
    keys = sorted({key for values in flat for key in values} - {"run_dir"})
    found = {key: [_shown(values[key]) if key in values else "not set" for values in flat] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _flatten(value: Any, prefix: str = "", *, whole: set[str]) -> dict[str, Any]:
    if isinstance(value, dict) and prefix in whole:
        return {prefix: ", ".join(f"{key} {_shown(item)}" for key, item in value.items() if item not in (None, False))}
    if isinstance(value, dict) and value:
        result: dict[str, Any] = {}
        for key, item in value.items():
            result |= _flatten(item, f"{prefix}.{key}" if prefix else str(key), whole=whole)
        return result
    return {prefix: value}


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:g}"
    if isinstance(value, list) and value and all(isinstance(item, list) and len(item) == 2 for item in value):
        return ", ".join(str(name) if len(value) == 1 else f"{weight:g} {name}" for weight, name in value)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def smoothed(values: list[float | None], window: int) -> list[float | None]:
    """Means of the last ``window`` values that are there."""
    result: list[float | None] = []
    for end in range(1, len(values) + 1):
        part = [value for value in values[max(0, end - window) : end] if value is not None]
        result.append(sum(part) / len(part) if part else None)
    return result


_STEP = re.compile(r"iter_(\d{7,})|step[ _-]?(\d+)")


def placed(model: str, runs: list[Run]) -> tuple[Run, int] | None:
    """The run and the step that the name of an evaluated model points to: a path into the run, or the run's name.

    Without a step in it the name stands for the last one.
    """
    target = Path(model).resolve()
    for run in runs:
        home = run.path.resolve()
        inside = target == home or home in target.parents
        if not inside and run.name not in re.split(r"[/\s@:]|-iter_", model) and run.name != model:
            continue
        step = _STEP.search(str(target.relative_to(home)) if inside else model)
        return run, int(step[1] or step[2]) if step else int(run.metrics[-1]["iteration"])
    return None


def at_step(run: Run, values: list[float], step: int) -> float | None:
    """The value of a column at a step, or None where the run has not that step."""
    for record, value in zip(run.metrics, values, strict=True):
        if record["iteration"] == step:
            return value
    return None
