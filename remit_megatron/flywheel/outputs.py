"""What a stage left behind, file by file: written down when it is done, looked at again before anything trusts it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remit_megatron.flywheel.chain import Stage
from remit_megatron.flywheel.kinds import POSTTRAIN, RUN, result_place
from remit_megatron.runtime.checkpoints import MANIFEST, DamagedCheckpoint, iteration_directory, iterations, verify
from remit_megatron.runtime.files import sha256_file

# What a run writes beside its checkpoints and models: kept, compared, and no part of what the next stage reads.
_RECORDS = ("config.yaml", "metrics.jsonl", "validation.jsonl", "evaluation.jsonl")


def describe(stage: Stage, directory: Path) -> dict[str, list[Any]]:
    """Every file of a finished stage's result: relative name to size, time of change in ns, and SHA-256.

    Raises:
        FileNotFoundError: there is no result although the command ended well; the text says what is missing.
    """
    found = {}
    for path, known in _files(stage, directory):
        stat = path.stat()
        found[str(path.relative_to(directory))] = [stat.st_size, stat.st_mtime_ns, known or sha256_file(path)]
    return dict(sorted(found.items()))


def changed(directory: Path, outputs: dict[str, list[Any]], *, contents: bool) -> str | None:
    """The first file that is not as it was, in words; None where all are.

    Args:
        outputs: of :func:`describe`.
        contents: read every file. Else only those whose time is another one.
    """
    for name, (size, time, digest) in outputs.items():
        path = directory / name
        if not path.is_file():
            return f"{path}: found no file; expected {size} bytes"
        stat = path.stat()
        if stat.st_size != size:
            return f"{path}: found {stat.st_size} bytes; expected {size}"
        if (contents or stat.st_mtime_ns != time) and (found := sha256_file(path)) != digest:
            return f"{path}: found sha256 {found[:16]}…; expected {digest[:16]}…"
    return None


def result_digest(outputs: dict[str, list[Any]]) -> str:
    """Hex SHA-256 of what the next stages read of a result: its contents without times and records."""
    files = [
        [name, digest]
        for name, (_, _, digest) in outputs.items()
        # A manifest repeats what is listed here anyway, and the time of its writing.
        if Path(name).name not in (*_RECORDS, MANIFEST)
    ]
    return hashlib.sha256(json.dumps(files or sorted(outputs)).encode()).hexdigest()


def _files(stage: Stage, directory: Path) -> Iterator[tuple[Path, str | None]]:
    """Files of a result, with digests that are known already."""
    place = result_place(stage, directory)
    if stage.kind == "train":
        yield from _checkpoints(place / "checkpoints")
    elif stage.kind in POSTTRAIN:
        yield from _tree(place)
        if (directory / RUN / "models").is_dir():
            yield from _tree(directory / RUN / "models")
    elif stage.kind == "score":
        # Scores carry checksums of their own, which every reader compares.
        yield _there(place / "manifest.json"), None
    elif stage.kind == "evaluate":
        yield _there(place / "results.json"), None
        yield from ((place / name, None) for name in ("results.md", "details.json") if (place / name).is_file())
        if (place / "samples").is_dir():
            yield from _tree(place / "samples")
    else:
        yield from _tree(place)
    if stage.kind in ("train", *POSTTRAIN):
        records = (directory / RUN / name for name in _RECORDS)
        yield from ((path, None) for path in records if path.is_file())


def _checkpoints(root: Path) -> Iterator[tuple[Path, str | None]]:
    complete = 0
    for iteration in iterations(root):
        checkpoint = iteration_directory(root, iteration)
        try:
            manifest = verify(checkpoint, digests=False)
        except DamagedCheckpoint:
            continue
        complete += 1
        yield from ((checkpoint / name, str(entry["sha256"])) for name, entry in manifest.files.items())
        yield checkpoint / MANIFEST, None
    if not complete:
        raise FileNotFoundError(f"no complete checkpoint in {root}")


def _tree(root: Path) -> Iterator[tuple[Path, str | None]]:
    if root.is_file():
        yield root, None
        return
    files = [path for path in sorted(root.rglob("*")) if path.is_file()] if root.is_dir() else []
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not visible:
        raise FileNotFoundError(f"nothing at {root}")
    yield from ((path, None) for path in visible)


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return path
