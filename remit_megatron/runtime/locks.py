"""One process at a time in a directory: a lock that a dead process does not hold, also over a network.

Two things keep a second process out. A lock of the operating system on ``.lock``: it ends with its process, at once.
Some file systems have none, and some keep it to the machine that asked (Lustre with ``localflock``, NFS with
``local_lock``, sshfs), where it is granted on every node. So there is the holder as well: ``.lock.N``, made with O_EXCL
and touched every few seconds, which says who it is. A holder that cannot be asked, because it is on another machine, is
watched; it is gone when it was not touched while it should have been several times. Nobody removes the holder of
somebody else to take its place: N + 1 is made, which only one can do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from remit_megatron.runtime.errors import EXIT_BAD_INPUT, StartAgain, UserError
from remit_megatron.runtime.files import read_whole

logger = logging.getLogger(__name__)

# How long a start waits for an earlier one of the same Slurm job to let go of the directory.
_OWN_JOB_SECONDS = 120.0
# A holder touches its file so often, and is watched for so long: clients of network file systems keep what they know of
# a file for up to 20 s.
_TOUCH_SECONDS = 5.0
_WATCH_SECONDS = 45.0
# Not touched for so long it is gone, whatever the clocks of two machines differ by.
_LONG_AGO_SECONDS = 3600.0

_HOLDER = re.compile(r"\.lock\.(\d+)")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_EXPECTED = "a directory that no other run is using"


@dataclass(frozen=True)
class Holder:
    """Who holds a directory.

    Attributes:
        text: for people.
        machine: the boot of its kernel.
        processes: the namespace in which ``process`` is its number.
        process: its number.
        started: when, by its kernel; numbers are used again.
        mount: the device number of the directory there.
    """

    text: str
    machine: str
    processes: str
    process: int
    started: str
    mount: int

    @classmethod
    def this_process(cls, directory: Path) -> Holder:
        """This process, as holder of ``directory``."""
        process = os.getpid()
        text = f"process {process} on {socket.gethostname()}{_job()}"
        return cls(text, *kernel(), process, _started(process), os.stat(directory).st_dev)

    def is_gone(self, here: Holder, *, locked: bool) -> bool | None:
        """Whether it has ended, as far as this machine knows; None where only watching can tell.

        Args:
            here: this process.
            locked: this process has the lock of the operating system.
        """
        if not self.machine or self.machine != here.machine:
            return None
        if locked and self.mount == here.mount:  # one kernel gives it once
            return True
        if self.processes != here.processes:
            return None
        return _started(self.process) != self.started


class DirectoryLock:
    """Holds ``directory`` (made where it is missing); released when the process ends, however it ends.

    Args:
        directory: where the files ``.lock`` and ``.lock.N`` stand, with the name of the process that holds it.
        field: how messages name the directory.

    Raises:
        UserError: another process holds it.
        StartAgain: an earlier start of this Slurm job still does, after two minutes.
    """

    def __init__(self, directory: Path, *, field: str = "run_dir"):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._field = directory, field
        self._held: Path | None = None
        self._released = threading.Event()
        self._file: IO[str] = open(directory / ".lock", "a+")  # noqa: SIM115 - held as long as the run
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        # A lock belongs to all processes that share the open file: data workers that outlive a killed run by moments
        # must not hold it.
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._touch, daemon=True, name=f"lock of {directory}").start()

    def release(self) -> None:
        """Gives the directory free; the end of the process also does."""
        self.withdraw()
        self._file.close()

    def withdraw(self) -> None:
        """Removes what names this process as the holder; the lock itself stays."""
        self._released.set()
        if self._held is not None:
            with contextlib.suppress(OSError):
                self._held.unlink()
            self._held = None

    def _forget(self) -> None:
        """In a forked child, which holds nothing."""
        self._held = None
        self._file.close()

    def _take(self) -> None:
        """Takes the directory, or says who has it. Where that is an earlier start of this very job, whose node is about
        to notice that it is gone, it is waited for."""
        deadline = time.monotonic() + _OWN_JOB_SECONDS
        here = Holder.this_process(self._directory)
        while True:
            locked = self._lock()
            owner = self._named() if locked is False else self._become_holder(here, locked=bool(locked))
            if owner is None:
                self._file.truncate(0)
                self._file.write(here.text)
                self._file.flush()
                return
            if not (_job() and owner.endswith(_job())):
                raise UserError(self._field, f"{self._directory}, in use by {owner}", _EXPECTED)
            if time.monotonic() >= deadline:
                text = f"{self._field} {self._directory} is still held by an earlier start of this job ({owner})"
                raise StartAgain(f"{text}; start it again")
            time.sleep(1.0)

    def _lock(self) -> bool | None:
        """Whether the operating system gives its lock; None where the file system has none."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s %s is on a file system without locks (%s): a file that its holder touches every %g s stands in",
                *(self._field, self._directory, error.strerror, _TOUCH_SECONDS),
            )
            return None
        return True

    def _named(self) -> str:
        """Who has the lock, by the files."""
        newest = _newest(self._directory)
        holder = _read(self._directory / f".lock.{newest}") if newest else None
        if holder is not None:
            return holder.text
        with open(self._directory / ".lock") as file:
            return file.read().strip() or "another process"

    def _become_holder(self, here: Holder, *, locked: bool) -> str | None:
        """Makes this process the holder; else returns who is."""
        while True:
            newest = _newest(self._directory)
            before = self._directory / f".lock.{newest}"
            if newest and not self._gone(before, here, locked=locked):
                holder = _read(before)
                return "another process" if holder is None else holder.text
            mine = self._directory / f".lock.{newest + 1}"
            try:
                with open(mine, "x") as file:
                    json.dump(asdict(here), file)
            except FileExistsError:  # the list of names that this machine keeps may be of before
                time.sleep(0.05)
                continue
            except OSError:  # a full disk
                mine.unlink(missing_ok=True)
                raise
            # One that has looked long ago may come late, with a number that somebody has had since.
            if _newest(self._directory) > newest + 1:
                mine.unlink(missing_ok=True)
                continue
            self._held = mine
            for number in _numbers(self._directory):
                if number <= newest:
                    (self._directory / f".lock.{number}").unlink(missing_ok=True)
            return None

    def _gone(self, path: Path, here: Holder, *, locked: bool) -> bool:
        """Whether the holder of ``path`` has ended; watches it where nothing else tells."""
        holder = _read(path)
        if holder is not None and (gone := holder.is_gone(here, locked=locked)) is not None:
            return gone
        first = _touched(path)
        if first is None or self._clock() - first > _LONG_AGO_SECONDS:
            return True
        who = "a process that does not say who it is" if holder is None else holder.text
        logger.warning(
            "%s %s was last held by %s, which cannot be asked from here: watching for %g s whether it lives",
            *(self._field, self._directory, who, _WATCH_SECONDS),
        )
        deadline, seen = time.monotonic() + _WATCH_SECONDS, 0
        while time.monotonic() < deadline:
            time.sleep(min(1.0, _TOUCH_SECONDS))
            touched = _touched(path)
            if touched is None:
                return True
            if touched != first:
                first, seen, deadline = touched, seen + 1, time.monotonic() + _WATCH_SECONDS
            if seen == 2:  # one may have been made before this machine looked, and come to it late
                return False
        return True

    def _clock(self) -> float:
        """The time by the clock of the file system, or of this machine as it tells the file system."""
        os.utime(self._file.fileno())
        return os.fstat(self._file.fileno()).st_mtime

    def _touch(self) -> None:
        """Says that this process lives. Where another has taken it for dead, which it was not, this one ends."""
        held = self._held
        while held is not None and not self._released.wait(_TOUCH_SECONDS):
            try:
                os.utime(held)
            except FileNotFoundError:
                newest = _newest(self._directory)
                if self._released.is_set() or newest <= int(held.name.rpartition(".")[2]):
                    continue
                other = _read(self._directory / f".lock.{newest}")
                found = "another process" if other is None else other.text
                line = UserError(self._field, f"{self._directory}, taken over by {found}", _EXPECTED)
                sys.stderr.write(f"error: {line}; this process did not touch {held} for {_WATCH_SECONDS:g} s\n")
                sys.stderr.flush()
                os._exit(EXIT_BAD_INPUT)  # nothing may be written any more
            except OSError:  # the next time
                continue


