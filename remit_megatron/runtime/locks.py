"""One process at a time in a directory: a lock that a dead process does not hold."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from remit_megatron.runtime.errors import UserError

logger = logging.getLogger(__name__)


class DirectoryLock:
    """Holds ``directory`` (made where it is missing); released when the process ends, however it ends.

    Args:
        directory: where the file ``.lock`` stands, with the name of the process that holds it.
        field: how messages name the directory.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, directory: Path, *, field: str = "run_dir"):
        directory.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = open(directory / ".lock", "a+")  # noqa: SIM115 - held as long as the run
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                field, f"{directory}, in use by {owner}", "a directory that no other run is using"
            ) from None
        except OSError as error:
            # Some network file systems have no locks; a run there is on its own.
            logger.warning("%s %s cannot be locked (%s): do not start two runs in it", field, directory, error.strerror)
        # A lock belongs to all processes that share the open file: data workers that outlive a killed run by moments
        # must not hold it.
        os.register_at_fork(after_in_child=self._file.close)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Gives the directory free; closing the file also does."""
        self._file.close()
