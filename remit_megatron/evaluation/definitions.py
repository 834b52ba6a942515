"""lm-eval's own task files: found by name without reading all of them as YAML (14,683 in 0.4.13; 8 s)."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.installed import config_names

_NAMED = re.compile(
    rb"^[\"']?(task|group|class)[\"']?[ \t]*:[ \t]*(?:\"([^\"\n]+)\"|'([^'\n]+)'|([^\s#\[\]{}!&*|>\"'-][^#\n]*))", re.M
)


@dataclass(frozen=True)
class Leaf:
    """One task file.

    Attributes:
        name: lm-eval's name of the task.
        path: the file.
        values: what the file says, includes merged; functions are text.
        overrides: what the group that it came by says otherwise.
    """

    name: str
    path: Path
    values: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        """A value, or None."""
        return self.overrides.get(key, self.values.get(key))


@dataclass(frozen=True)
class Found:
    """What a name stands for: leaves, and how a group is summed up (``aggregate_metric_list``, if it has one)."""

    leaves: tuple[Leaf, ...]
    aggregate: tuple[dict[str, Any], ...] = ()


def find(name: str, *, folder: Path = Path()) -> Found:
    """The task files behind the name of a task, group or tag of lm-eval, or behind a file of one's own.

    Raises:
        UserError: there is none of that name.
    """
    own = folder / name
    if Path(name).suffix in {".yaml", ".yml"}:
        if not own.is_file():
            raise UserError("task", name, "a file, or a task of lm-eval")
        return _found(own, {})
    path = _built_in().get(name)
    if path is not None:
        return _found(path, {})
    members = _members_of_tag(name)
    if not members:
        suites = config_names("suites")
        expected = f"a task, group or tag of lm-eval 0.4.13, a task file, or a suite ({', '.join(suites)})"
        raise UserError("task", name, expected + _near(name, suites))
    return Found(tuple(leaf for member in members for leaf in _found(_built_in()[member], {}).leaves))


def _found(path: Path, overrides: dict[str, Any]) -> Found:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        values = load_yaml(path, resolve_func=False)
    except Exception as error:
        raise UserError(str(path), " ".join(str(error).split())[:200], "an lm-eval task file") from None
    if "class" in values:
        raise UserError(
            f"task {values.get('task')}", f"a task written in Python ({path.name})", "one that is a task file"
        )
    if "group" not in values:
        return Found((Leaf(str(values["task"]), path, values, overrides),))
    aggregate = values.get("aggregate_metric_list") or ()
    aggregate = (aggregate,) if isinstance(aggregate, dict) else tuple(aggregate)
    return Found(tuple(_members(values, overrides)), aggregate)


def _members(group: dict[str, Any], overrides: dict[str, Any]) -> Iterator[Leaf]:
    own = {key: value for key, value in group.items() if key not in _GROUP_KEYS}
    for item in group["task"] if isinstance(group["task"], list) else [group["task"]]:
        more = own | overrides
        if isinstance(item, dict):
            if isinstance(item.get("task"), list):
                yield from _members({"group": "", **item}, more)
                continue
            name = item.get("group") or item["task"]
            more |= {key: value for key, value in item.items() if key not in _GROUP_KEYS}
        else:
            name = item
        path = _built_in().get(name)
        paths = [path] if path else [_built_in()[member] for member in _members_of_tag(name)]
        if not paths:
            raise UserError("task", name, "a task that lm-eval has")
        for path in paths:
            yield from _found(path, more).leaves


_GROUP_KEYS = {"group", "group_alias", "task", "task_alias", "tag", "aggregate_metric_list", "metadata", "include"}


@functools.cache
def _built_in() -> dict[str, Path]:
    """Name of a task or group -> its file; of several, the first in the order of paths, as lm-eval has it."""
    import lm_eval.tasks

    files = []
    for folder, folders, names in os.walk(Path(lm_eval.tasks.__file__).parent):
        folders[:] = [name for name in folders if name not in {"__pycache__", ".ipynb_checkpoints"}]
        files += [Path(folder, name) for name in names if name.endswith(".yaml")]
    found: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: path.as_posix()):
        named = {
            match[1]: (match[2] or match[3] or match[4]).strip().decode()
            for match in _NAMED.finditer(path.read_bytes())
        }
        name = named.get(b"group") or named.get(b"task")
        if name:
            found.setdefault(name, path)
    return found


@functools.cache
def _all_tags() -> dict[str, list[str]]:
    """Tags can come with an included file: this reads everything."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    index = TaskManager().task_index
    return {name: sorted(entry.tags) for name, entry in index.items() if entry.kind is Kind.TAG}


def _members_of_tag(name: str) -> list[str]:
    return _all_tags().get(name, [])


def _near(name: str, suites: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, [*suites, *_built_in()], n=3)
    return f"; near it: {', '.join(near)}" if near else ""
