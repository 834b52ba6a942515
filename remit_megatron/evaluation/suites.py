"""Suites: which tasks, with how many shots, read by which metric. Data files in ``configs/suites`` or elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.installed import config_names, find_config
from remit_megatron.runtime.yaml_file import read_yaml

# Names become folders and files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Entry:
    """One number of a suite.

    Attributes:
        task: an lm-eval task, group or tag; a task file (relative to the suite's); or several of them, whose items
            are taken together.
        name: what results call it. Default: the task.
        column: what tables call it. Default: the name.
        shots: worked examples before each item, or None for as many as the task's own file says.
        metric: which metric is the score. Default: the first of the task's file.
        filter: which of the task's ways to read an answer. Default: its first.
        data: folder below ``--data`` with the files. Default: looked for under the names of task, group and data set.
        item_key: column that tells items apart, for tasks that take their examples from the items themselves and change
            an item (shuffle its choices) each time they read it.
        generation: replaces values of the task's ``generation_kwargs`` (``max_gen_toks``, ``until``, …).
        prompt_examples: examples that are part of the task's prompt and no shots. Shown beside the shots.
        note: a sentence for below the table.
    """

    task: str | tuple[str, ...]
    name: str = ""
    column: str = ""
    shots: int | None = None
    metric: str | None = None
    filter: str | None = None
    data: str | None = None
    item_key: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    prompt_examples: int = 0
    note: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, also where there is one."""
        return (self.task,) if isinstance(self.task, str) else self.task


@dataclass(frozen=True)
class Suite:
    """A list of entries.

    Attributes:
        name: of the file, or of the one task.
        folder: what paths of task files are relative to.
        entries: in the order of the tables.
        chat_template: whether prompts go through the model's chat template.
        about: a sentence for above the table.
    """

    name: str
    folder: Path
    entries: tuple[Entry, ...]
    chat_template: bool = False
    about: str = ""

    def digest(self) -> str:
        """SHA-256 of what it asks for (not of its comments)."""
        content = [dataclasses.asdict(entry) for entry in self.entries]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def known_suites() -> list[str]:
    """Names of the suites that a name can mean here."""
    return config_names("suites")


def load_suite(name: str) -> Suite:
    """A suite by its name, by its file, or of one lm-eval task.

    Raises:
        UserError: a file that is no suite. A name that is no task either is found out when the tasks are looked up.
    """
    path = Path(name)
    for candidate in (find_config(path), find_config(Path("configs/suites") / f"{name}.yaml", announce=False)):
        if candidate.is_file():
            return _read(candidate)
    if path.suffix in {".yaml", ".yml"} or "/" in name:
        raise UserError("--suite", name, f"a file, an lm-eval task, or one of {', '.join(known_suites())}")
    return Suite(name=name, folder=Path(), entries=(_entry({"task": name}, "--suite"),))


def _read(path: Path) -> Suite:
    content = read_yaml(path, field=str(path), expected="a suite (YAML)")
    known = {"about", "chat_template", "requests", "tasks"}  # requests are what a run scores (evaluation/requests.py)
    if not isinstance(content, dict) or not content.get("tasks") or not isinstance(content["tasks"], list):
        raise UserError(str(path), _kind(content), "a mapping with tasks, a list")
    if wrong := sorted(set(content) - known, key=str):
        raise UserError(f"{path}: {wrong[0]}", _kind(content[wrong[0]]), f"one of {', '.join(sorted(known))}")
    if not isinstance(content.get("chat_template", False), bool):
        raise UserError(f"{path}: chat_template", content["chat_template"], "true or false")
    entries = tuple(_entry(item, f"{path}: tasks[{number}]") for number, item in enumerate(content["tasks"]))
    for kind in ("name", "column"):
        names = [getattr(entry, kind) for entry in entries]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: {kind}", f"{twice[0]} twice", "another name for one of them")
    return Suite(
        name=path.stem,
        folder=path.parent,
        entries=entries,
        chat_template=content.get("chat_template", False),
        about=str(content.get("about") or ""),
    )


def _entry(item: Any, where: str) -> Entry:
    if isinstance(item, str):
        item = {"task": item}
    if not isinstance(item, dict) or not item.get("task"):
        raise UserError(where, _kind(item), "an lm-eval task, or a mapping with task")
    known = {item.name for item in dataclasses.fields(Entry)}
    if wrong := sorted(set(item) - known, key=str):
        raise UserError(f"{where}.{wrong[0]}", _kind(item[wrong[0]]), f"one of {', '.join(sorted(known))}")
    values = dict(item)
    if isinstance(values["task"], list):
        values["task"] = tuple(values["task"])
        if not values.get("name"):
            raise UserError(f"{where}.name", "nothing", "a name for several tasks together")
    expected: dict[str, tuple[type | tuple[type, ...], str]] = {
        "task": ((str, tuple), "a task or a list of them"),
        "shots": ((int, type(None)), "a number"),
        "prompt_examples": (int, "a number"),
        "generation": (dict, "a mapping"),
    }
    for name, value in values.items():
        types, words = expected.get(name, (str, "text"))
        if not isinstance(value, types) or isinstance(value, bool):
            raise UserError(f"{where}.{name}", value, words)
    if not all(
        isinstance(task, str) for task in ([values["task"]] if isinstance(values["task"], str) else values["task"])
    ):
        raise UserError(f"{where}.task", values["task"], "names of tasks")
    if values.get("shots") is not None and values["shots"] < 0:
        raise UserError(f"{where}.shots", values["shots"], "0 or more")
    values["name"] = values.get("name") or Path(str(values["task"])).stem
    if not _NAME.fullmatch(values["name"]):
        raise UserError(f"{where}.name", values["name"], "letters, digits, and any of _ . + -")
    values["column"] = values.get("column") or values["name"]
    return Entry(**values)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
