"""Data recipes: which sources make up a mix, in which shares, and where their documents are.

sources:
- name: math                      # becomes OUTPUT/math.bin, .idx and .json
  weight: 3.5                     # share of the mix's tokens; weights need not sum to 1
  files: [math, extra/*.jsonl.gz] # files, folders or patterns below --root
  hub:                            # optional: where the same documents are on the Hugging Face hub
    name: allenai/dolmino-mix-1124
    files: data/math              # files, folders or patterns of the data set; left out, those of the source
    revision: main                # branch, tag or commit
  text_key: text                  # field with the text; or, from several fields,
  template: "{problem}\\n{solution}"
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.data.blend_file import WEIGHTS, is_blend_file, is_weight
from remit_megatron.data.readers import TextFormat
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.installed import find_config, shipped_namesake
from remit_megatron.runtime.yaml_file import read_yaml

_SOURCE_KEYS = ("name", "weight", "files", "hub", "text_key", "template")
_HUB_KEYS = ("name", "files", "revision")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubPlace:
    """Files of a data set on the Hugging Face hub.

    Attributes:
        name: ``owner/name``.
        files: files, folders or patterns in it.
        revision: branch, tag or commit; None is the main branch.
    """

    name: str
    files: tuple[str, ...]
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}{f'@{self.revision}' if self.revision else ''}: {', '.join(self.files)}"


@dataclass(frozen=True)
class Source:
    """One source of a mix; the attributes are the keys above."""

    name: str
    weight: float
    files: tuple[str, ...]
    hub: HubPlace | None
    text_key: str
    template: str | None


@dataclass(frozen=True)
class Recipe:
    """A mix: its sources, in the order of the file."""

    path: Path
    sources: tuple[Source, ...]

    def shares(self, present: Iterable[str] | None = None) -> dict[str, float]:
        """Share of each source by name; they sum to 1.

        Args:
            present: names of the sources to share among; None for all.
        """
        names = {source.name for source in self.sources} if present is None else set(present)
        chosen = [source for source in self.sources if source.name in names]
        total = math.fsum(source.weight for source in chosen)
        return {source.name: source.weight / total for source in chosen}


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe; ``configs/data/…`` that is not here is the one of the package.

    Raises:
        UserError: no such file, no YAML, an unknown key, a weight that is not above 0, or two sources of one name.
    """
    path = find_config(path)
    hint = "" if path.exists() else shipped_namesake(path)
    content = read_yaml(path, field="RECIPE", expected=f"a recipe, as those in configs/data{hint}")
    if not isinstance(content, dict) or not isinstance(content.get("sources"), list) or not content["sources"]:
        raise UserError(str(path), "no sources", "`sources:` with a list of them")
    _refuse_unknown(content, ("sources",), str(path))
    sources: dict[str, Source] = {}
    for number, item in enumerate(content["sources"]):
        source = _source(item, f"{path}: sources[{number}]")
        if source.name in sources:
            found = f"{source.name}, the name of another source"
            raise UserError(f"{path}: sources[{number}].name", found, "a name of its own for each source")
        sources[source.name] = source
    return Recipe(path, tuple(sources.values()))


def _source(item: Any, field: str) -> Source:
    if not isinstance(item, dict):
        raise UserError(field, repr(item), f"a mapping with {', '.join(_SOURCE_KEYS)}")
    _refuse_unknown(item, _SOURCE_KEYS, field)
    name = item.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "blend" or is_blend_file(name):
        expected = "letters, digits, point, plus, minus and underscore, and not `blend` or the name of a blend file"
        raise UserError(f"{field}.name", "nothing" if name is None else repr(name), expected)
    field = f"{field} ({name})"
    weight = item.get("weight")
    if not is_weight(weight):
        raise UserError(
            f"{field}.weight", "nothing" if weight is None else repr(weight), f"a number above 0 ({WEIGHTS})"
        )
    files = _strings(item.get("files", name), f"{field}.files")
    hub = _hub(item["hub"], files, f"{field}.hub") if item.get("hub") is not None else None
    for file in files:
        if os.path.isabs(file):
            raise UserError(f"{field}.files", file, "places relative to --root")
    for key in ("text_key", "template"):
        if not isinstance(item.get(key, "text"), str) or not item.get(key, "text"):
            raise UserError(f"{field}.{key}", repr(item[key]), "a text")
    if item.get("template") is not None and item.get("text_key") is not None:
        raise UserError(f"{field}.text_key", "one beside a template, which says the fields itself", "one of the two")
    try:
        TextFormat(text_key=item.get("text_key", "text"), template=item.get("template"))
    except UserError as error:
        raise UserError(f"{field}.template", error.found, error.expected) from None
    return Source(name, float(weight), files, hub, item.get("text_key", "text"), item.get("template"))


def _hub(item: Any, files: tuple[str, ...], field: str) -> HubPlace:
    if not isinstance(item, dict):
        raise UserError(field, repr(item), f"a mapping with {', '.join(_HUB_KEYS)}")
    _refuse_unknown(item, _HUB_KEYS, field)
    name, revision = item.get("name"), item.get("revision")
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        raise UserError(f"{field}.name", "nothing" if name is None else repr(name), "owner/name of a data set")
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise UserError(f"{field}.revision", repr(revision), "a branch, tag or commit, in quotes where it is a number")
    there = _strings(item["files"], f"{field}.files") if "files" in item else files
    return HubPlace(name, there, revision)


def _strings(value: Any, field: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or not all(isinstance(item, str) and item for item in items):
        raise UserError(field, repr(value), "a file, a folder or a pattern, or a list of them")
    return tuple(item.rstrip("/") for item in items)


def _refuse_unknown(content: dict[Any, Any], known: tuple[str, ...], field: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{field}.{key}", "an unknown key", f"one of {', '.join(known)}{hint}")
