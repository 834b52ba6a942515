"""Checkpoint directories that can be trusted: a manifest written last, an atomic pointer, verification when read.

Layout of a root (``run_dir/checkpoints``)::

    iter_0000100/            one checkpoint: Megatron torch_dist files, hf/ (config.json, tokenizer), manifest.json
    latest                   {"iteration": 100}; written after the manifest, a hint for people and tools
    latest_checkpointed_iteration.txt    Megatron's own pointer, rewritten from what was verified before it is read

A directory without a manifest is half a checkpoint. What is newest is decided by the manifests, not by a pointer.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import (
    HF_SUBFOLDER,
    fsync_directory,
    fsync_file,
    parse_json,
    read_whole,
    remove_tree,
    sha256_file,
    write_atomic,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
POINTER = "latest"
MEGATRON_POINTER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})$")


class DamagedCheckpoint(Exception):
    """A checkpoint that must not be used; the text says which file, what was found and what was expected."""


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself.

    Attributes:
        files: relative name to ``{"size": bytes, "sha256": hex}``.
        properties: whatever its writer wanted to remember (iteration, samples trained on, tokenizer digest, ...).
    """

    files: dict[str, dict[str, Any]]
    properties: dict[str, Any]


def iteration_directory(root: str | os.PathLike, iteration: int) -> Path:
    """``root/iter_0000100``, as Megatron names it."""
    return Path(root) / f"iter_{iteration:07d}"


def is_checkpoint(directory: Path) -> bool:
    """Whether there is a checkpoint, whole or half. A Hugging Face model may have a manifest.json or a folder ``hf`` of
    its own; it has config.json beside them, where a checkpoint never has one."""
    if (directory / "config.json").exists():
        return False
    return (directory / MANIFEST).exists() or (directory / HF_SUBFOLDER).is_dir() or (directory / ".metadata").exists()


def list_files(directory: str | os.PathLike) -> list[str]:
    """Relative names of the files a manifest covers, sorted, so that ranks can share the work by position."""
    directory = Path(directory)
    names = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST and not name.endswith(".tmp"))


def describe_files(
    directory: str | os.PathLike, names: list[str] | None = None, *, known: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Syncs and digests files of ``directory``: ``names``, or all. Ranks of a job each take a part of one list.

    Args:
        known: SHA-256 digests that were taken while the files were written, by relative name.
    """
    directory = Path(directory)
    described = {}
    for name in list_files(directory) if names is None else names:
        path = directory / name
        fsync_file(path)
        digest = (known or {}).get(name) or sha256_file(path)
        described[name] = {"size": path.stat().st_size, "sha256": digest}
    return described


def write_manifest(
    directory: str | os.PathLike, *, files: dict[str, dict[str, Any]] | None = None, **properties: Any
) -> None:
    """Declares ``directory`` complete. Call it when every file is in place; ``files`` comes from describe_files."""
    directory = Path(directory)
    content = {
        "format": "remit_megatron checkpoint",
        "version": MANIFEST_VERSION,
        "files": dict(sorted((files if files is not None else describe_files(directory)).items())),
        "properties": properties,
    }
    fsync_directory(directory)
    write_atomic(directory / MANIFEST, json.dumps(content, indent=1) + "\n")
    fsync_directory(directory.parent)


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """The manifest of ``directory``.

    Raises:
        DamagedCheckpoint: there is none (the checkpoint was never finished), or it cannot be read.
    """
    path = Path(directory) / MANIFEST
    try:
        content = parse_json(read_whole(path))
        if content["version"] != MANIFEST_VERSION:
            raise DamagedCheckpoint(f"{path}: found version {content['version']}; expected {MANIFEST_VERSION}")
        files, properties = content["files"], content["properties"]
        if not isinstance(files, dict) or not all(_is_described(entry) for entry in files.values()):
            raise ValueError("files without sizes and SHA-256 digests")
        for name in files:
            if not _is_inside(name):
                raise ValueError(f"{name[:80]!r}, which no file below a directory is called")
        if not isinstance(properties, dict) or type(properties.get("iteration", 0)) is not int:
            raise ValueError("properties that are none")
        return Manifest(files=files, properties=properties)
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{directory}: found no {MANIFEST}; expected one, written when a save is complete"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: found {error!r}; expected a manifest") from None


def _is_described(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)


def _is_inside(name: str) -> bool:
    """Whether a file below a directory can have this relative name on Linux."""
    parts = os.fsencode(name).split(b"/")  # a ValueError where a name holds half of a surrogate pair
    return all(0 < len(part) <= 255 and part not in (b".", b"..") and b"\0" not in part for part in parts)


def verify(directory: str | os.PathLike, *, digests: bool = True, part: int = 0, parts: int = 1) -> Manifest:
    """Compares the files with the manifest: sizes of all, digests of every ``parts``-th from ``part``.

    Raises:
        DamagedCheckpoint: a file is missing, has another size, or other contents.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path}: found no file; expected {expected['size']} bytes")
        size = path.stat().st_size
        if size != expected["size"]:
            raise DamagedCheckpoint(f"{path}: found {size} bytes; expected {expected['size']}")
    if digests:
        for name in sorted(manifest.files)[part::parts]:
            found = sha256_file(directory / name)
            if found != manifest.files[name]["sha256"]:
                raise DamagedCheckpoint(
                    f"{directory / name}: found sha256 {found[:16]}…; expected {manifest.files[name]['sha256'][:16]}…"
                )
    return manifest


