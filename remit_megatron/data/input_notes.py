"""What is worth a line about the files of a corpus: documents that are read twice, and data for tests among them.

None of it is wrong for certain, so nothing is refused here; without a word it would show in no number.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

_PACKED = (".gz", ".zst", ".zstd")
# The words, and what may stand around them, by which `datasets` finds the splits of a folder.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NO_WORD = re.compile(r"[-._ 0-9/]+")


def noticed(files: Sequence[str]) -> list[str]:
    """A line for files that are there under several names or several times, one for files that are there both packed
    and unpacked, as ``zstd -d`` and ``gunzip -k`` leave them, and one for files with nothing in them, as a full disk
    leaves them."""
    empty: list[str] = []
    by_place: dict[tuple[int, int], list[str]] = defaultdict(list)
    by_name: dict[str, dict[str, None]] = defaultdict(dict)
    for file in files:
        status = os.stat(file)
        by_place[status.st_dev, status.st_ino].append(file)
        by_name[_unpacked(file)][file] = None
        if not status.st_size:
            empty.append(file)
    found = (
        ("several times", [names for names in by_place.values() if len(names) > 1]),
        ("both packed and unpacked", [list(names) for names in by_name.values() if len(names) > 1]),
    )
    lines = [
        f"{len(groups)} of the files {how}, such as {' and '.join(groups[0][:2])}: their documents are read each time"
        for how, groups in found
        if groups
    ]
    if empty:
        lines.append(f"{len(empty)} of the files empty, such as {empty[0]}: no documents in them")
    return lines


def splits(item: str, files: Sequence[str]) -> list[str]:
    """A line where ``item``, a folder or a pattern, means files of several splits: all of them are read.

    Args:
        files: what it means.
    """
    examples: dict[str, str] = {}
    for file, name in zip(files, _below_common(files), strict=True):
        words = set(_NO_WORD.split(name.lower()))
        for split, names in _SPLITS.items():
            if words.intersection(names):
                examples.setdefault(split, file)
    if len(examples) < 2:
        return []
    there = [split for split in _SPLITS if split in examples]
    found = f"files of {' and '.join(there)}, such as {' and '.join(map(examples.__getitem__, there))}"
    return [f"{item}: {found}: all of them are read; name the files that are meant where that is one of these"]


def _unpacked(file: str) -> str:
    return next((file.removesuffix(ending) for ending in _PACKED if file.endswith(ending)), file)


def _below_common(files: Sequence[str]) -> Iterable[str]:
    """Each name without the folders that all have in common."""
    if not files:
        return ()
    common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return (os.path.relpath(os.path.abspath(file), common) for file in files)
