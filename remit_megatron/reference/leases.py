"""Who works on what: leases on pieces of work, in a folder that all jobs share. No server, no locks.

A lease is a file made with O_EXCL; its owner touches it while it works and removes it when done. A lease that was not
touched for a while (its job was killed) is taken over by renaming it away, which only one of several takers can do.
Correctness never depends on leases: work that is done twice gives the same scores. They save work.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import json
import os
import socket
import time
import uuid
from pathlib import Path

from remit_megatron.runtime.locks import kernel

STALE_SECONDS = 600.0


class Taken(enum.Enum):
    """How a lease was had."""

    FREE = "free"
    ABANDONED = "abandoned"  # its owner is gone; what it wrote last may not be whole


class Leases:
    """Leases in one folder.

    Args:
        folder: made if it is not there.
        stale_seconds: a lease of another host that was not touched for so long is free. On the same host a lease is
            free as soon as its process is gone.
    """

    def __init__(self, folder: Path, *, stale_seconds: float = STALE_SECONDS):
        self._folder = folder
        self._stale_seconds = stale_seconds
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> Taken | None:
        """Takes a lease; None where somebody else has it."""
        path, taken = self._folder / name, Taken.FREE
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                if not self._abandoned(path):
                    return None
                with contextlib.suppress(OSError):
                    gone = self._folder / f".{name}.{uuid.uuid4().hex}"
                    os.rename(path, gone)
                    os.unlink(gone)
                    taken = Taken.ABANDONED
                continue
            with os.fdopen(descriptor, "w") as file:
                json.dump({"host": socket.gethostname(), "kernel": kernel(), "process": os.getpid()}, file)
            return taken
        return None

    def names(self) -> set[str]:
        """All leases that somebody has, or had when it was killed."""
        return {name for name in os.listdir(self._folder) if not name.startswith(".")}

    def keep(self, name: str) -> None:
        """Says that the owner is still at work."""
        with contextlib.suppress(OSError):
            os.utime(self._folder / name)

    def release(self, name: str) -> None:
        """Gives a lease back."""
        (self._folder / name).unlink(missing_ok=True)

    def _abandoned(self, path: Path) -> bool:
        try:
            touched = path.stat().st_mtime
            owner = json.loads(path.read_text() or "{}")
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.ESTALE)  # given back a moment ago; else nobody can tell
        except ValueError:
            owner = {}
        # Containers of several machines may have one name, and on one machine numbers of their own.
        here = [*kernel()]
        ours = owner.get("host") == socket.gethostname() and owner.get("kernel", here) == here
        if ours and not _alive(owner.get("process")):
            return True
        return self._now() - touched > self._stale_seconds

    def _now(self) -> float:
        """The time by the clock of the file system, which may be another machine's."""
        probe = self._folder / f".clock.{socket.gethostname()}.{os.getpid()}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)


def _alive(process: object) -> bool:
    if not isinstance(process, int):
        return True  # its owner is writing it at this moment
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
