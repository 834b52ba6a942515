"""A Hugging Face directory behind any path a user may give: one already, a checkpoint, or a run.

A checkpoint is exported by ``remit export`` in a process of its own, once: the result is kept under the digest of the
checkpoint's files, so that the same weights are found again whatever path they have, and other weights never are.
Evaluation and analysis see Hugging Face models only, and come here for them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from remit_megatron.runtime.checkpoints import (
    DamagedCheckpoint,
    Manifest,
    is_checkpoint,
    iteration_directory,
    iterations,
    newest_complete,
    read_manifest,
    verify,
    write_manifest,
)
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import fsync_directory, parse_json, sha256_file, temporary_name

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "REMIT_CACHE_DIR"
_MODEL = "model"
# What makes a Hugging Face model that model: weights, architecture, text to ids and back, chat format.
_PARTS_OF_A_MODEL = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja", "*.py")

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class HuggingFaceModel:
    """A directory that transformers loads.

    Attributes:
        path: the Hugging Face directory.
        digest: hex SHA-256 of what the model is; a checkpoint's is taken over its own files, before the export.
        source: what it was made from: ``path`` itself, or the directory of one checkpoint.
        iteration: step of the checkpoint, where it says one.
        run_dir: the run that the checkpoint belongs to, or None.
    """

    path: Path
    digest: str
    source: Path
    iteration: int | None = None
    run_dir: Path | None = None


def huggingface_model(path: str | os.PathLike, *, field: str = "MODEL") -> HuggingFaceModel:
    """The Hugging Face model that ``path`` stands for; a checkpoint is exported first, or found exported.

    Args:
        path: a Hugging Face directory, a checkpoint, a run directory (its newest complete checkpoint), or the
            ``checkpoints`` folder of a run.
        field: how messages name the path.

    Raises:
        UserError: there is no complete model, or its export fails.
    """
    path = Path(path)
    checkpoint = checkpoint_of(path, field=field)
    if checkpoint is None:
        return HuggingFaceModel(path=path, digest=model_digest(path, field=field), source=path)
    manifest = read_manifest(checkpoint)
    digest = checkpoint_digest(manifest)
    run_dir = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None
    return HuggingFaceModel(
        path=_exported(checkpoint, digest, field),
        digest=digest,
        source=checkpoint,
        iteration=manifest.properties.get("iteration"),
        run_dir=run_dir,
    )


def checkpoint_digest(manifest: Manifest) -> str:
    """Hex SHA-256 of what a checkpoint is: the names, sizes and digests of its own files."""
    return hashlib.sha256(json.dumps(manifest.files, sort_keys=True).encode()).hexdigest()


def checkpoint_of(path: Path, *, field: str = "MODEL") -> Path | None:
    """The directory of the complete checkpoint behind ``path``, or None where it is a Hugging Face directory.

    Raises:
        UserError: it is neither, or no checkpoint there is complete.
    """
    expected = "a Hugging Face directory, a checkpoint, or a run directory"
    if not path.is_dir():
        raise UserError(field, f"{path} (a file)" if path.exists() else f"no directory {path}", expected)
    if is_checkpoint(path):
        try:
            verify(path, digests=False)
        except DamagedCheckpoint as damage:
            raise UserError(field, f"half a checkpoint: {damage}", "a complete checkpoint") from None
        return path
    if (path / "config.json").exists():
        if not any(file.suffix == ".safetensors" for file in model_files(path)):
            raise UserError(field, f"{path} without *.safetensors", "a Hugging Face directory with its weights")
        return None
    for root in (path / "checkpoints", path):
        if iterations(root):
            newest = newest_complete(root, digests=False)
            if newest is None:
                raise UserError(field, f"no complete checkpoint in {root}", "at least one with a manifest")
            return iteration_directory(root, newest)
    raise UserError(field, f"none of these in {path}", expected)


def model_files(directory: Path) -> list[Path]:
    """The files that make a Hugging Face model, sorted: whoever digests one takes these. Weights may lie in folders
    below, where an index or config.json names them there."""
    files = {file for pattern in _PARTS_OF_A_MODEL for file in directory.glob(pattern) if file.is_file()}
    named = {directory / name for file in files if file.suffix == ".json" for name in _weights_named_in(file)}
    below = {file for file in named if file.name.endswith(".index.json") and file.is_file()}
    named |= {file.parent / name for file in below for name in _weights_named_in(file)}
    return sorted(files | {file for file in named if _is_file(file)})


def _weights_named_in(file: Path) -> set[str]:
    """Names of weight files in an index, or in config.json, that are not beside it; what is wrong with them is for
    whoever loads them to say."""
    if file.name != "config.json" and not file.name.endswith(".index.json"):
        return set()
    try:
        content = parse_json(file.read_bytes())
        names = [content.get("transformers_weights"), *(content.get("weight_map") or {}).values()]
    except (OSError, ValueError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and "/" in name and not os.path.isabs(name)}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def model_digest(directory: str | os.PathLike, *, field: str = "MODEL") -> str:
    """Hex SHA-256 over the names and contents of the files that make a Hugging Face model.

    Raises:
        UserError: no directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(field, f"no directory {directory}", "a Hugging Face directory")
    files = model_files(directory)
    with ThreadPoolExecutor(max_workers=4) as threads:
        digests = threads.map(sha256_file, files)
        return _digest(zip((os.path.relpath(file, directory) for file in files), digests, strict=True))


