"""``events.jsonl`` of a run directory: its starts, its ends and what went wrong between, for :mod:`remit status`.

One line each, with ``time`` (seconds since 1970) and ``event``: ``start`` (``step`` it goes on from, ``ranks``,
``host``, under Slurm ``job`` and ``restart``; ``device`` and ``versions`` of what computes), ``end`` (``step``,
``code``, or ``reason`` of an error), ``fault`` (``text``), ``spike`` (a step that was skipped or gone back from, with
its samples) and ``slow`` (the ranks that hold the others up from here on, or none). A start without an end before the
next one was a crash. Nothing that trains reads this file.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
import time
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


class RunEvents(logging.Handler):
    """Writes the events of one start; what this package warns of becomes a fault.

    Nothing is written before :meth:`start`, so that a run that is refused leaves no trace. A file that cannot be
    written to is no reason to end a run.

    Args:
        run_dir: the run's directory.
        writes: whether this rank is the one that does.
    """

    def __init__(self, run_dir: str | os.PathLike, *, writes: bool):
        super().__init__(logging.WARNING)
        self._path = Path(run_dir) / EVENTS_FILE
        self._writes = writes
        self._waiting: list[dict[str, Any]] = []
        self._started = False

    def start(self, *, step: int, ranks: int) -> None:
        """The run is about to train, from ``step`` on."""
        self._started = True
        slurm = {
            name: os.environ[variable]
            for name, variable in (("job", "SLURM_JOB_ID"), ("restart", "SLURM_RESTART_COUNT"))
            if variable in os.environ
        }
        made_with = {"device": _device(), "versions": _versions()}
        self._write("start", step=step, ranks=ranks, host=socket.gethostname(), **slurm, **made_with)
        for event in self._waiting:
            self._append(event)

    def end(self, *, step: int, **how: Any) -> None:
        """The run has ended, by itself (``code``) or by an error (``reason``)."""
        if self._started:
            self._write("end", step=step, **how)

    def note(self, event: str, **fields: Any) -> None:
        """Something that is no fault of the program: a loss spike, a slow rank."""
        if self._started:
            self._write(event, **fields)

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a warning of this package."""
        if record.name.startswith(("remit_megatron", "patches")):
            event = {"time": round(time.time(), 1), "event": "fault", "text": " ".join(record.getMessage().split())}
            if self._started:
                self._append(event)
            else:
                self._waiting.append(event)

    def _write(self, event: str, **fields: Any) -> None:
        self._append({"time": round(time.time(), 1), "event": event, **fields})

    def _append(self, event: dict[str, Any]) -> None:
        if not self._writes:
            return
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps(event) + "\n")
        except OSError:
            pass


def _device() -> str:
    """What a rank computes on: the GPU's name, or the kind of processor."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def _versions() -> dict[str, str]:
    """Of the packages that numbers depend on, where they are installed."""
    found = {}
    for name in ("remit_megatron", "torch", "megatron-core", "transformer-engine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **found}
