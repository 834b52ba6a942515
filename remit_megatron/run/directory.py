"""The run directory: one run at a time, its resolved configuration, its checkpoints, its logs.

run_dir/  config.yaml  metrics.jsonl  validation.jsonl  checkpoints/  tensorboard/  logs/  data_cache/
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from remit_megatron.runtime import checkpoints
from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.files import read_whole, write_atomic
from remit_megatron.runtime.locks import DirectoryLock
from remit_megatron.runtime.parallel import broadcast_object, gather_objects, same_fate
from remit_megatron.runtime.progress import format_count
from remit_megatron.runtime.yaml_file import read_yaml

logger = logging.getLogger(__name__)


# What a start makes before it trains.
_MADE_AT_START = (
    *("logs", "config.yaml", "metrics.jsonl", "validation.jsonl", "tensorboard", "wandb", "checkpoints", "data_cache"),
    "events.jsonl",
    ".lock",
)


class RunLock(DirectoryLock):
    """Holds ``run_dir`` for one run; released when the process ends, however it ends."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError("run_dir", f"{run_dir}, a file", "a directory") from None
        self._before = frozenset(os.listdir(run_dir))
        super().__init__(run_dir)

    def undo(self) -> None:
        """Removes what a start has put here that was refused before it trained anything, and the directory itself
        where it was made for it. Index files of data stay: making them takes long."""
        metrics = self._run_dir / "metrics.jsonl"
        if checkpoints.iterations(self._run_dir / "checkpoints") or (metrics.exists() and metrics.stat().st_size):
            return
        self.withdraw()
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
    """The configuration that the run was trained with so far, as written; None for a new run.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        return None
    expected = "the configuration that the run was last trained with; without the file its checkpoints alone are asked"
    content = read_yaml(path, field="run_dir", expected=expected)
    if not isinstance(content, dict):
        raise UserError(str(path), show(content), expected)
    return read_whole(path).decode()


def write_config(run_dir: Path, text: str) -> None:
    """Writes the resolved configuration; an earlier different one is kept as config.yaml.previous."""
    path = run_dir / "config.yaml"
    if read_config(run_dir) not in (None, text):
        os.replace(path, path.with_suffix(".yaml.previous"))
    write_atomic(path, text)