def _digest(parts: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def cache_directory() -> Path:
    """Where exported models are kept: $REMIT_CACHE_DIR, else the user's cache folder. Its content can be removed."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remit_megatron"


def _exported(checkpoint: Path, digest: str, field: str) -> Path:
    """CACHE/exported/<digest>/model, made where it is not there or not whole.

    It appears whole, under its name, by one rename. The lock saves work and nothing else: without one, or with one that
    another machine does not see, two may make it, and the second takes what the first has made.
    """
    folder = cache_directory() / "exported"
    place = folder / digest[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f".{place.name}.lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(CACHE_VARIABLE, f"{folder} ({error.strerror})", "a folder that can be written") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): two at once may make the same export", place, error.strerror)
        if not _is_whole(place):
            made = temporary_name(place)
            try:
                made.mkdir()
                _export(checkpoint, made / _MODEL, field)
                write_manifest(made, checkpoint=str(checkpoint.absolute()), digest=digest)
                _put(made, place)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return place / _MODEL


def _is_whole(place: Path) -> bool:
    try:
        verify(place, digests=False)
    except DamagedCheckpoint:
        return False
    return True


def _put(made: Path, place: Path) -> None:
    """Gives ``made`` the name ``place``, unless there is a whole one; a damaged one goes."""
    for attempt in range(3):
        try:
            made.rename(place)
            return fsync_directory(place.parent)
        except OSError as error:
            taken = error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.EPERM)  # sshfs says EPERM
            if not taken or attempt == 2:
                raise
        if _is_whole(place):
            return None
        damaged = temporary_name(place)
        with contextlib.suppress(FileNotFoundError):  # another was quicker
            place.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)


def run_export(checkpoint: Path, output: Path) -> tuple[int, list[str]]:
    """``remit export`` in a process of its own: it needs Megatron and its patches, whose callers must do without them.

    Returns:
        Its exit code, and the lines of its standard error; ``no message`` where there is none.
    """
    return run_remit(["export", "--checkpoint", str(checkpoint), "--output", str(output)])


def run_remit(words: list[str]) -> tuple[int, list[str]]:
    """A command of ``remit`` in a process of its own, as if nothing had started this one.

    Returns:
        As :func:`run_export`.
    """
    command = [sys.executable, "-m", "remit_megatron", *words]
    # Started by a launcher, the child would take itself for one of several ranks.
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return done.returncode, [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]


def _export(checkpoint: Path, output: Path, field: str) -> None:
    logger.warning("exporting %s to %s", checkpoint, output)
    code, lines = run_export(checkpoint, output)
    if code:
        shutil.rmtree(output, ignore_errors=True)
        reason = lines[-1].strip().removeprefix("error: ")
        raise UserError(field, f"{checkpoint}, whose export failed ({reason})", "a checkpoint that can be exported")
