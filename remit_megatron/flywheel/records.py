"""What a flywheel remembers: a record in each stage's directory, one state of all, and a log of what happened.

    run_dir/  config.yaml  state.json  events.jsonl  results.json  report.html  digests.json
    run_dir/stages/NAME-KEY/  stage.json  log.txt  and what the stage's command writes

``stage.json`` counts: one process writes it, the one that holds the stage. ``state.json`` is put together from these
after every change, so that nothing is lost where several jobs are at work.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import fsync_directory, write_atomic

RECORD = "stage.json"
LOG = "log.txt"
FORMAT = "remit_megatron flywheel stage"
VERSION = 1


@dataclass
class Record:
    """What is known of one stage's directory.

    Attributes:
        content: what its key is the digest of.
        status: ``running``, ``stopped``, ``failed`` or ``done``.
        code: exit code of its last start.
        outputs: of ``outputs.describe``, where it is done.
        consumed: digest of each result that it took, by id of the stage.
        source: digest of the sources that it ran with.
        process: pid, start time and host of whoever is at it.
        starts: when it was started, and how each start ended.
        note: one line on why it failed.
    """

    id: str
    key: str
    content: dict[str, Any]
    status: str = "running"
    code: int | None = None
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    consumed: dict[str, str] = field(default_factory=dict)
    source: str = ""
    process: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""

    @property
    def seconds(self) -> float:
        """How long its starts took, as far as their ends are known."""
        return sum(start.get("seconds", 0.0) for start in self.starts)


def read_record(directory: Path) -> Record | None:
    """The record of a stage's directory, or None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = directory / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"no JSON ({error})", "what remit flywheel wrote; or no such directory") from None
    if not isinstance(content, dict) or (content.pop("format", None), content.pop("version", None)) != (
        FORMAT,
        VERSION,
    ):
        raise UserError(str(path), "another format", f"{FORMAT}, version {VERSION}")
    try:
        return Record(**content)
    except TypeError as error:
        raise UserError(str(path), str(error), f"{FORMAT}, version {VERSION}") from None


def write_record(directory: Path, record: Record) -> None:
    """Replaces the record, whole."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "version": VERSION, **asdict(record)}
    write_atomic(directory / RECORD, json.dumps(content, indent=1) + "\n")


def write_event(run_dir: Path, **what: Any) -> None:
    """Adds a line to ``events.jsonl``, on the disk when this returns. A line is one write: jobs may share the file."""
    line = json.dumps({"time": now(), "host": socket.gethostname(), "pid": os.getpid(), **what}) + "\n"
    new = not (run_dir / "events.jsonl").exists()
    descriptor = os.open(run_dir / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        fsync_directory(run_dir)


def now() -> str:
    """The time in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def this_process() -> dict[str, Any]:
    """What tells this process from a later one of the same number."""
    return {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}


def is_alive(process: dict[str, Any]) -> bool | None:
    """Whether a process is still there; None where it is on another host and nobody can say."""
    if process.get("host") != socket.gethostname():
        return None
    return process.get("started") is not None and _started(int(process["pid"])) == process["started"]


def _started(pid: int) -> str | None:
    """Start of a process in clock ticks since boot, with the boot; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{fields[19]}"
    except (OSError, IndexError):
        return None
