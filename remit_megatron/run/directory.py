"""The run directory: one run at a time, its resolved configuration, its checkpoints, its logs.

run_dir/  config.yaml  metrics.jsonl  validation.jsonl  checkpoints/  tensorboard/  logs/  data_cache/
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO

from remit_megatron.runtime import checkpoints
from remit_megatron.runtime.errors import StartAgain, UserError
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.parallel import broadcast_object, gather_objects, same_fate
from remit_megatron.runtime.progress import format_count

logger = logging.getLogger(__name__)


# What a start makes before it trains.
_MADE_AT_START = (
    *("logs", "config.yaml", "metrics.jsonl", "validation.jsonl", "tensorboard", "wandb", "checkpoints", "data_cache"),
    "events.jsonl",
    ".lock",
)


# How long a start waits for an earlier one of the same Slurm job to let go of the directory.
_OWN_JOB_SECONDS = 120.0


def _job() -> str:
    """``, Slurm job 7`` under Slurm; a job that is requeued keeps its number."""
    number = os.environ.get("SLURM_JOB_ID")
    return "" if number is None else f", Slurm job {number}"


class RunLock:
    """Holds ``run_dir`` for one run; released when the process ends, however it ends."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        self._before = frozenset(os.listdir(run_dir))
        self._file: IO[str] = open(run_dir / ".lock", "a+")  # noqa: SIM115 - held as long as the run
        try:
            self._take(run_dir)
        except OSError as error:
            # Some network file systems have no locks; a run there is on its own.
            logger.warning("run_dir %s cannot be locked (%s): do not start two runs in it", run_dir, error.strerror)
        # A lock belongs to all processes that share the open file: data workers that outlive a killed run by moments
        # must not hold it.
        os.register_at_fork(after_in_child=self._file.close)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{_job()}")
        self._file.flush()

    def _take(self, run_dir: Path) -> None:
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
                if ours and time.monotonic() < deadline:
                    time.sleep(1.0)
                    continue
                self._file.close()
                if ours:
                    raise StartAgain(
                        f"run_dir {run_dir} is still held by an earlier start of this job ({owner}); start it again"
                    ) from None
                raise UserError(
                    "run_dir", f"{run_dir}, in use by {owner}", "a directory that no other run is using"
                ) from None

    def release(self) -> None:
        """Gives the directory free; closing the file also does."""
        self._file.close()

    def undo(self) -> None:
        """Removes what a start has put here that was refused before it trained anything, and the directory itself
        where it was made for it. Index files of data stay: making them takes long."""
        metrics = self._run_dir / "metrics.jsonl"
        if checkpoints.iterations(self._run_dir / "checkpoints") or (metrics.exists() and metrics.stat().st_size):
            return
        for name in _MADE_AT_START:
            path = self._run_dir / name
            if name in self._before or not path.exists():
                continue
            if path.is_file():
                path.unlink()
            elif name != "data_cache" or not any(entry.is_file() for entry in path.rglob("*")):
                shutil.rmtree(path, ignore_errors=True)
        for path in self._made:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()


def log_to_file(run_dir: Path, rank: int) -> logging.Handler:
    """Sends all that is logged (Megatron's prints too) to ``logs/rank_N.log``; the terminal gets our warnings."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    for handler in root.handlers:
        # The libraries' remarks are in the file; on the terminal they would hide ours.
        handler.setLevel(logging.WARNING)
        handler.addFilter(lambda record: record.name.startswith(("remit_megatron", "patches")) and rank == 0)
    handler = logging.FileHandler(run_dir / "logs" / f"rank_{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    return handler


def newest_verified(root: Path, *, rank: int, world_size: int) -> int | None:
    """The newest checkpoint under ``root`` that is whole, agreed on by all ranks, which share the reading.

    One that is not is reported and set aside, so that training again up to its iteration finds an empty place.
    """
    candidates = broadcast_object(checkpoints.iterations(root) if rank == 0 else [])
    for iteration in candidates:
        directory = checkpoints.iteration_directory(root, iteration)
        try:
            checkpoints.verify(directory, part=rank, parts=world_size)
            damage = None
        except (checkpoints.DamagedCheckpoint, OSError) as error:
            damage = str(error)
        damages = [text for text in gather_objects(damage) if text]
        if not damages:
            return iteration
        with same_fate("setting a damaged checkpoint aside"):
            if rank == 0:
                logger.warning("skipping checkpoint %d: %s", iteration, damages[0])
                aside = checkpoints.set_aside(root, iteration)
                if aside is not None:
                    logger.warning("kept the damaged checkpoint as %s", aside)
    return None


def require_space(directory: Path, needed: float, *, what: str) -> None:
    """Refuses to begin what cannot be finished.

    Raises:
        UserError: fewer than ``needed`` bytes are free on the file system of ``directory``.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            "run_dir",
            f"{format_count(free)}B free at {directory}",
            f"at least {format_count(needed)}B, the size of {what}",
        )


def read_config(run_dir: Path) -> str | None:
    """The configuration that the run was trained with so far, as written; None for a new run."""
    path = run_dir / "config.yaml"
    return path.read_text() if path.exists() else None


def write_config(run_dir: Path, text: str) -> None:
    """Writes the resolved configuration; an earlier different one is kept as config.yaml.previous."""
    path = run_dir / "config.yaml"
    if read_config(run_dir) not in (None, text):
        os.replace(path, path.with_suffix(".yaml.previous"))
    write_atomic(path, text)
