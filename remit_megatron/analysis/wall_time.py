"""Where the time of a run went, from the log of its first rank: training that counts, saving, validating, evaluating,
starting, and what was done and lost.

The log is appended to over all starts of a run. Time before a process writes its first line (Python's imports) is not
in it. Steps behind the last save of a start are lost where the next start resumes at that save. A killed process writes
no last line: TensorBoard's event files, one a start with the time of each step, say longer than the log until when it
worked, but they too are written in portions. So what was lost is a lower bound, and the rest of it counts as stopped.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ")
_SETUP = re.compile(r"\[after in-process setup and before initialize_megatron\] datetime: (\S+ \S+)")
_LOOP = "[before the start of training step]"
_SAVING = re.compile(r"saving checkpoint at iteration\s+(\d+)")
_SAVED = re.compile(r"successfully saved checkpoint from iteration\s+(\d+)")
_VALIDATING = re.compile(r"Evaluating iter \d+/\d+")
_RESUMED = re.compile(r"resuming at step (\d+)")


@dataclass
class Start:
    """One process of rank 0, from its first line to its last."""

    first: datetime
    last: datetime
    resumed_at: int = 0
    loop: datetime | None = None
    saved_step: int | None = None
    saved_at: datetime | None = None
    saving: float = 0.0
    validating: float = 0.0
    busy_after_save: float = 0.0  # seconds of validation since the last save
    saving_since: datetime | None = None
    validating_since: datetime | None = None


@dataclass
class WallTime:
    """Seconds by cause; they add up to ``total``.

    Attributes:
        causes: ``training`` (steps that count), ``saving``, ``validation``, ``evaluation`` (suites), ``starting``,
            ``lost`` (done again later), ``other``.
        starts: processes, in order.
        resumed_at: step at which each start went on.
        stopped: seconds between starts in which nothing ran; not part of ``total``.
    """

    causes: dict[str, float]
    total: float
    stopped: float
    resumed_at: list[int] = field(default_factory=list)

    @property
    def effective(self) -> float:
        """Share of the running time in which steps were trained that count."""
        return self.causes["training"] / self.total if self.total else 0.0


def wall_time(log: Path, *, training_seconds: float, evaluation_seconds: float = 0.0) -> WallTime | None:
    """Reads the log of rank 0.

    Args:
        training_seconds: of the steps that count, from metrics.jsonl.
        evaluation_seconds: of the evaluations that count, from evaluation.jsonl.

    Returns:
        None where there is no log, or no start can be found in it.
    """
    if not log.is_file():
        return None
    starts = _starts(log)
    if not starts:
        return None
    _extend(starts, log.parent.parent / "tensorboard")
    total = sum((start.last - start.first).total_seconds() for start in starts)
    stopped = sum((b.first - a.last).total_seconds() for a, b in pairwise(starts))
    causes = {
        "training": training_seconds,
        "saving": sum(start.saving for start in starts),
        "validation": sum(start.validating for start in starts),
        "evaluation": 0.0,
        "starting": sum(((start.loop or start.last) - start.first).total_seconds() for start in starts),
        "lost": sum(_lost(a, b) for a, b in pairwise(starts)),
    }
    # The clock of the steps and that of the log differ by moments; a share above all there is would be no share.
    causes["training"] = min(causes["training"], max(0.0, total - sum(causes.values()) + causes["training"]))
    causes["evaluation"] = min(evaluation_seconds, max(0.0, total - sum(causes.values())))
    causes["other"] = max(0.0, total - sum(causes.values()))
    return WallTime(causes, total, max(0.0, stopped), [start.resumed_at for start in starts])


def _lost(start: Start, following: Start) -> float:
    """Seconds of steps that the following start does again."""
    if start.loop is None:
        return 0.0
    if start.saved_at is not None and start.saved_step == following.resumed_at:
        return max(0.0, (start.last - start.saved_at).total_seconds() - start.busy_after_save)
    if following.resumed_at <= start.resumed_at:  # nothing that this start did was kept
        return max(0.0, (start.last - start.loop).total_seconds() - start.saving - start.validating)
    return 0.0


def _extend(starts: list[Start], folder: Path) -> None:
    """Moves the end of each start to its last step in the event files."""
    times = [
        datetime.fromtimestamp(seconds)
        for file in folder.glob("events.out.tfevents.*")
        for seconds in _event_times(file)
    ]
    for position, start in enumerate(starts):
        end = starts[position + 1].first if position + 1 < len(starts) else datetime.max
        start.last = max([start.last, *(time for time in times if start.first <= time < end)])


def _event_times(file: Path) -> Iterator[float]:
    """Seconds since 1970 of each record of an event file (TFRecord: length, checksum, Event message, checksum)."""
    with open(file, "rb") as stream:
        while len(header := stream.read(12)) == 12:
            (length,) = struct.unpack_from("<Q", header)
            message = stream.read(length)
            if len(message) < length or len(message) < 9 or message[0] != 0x09:  # field 1, a double: wall_time
                return
            yield struct.unpack_from("<d", message, 1)[0]
            stream.seek(4, 1)


def _starts(log: Path) -> list[Start]:
    starts: list[Start] = []
    stamps: list[datetime] = []  # of the lines since the last start began
    resumed: tuple[datetime, int] | None = None
    with open(log, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            stamp = _STAMP.match(line)
            if stamp is None:
                continue
            now = datetime.strptime(stamp[1], "%Y-%m-%d %H:%M:%S,%f")
            if says := _RESUMED.search(line):
                resumed = now, int(says[1])
            elif begins := _SETUP.search(line):
                # A process writes a few lines before this one, which says when it began; resuming comes first of all.
                first = min(now, datetime.strptime(begins[1], "%Y-%m-%d %H:%M:%S.%f"))
                step = 0
                if resumed is not None:
                    first, step = min(first, resumed[0]), resumed[1]
                if starts:
                    _finish(starts[-1], max([starts[-1].first, *(time for time in stamps if time < first)]))
                starts.append(Start(first=first, last=now, resumed_at=step))
                stamps, resumed = [], None
            elif starts:
                _event(starts[-1], line, now)
            stamps.append(now)
    if starts:
        _finish(starts[-1], max([starts[-1].last, *stamps]))
    return starts


def _event(start: Start, line: str, now: datetime) -> None:
    if start.validating_since is not None and not _VALIDATING.search(line):
        seconds = (now - start.validating_since).total_seconds()
        start.validating += seconds
        start.busy_after_save += seconds
        start.validating_since = None
    if _LOOP in line:
        start.loop = now
    elif _SAVING.search(line):
        start.saving_since = now
    elif saved := _SAVED.search(line):
        if start.saving_since is not None:
            start.saving += (now - start.saving_since).total_seconds()
        start.saving_since, start.saved_step, start.saved_at = None, int(saved[1]), now
        start.busy_after_save = 0.0
    elif _VALIDATING.search(line) and start.validating_since is None:
        start.validating_since = now


def _finish(start: Start, last: datetime) -> None:
    start.last = last
    if start.validating_since is not None:
        start.validating += max(0.0, (last - start.validating_since).total_seconds())
        start.validating_since = None
    if start.saving_since is not None:  # killed while saving: what it did since the save before is lost anyway
        start.saving_since = None
