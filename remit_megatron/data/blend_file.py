"""A blend in a file of its own, which ``data.train`` of any number of runs may name.

    blend:
    - [0.7, web]        # weight, prefix; relative to the folder of this file
    - [0.3, math]

``remit data mix`` writes it; it may as well be written by hand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.yaml_file import read_yaml

_SUFFIXES = (".yaml", ".yml")
_LEAST, _MOST = 1e-50, 1e50  # between them no sum of weights overflows, and no share is rounded to 0
WEIGHTS = f"{_LEAST:g} to {_MOST:g}"


def is_weight(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number that a blend can take for the weight of a part."""
    return isinstance(value, int | float) and not isinstance(value, bool) and _LEAST <= value <= _MOST


def is_blend_file(path: str) -> bool:
    """Whether a name in a blend means a blend file, by its ending; prefixes of token files have none."""
    return path.endswith(_SUFFIXES)


def write_blend_file(path: str | os.PathLike, entries: Sequence[tuple[float, str]], *, comment: str = "") -> None:
    """Writes the weights and prefixes, whole or not at all.

    Args:
        entries: weights, positive, and prefixes relative to the folder of ``path``.
        comment: lines for people, at the top.
    """
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    # In quotes: a name may look like a number (2024), or like nothing (null).
    lines = "".join(f"- [{weight!r}, {json.dumps(prefix, ensure_ascii=False)}]\n" for weight, prefix in entries)
    write_atomic(path, f"{head}blend:\n{lines}")


def read_blend_file(path: str | os.PathLike, *, field: str = "data.train") -> list[tuple[float, str]]:
    """Weights, which sum to 1, and prefixes with the folder of ``path`` in front.

    Args:
        field: what named the file, for messages.

    Raises:
        UserError: no such file, or anything in it but a list of [weight, prefix] under ``blend``.
    """
    path = Path(path)
    expected = "a blend file: `blend:` with a list of [weight, prefix], weights above 0"
    content = read_yaml(path, field=field, expected=expected)
    entries = content.get("blend") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"blend"}:
        found = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise UserError(str(path), found, expected)
    for number, entry in enumerate(entries):
        pair = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) and bool(entry[1])
        if not pair or not is_weight(entry[0]) or is_blend_file(entry[1]):
            raise UserError(
                f"{path}: blend[{number}]", repr(entry), f"[weight, prefix] with a weight above 0 ({WEIGHTS})"
            )
    total = math.fsum(weight for weight, _ in entries)
    return [(weight / total, os.path.join(path.parent, prefix)) for weight, prefix in entries]


def expand_entry(weight: float | None, prefix: str, *, alone: bool, field: str) -> list[tuple[float | None, str]]:
    """The (weight, prefix) pairs that an entry of a blend stands for: the entry, or what is in the file it names.

    Args:
        weight: of the whole file; None only where it is the whole blend.
        alone: whether the blend has no other entry.
        field: names the entry in messages.

    Raises:
        UserError: as `read_blend_file`; or a file beside other data that has no weight.
    """
    if not is_blend_file(prefix):
        return [(weight, prefix)]
    if weight is None and not alone:
        raise UserError(field, f"{prefix} without a weight", "[weight, blend file] beside other data")
    return [((weight or 1.0) * share, part) for share, part in read_blend_file(prefix, field=field)]


def expand_existing(blend: Sequence[Any], *, field: str) -> list[Any]:
    """A blend of a configuration (prefixes, or ``[weight, prefix]``) with the contents of blend files in their place:
    a run's own configuration then says what it was trained on.

    A file that is not there stays a name, for a dry run on another machine; a run refuses it when it opens its data.

    Raises:
        UserError: as `expand_entry`.
    """
    entries: list[Any] = []
    for index, entry in enumerate(blend):
        weight, prefix = (None, entry) if isinstance(entry, str) else entry
        if is_blend_file(prefix) and Path(prefix).exists():
            parts = expand_entry(weight, prefix, alone=len(blend) == 1, field=f"{field}[{index}]")
            entries += [[share, part] for share, part in parts]
        else:
            entries.append(entry)
    return entries