def lives(directory: Path, *, now: float) -> bool | None:
    """Whether a process that holds ``directory`` lives; changes nothing, and waits for nothing.

    Args:
        now: seconds since 1970, by a clock that is about that of the file system.

    Returns:
        None where that cannot be told from here, or nobody says that it holds the directory.
    """
    newest = _newest(directory)
    path = directory / f".lock.{newest}"
    holder, touched = (_read(path), _touched(path)) if newest else (None, None)
    if holder is None or touched is None:
        return None
    if (gone := holder.is_gone(Holder.this_process(directory), locked=False)) is not None:
        return not gone
    if now - touched < _WATCH_SECONDS:
        return True
    return False if now - touched > _LONG_AGO_SECONDS else None


def _numbers(directory: Path) -> list[int]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return [int(match.group(1)) for match in map(_HOLDER.fullmatch, names) if match]


def _newest(directory: Path) -> int:
    """The number of the newest holder; 0 where there is none."""
    return max(_numbers(directory), default=0)


def _read(path: Path) -> Holder | None:
    """What a holder says of itself; None where it is gone, or about to write."""
    try:
        return Holder(**json.loads(read_whole(path)))
    except (OSError, ValueError, TypeError):
        return None


def _touched(path: Path) -> float | None:
    """When a file was touched last; None where it is gone. Opening it asks the server, which a question for its
    attributes alone need not."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return None


def keep_out(file: IO, *, what: object, second: str) -> bool:
    """Locks an open file, which ends with the process; False where another process has it.

    Where the file system has no locks, one line says that nothing keeps a ``second`` user of ``what`` out.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): nothing keeps a second %s out", what, error.strerror, second)
    return True


def kernel() -> tuple[str, str]:
    """The boot of this machine's kernel, and the namespace of process numbers in it. The name of a host is not enough:
    many containers have the same."""
    return _said("/proc/sys/kernel/random/boot_id"), _said("/proc/self/ns/pid")


def _said(name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(name) if os.path.islink(name) else Path(name).read_text().strip()
    return ""


def _started(process: int) -> str:
    """When a process of this machine was started, in ticks; empty where there is none, or what is left of one."""
    try:
        # Behind the name, which may have anything in it.
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except (OSError, IndexError):
        return ""


def _job() -> str:
    """``, Slurm job 7`` under Slurm; a job that is requeued keeps its number."""
    number = os.environ.get("SLURM_JOB_ID")
    return "" if number is None else f", Slurm job {number}"
