"""Files that a later run trusts: written whole or not at all, and verified when read."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError

logger = logging.getLogger(__name__)

INT64 = range(-(2**63), 2**63)
# Folder of a checkpoint with config.json, the tokenizer and what else a Hugging Face model has besides weights.
HF_SUBFOLDER = "hf"


def parse_json(text: str | bytes, **options: Any) -> Any:
    """``json.loads`` of what somebody else wrote, in UTF-8.

    Raises:
        ValueError: it is no JSON, or no UTF-8; also where it is nested more deeply than can be read.
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def whole(value: Any) -> int:
    """``value`` of a JSON file where it is an integer of 64 bits; no text that looks like one, no 3.0, no true.

    Raises:
        ValueError: it is anything else.
    """
    if type(value) is not int or value not in INT64:
        raise ValueError(f"{str(value)[:40]!r} is no integer of 64 bits")
    return value


def fsync_directory(directory: str | os.PathLike) -> None:
    """Makes renames inside ``directory`` durable, where the file system can be asked to."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # it syncs files only, as some of FUSE do
            raise
    finally:
        os.close(descriptor)


def fsync_file(path: str | os.PathLike) -> None:
    """Makes the contents of a file that is already written and closed durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that nobody else has. The number of the process would not do: containers of several hosts,
    which write into one directory, may all have the same."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces ``path`` by ``content``: a reader sees the old file or the new one, also after a power cut."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def read_whole(path: str | os.PathLike) -> bytes:
    """The contents of a file that another node may replace at this moment.

    Over a network a file can be gone between its name and its contents (ESTALE, seen on GlusterFS); the new one is
    there then.
    """
    for _ in range(20):
        try:
            return Path(path).read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        time.sleep(0.05)
    return Path(path).read_bytes()


def remove_tree(directory: str | os.PathLike) -> bool:
    """Removes ``directory`` with all that is in it; False where something stays, which a warning names.

    Over NFS a file that a process of this machine has open is renamed to ``.nfs…`` instead of removed, and keeps its
    directory for as long.
    """
    try:
        shutil.rmtree(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise
        logger.warning("%s cannot be removed to its end, as somebody has files of it open: remove the rest", directory)
        return False
    return True


@contextmanager
def temporary_sibling(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; what was written there is synced and renamed on a clean exit.

    On an exception the temporary file is removed and ``path`` is as it was.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def sha256_file(path: str | os.PathLike) -> str:
    """Hex digest of a file's contents."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FollowingDigest:
    """SHA-256 of a file that grows at its end only, taken in a thread behind the one that writes it.

    Hashing and writing take about as long as each other; together they take as long as one. A context manager: leaving
    it ends the thread.

    Args:
        path: exists.
    """

    def __init__(self, path: str | os.PathLike):
        self._digest = hashlib.sha256()
        self._complete = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
        self._done = self._thread.submit(self._follow, path)

    def hexdigest(self) -> str:
        """Of the whole file: call it when everything is written and flushed.

        Raises:
            OSError: the file could not be read.
        """
        self._complete.set()
        self._done.result()
        return self._digest.hexdigest()

    def __enter__(self) -> FollowingDigest:
        return self

    def __exit__(self, *_: object) -> None:
        self._complete.set()
        self._thread.shutdown()

    def _follow(self, path: str | os.PathLike) -> None:
        buffer = memoryview(bytearray(1 << 20))
        with open(path, "rb", buffering=0) as file:
            while True:
                last = self._complete.is_set()  # asked before reading: what is not there after that never comes
                while count := file.readinto(buffer):
                    self._digest.update(buffer[:count])
                if last:
                    return
                self._complete.wait(0.02)


def create_once(path: str | os.PathLike, fill: Callable[[int], None]) -> bool:
    """Makes ``path`` unless it exists. Of several processes or hosts that try at once, one makes it, whole.

    A process that is killed on the way leaves a temporary file beside ``path`` (``.NAME.*.tmp``) and nothing else.

    Args:
        fill: writes the contents to a file descriptor.

    Returns:
        True if this call made it, False if it was there.

    Raises:
        UserError: a file system without hard links, which are what makes this safe.
    """
    path = Path(path)
    if path.exists():
        return False
    temporary = temporary_name(path)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            fill(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            if path.exists():  # sshfs says EPERM where another node was first
                return False
            raise UserError(str(path.parent), "a file system without hard links", "one that has them") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True