def write_error(error: BaseException, root: str | os.PathLike) -> Exception:
    """What a save failed of, from torch's exception about ranks that could not write.

    It names errors of the file system in its text only, and is none that anything handles.

    Returns:
        An `OSError` about ``root`` where the text has an error number, else a `RuntimeError` with the last line.
    """
    text = str(error)
    if found := re.search(r"\[Errno (\d+)\]", text):
        number = int(found.group(1))
        return OSError(number, os.strerror(number), str(root))
    return RuntimeError(f"saving into {root}: {text.strip().splitlines()[-1]}")


def iterations(root: str | os.PathLike) -> list[int]:
    """Iterations under ``root`` that have a directory, complete or not, newest first."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = (_ITERATION.match(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def newest_complete(root: str | os.PathLike, *, digests: bool = True) -> int | None:
    """The newest iteration under ``root`` that passes :func:`verify`; each one that does not is logged and skipped."""
    for iteration in iterations(root):
        try:
            verify(iteration_directory(root, iteration), digests=digests)
            return iteration
        except DamagedCheckpoint as damage:
            logger.warning("skipping checkpoint %d: %s", iteration, damage)
    return None


def set_aside(root: str | os.PathLike, iteration: int) -> Path | None:
    """Renames a checkpoint that must not be used, so that a save of the same iteration finds an empty place.

    One that never got its manifest is removed: it was never a checkpoint. One that got damaged is kept under
    ``iter_….damaged`` for its owner to look at. Returns the new name, or None where it was removed.
    """
    directory = iteration_directory(root, iteration)
    if not (directory / MANIFEST).exists():
        shutil.rmtree(directory)
        return None
    aside = directory.with_name(directory.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    directory.rename(aside)
    fsync_directory(directory.parent)
    return aside


def point_to(root: str | os.PathLike, iteration: int) -> None:
    """Moves the pointers, ours and Megatron's, to ``iteration``; each is replaced in one step."""
    root = Path(root)
    write_atomic(root / POINTER, json.dumps({"iteration": iteration}) + "\n")
    write_atomic(root / MEGATRON_POINTER, f"{iteration}\n")


def retain(root: str | os.PathLike, keep: int | None) -> list[int]:
    """Removes complete checkpoints older than the newest ``keep``; returns which. ``None`` keeps all."""
    if keep is None:
        return []
    if keep < 1:
        raise UserError("checkpoint.keep", keep, "at least 1, or null to keep all")
    complete = [i for i in iterations(root) if (iteration_directory(root, i) / MANIFEST).exists()]
    removed = complete[keep:]
    for iteration in removed:
        directory = iteration_directory(root, iteration)
        # Without its manifest it is no checkpoint any more, whatever happens during the removal.
        (directory / MANIFEST).unlink()
        remove_tree(directory)
    return removed
