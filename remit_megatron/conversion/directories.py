"""Output directories that are complete or absent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import fsync_directory, fsync_file, temporary_name


@contextmanager
def complete_directory(path: str | os.PathLike, *, field: str, needed_bytes: int) -> Iterator[Path]:
    """Yields a new empty directory beside ``path``, which becomes ``path`` on a clean exit and is removed on an error.

    Args:
        path: what must not exist yet, or be an empty directory.
        field: how messages name it.
        needed_bytes: about what will be written; less free space is refused before any work starts.

    Raises:
        UserError: ``path`` exists, its parent cannot be written, or the disk is too full.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(field, f"{path}, which exists", "a name that is not taken")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needed_bytes:
            raise UserError(
                field, f"{free / 1e9:.1f} GB free in {path.parent}", f"at least {needed_bytes / 1e9:.1f} GB"
            )
        temporary = temporary_name(path)
        temporary.mkdir()
    except OSError as error:
        raise UserError(field, f"{path} ({error.strerror})", "a place that can be written") from None
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                fsync_file(file)
        try:
            if path.exists():
                path.rmdir()
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise UserError(field, f"{path}, which another process has made", "a name that is not taken") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)
