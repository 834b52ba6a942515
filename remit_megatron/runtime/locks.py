"""One process at a time in a directory: a lock that a dead process does not hold."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from remit_megatron.runtime.errors import StartAgain, UserError

logger = logging.getLogger(__name__)

# How long a start waits for an earlier one of the same Slurm job to let go of the directory.
_OWN_JOB_SECONDS = 120.0


class DirectoryLock:
    """Holds ``directory`` (made where it is missing); released when the process ends, however it ends.

    Args:
        directory: where the file ``.lock`` stands, with the name of the process that holds it.
        field: how messages name the directory.

    Raises:
        UserError: another process holds it.
        StartAgain: an earlier start of this Slurm job still does, after two minutes.
    """

    def __init__(self, directory: Path, *, field: str = "run_dir"):
        directory.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = open(directory / ".lock", "a+")  # noqa: SIM115 - held as long as the run
        try:
            self._take(directory, field)
        except OSError as error:
            # Some network file systems have no locks; a run there is on its own.
            logger.warning("%s %s cannot be locked (%s): do not start two runs in it", field, directory, error.strerror)
        # A lock belongs to all processes that share the open file: data workers that outlive a killed run by moments
        # must not hold it.
        os.register_at_fork(after_in_child=self._file.close)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{_job()}")
        self._file.flush()

    def _take(self, directory: Path, field: str) -> None:
        """Takes the lock, or says who has it. Where that is an earlier start of this very job, whose node is about to
        notice that it is gone, it is waited for."""
        deadline = time.monotonic() + _OWN_JOB_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._file.seek(0)
                owner = self._file.read().strip() or "another process"
            ours = bool(_job()) and owner.endswith(_job())
            if not ours:
                self._file.close()
                expected = "a directory that no other run is using"
                raise UserError(field, f"{directory}, in use by {owner}", expected)
            if time.monotonic() >= deadline:
                self._file.close()
                text = f"{field} {directory} is still held by an earlier start of this job ({owner}); start it again"
                raise StartAgain(text)
            time.sleep(1.0)

    def release(self) -> None:
        """Gives the directory free; closing the file also does."""
        self._file.close()


def _job() -> str:
    """``, Slurm job 7`` under Slurm; a job that is requeued keeps its number."""
    number = os.environ.get("SLURM_JOB_ID")
    return "" if number is None else f", Slurm job {number}"
