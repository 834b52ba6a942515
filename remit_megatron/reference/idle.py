"""Work in the pauses of a pipeline: measured, planned, and the same on all ranks that must act alike.

On a GPU the host runs ahead of the device and cannot see whether a neighbor's data has come. So nothing polls: the
first steps leave the pauses empty and time them (events in the stream on a GPU), and the length of each quantum of
work; from then on every pause gets the number of quanta that fit into it. A pause that is filled no longer than it
would have lasted changes nothing for the neighbors, so the plan stays right once it is followed.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import distributed as dist

from remit_megatron.runtime.parallel import device

logger = logging.getLogger(__name__)

# A quantum may stick out of its pause by this share of its own length: measured lengths are uncertain by about as much.
TOLERANCE = 0.15

Mark = Any
_NO_MORE = object()


def mark() -> Mark:
    """The present moment: on a GPU that of its stream, recorded without waiting for it."""
    if torch.cuda.is_available():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def seconds_between(first: Mark, second: Mark) -> float:
    """Seconds from one mark to a later one; on a GPU this waits until the stream has come that far."""
    if isinstance(first, float):
        return second - first
    second.synchronize()
    return first.elapsed_time(second) / 1000


def plan(pauses: Sequence[float], quanta: Sequence[float]) -> list[int]:
    """How many quanta go into each pause, in order.

    Args:
        pauses: seconds of each pause, in the order of the step.
        quanta: seconds of each quantum, in the order of the work.
    """
    counts, done = [], 0
    for room in pauses:
        first = done
        while done < len(quanta) and quanta[done] * (1 - TOLERANCE) <= room:
            room -= quanta[done]
            done += 1
        counts.append(done - first)
    return counts


class _Steps:
    """What is known of the steps of one kind (one number of microbatches)."""

    def __init__(self) -> None:
        self.begun = 0
        self.pauses: list[list[float]] = []
        self.quanta: list[list[float]] = []
        self.plan: list[int] = []


class IdleFiller:
    """Runs quanta of work where a pipeline rank waits for its neighbors.

    Args:
        group: gives the ranks that communicate inside a quantum (tensor and context parallel ranks of one stage), or
            None where there are none. They follow one plan: that of the shortest pauses and the longest quanta.
        warmup: steps before the first measurement.
        measured: steps of one measurement; their median counts.
        kept: steps that follow a plan before pauses are measured again. Steps that measure leave the pauses empty.
    """

    def __init__(
        self,
        *,
        group: Callable[[], dist.ProcessGroup | None] = lambda: None,
        warmup: int = 1,
        measured: int = 3,
        kept: int = 500,
    ):
        self._group = group
        self._warmup, self._measured, self._kept = warmup, measured, kept
        self._steps: dict[int, _Steps] = {}
        self._work: Iterator[None] | None = None
        self._current = _Steps()
        self._measuring = False
        self._pause = 0
        self._marks: list[tuple[Mark, Mark]] = []
        self._quanta_marks: list[Mark] = []
        self.filled = 0
        """Quanta that ran in pauses since the start."""
        self.left_over = 0
        """Quanta that ran behind the schedule since the start."""

    def wait(self, wait: Callable[[], Any]) -> Any:
        """What stands in the place of a wait: the quanta that are planned there, then the wait itself."""
        if self._work is None:
            return wait()
        number, counts = self._pause, self._current.plan
        self._pause += 1
        if self._measuring:
            start = mark()
            wait()
            self._marks.append((start, mark()))
            return None
        for _ in range(counts[number] if number < len(counts) else 0):
            if not self._run_one():
                break
            self.filled += 1
        return wait()

    @contextmanager
    def step(self, work: Iterator[None], *, kind: int) -> Generator[None]:
        """While the context lasts, pauses are filled; what did not fit runs at its end, or at :meth:`finish`.

        Args:
            work: each ``next`` runs one quantum. On ranks of one group the same number, with the same communication.
            kind: steps of one kind have the same pauses (the number of microbatches).
        """
        assert self._work is None, "one step at a time"
        self._begin(kind)
        self._work = work
        try:
            yield
            self.finish()
            if self._measuring:
                self._note()
        finally:
            self._work = None

    def finish(self) -> None:
        """Runs what is left of the step's work."""
        if self._measuring and not self._quanta_marks:
            self._quanta_marks.append(mark())
        while self._work is not None and self._run_one():
            self.left_over += 1
            if self._measuring:
                self._quanta_marks.append(mark())

    def _run_one(self) -> bool:
        assert self._work is not None
        return next(self._work, _NO_MORE) is not _NO_MORE

    def _begin(self, kind: int) -> None:
        self._current = current = self._steps.setdefault(kind, _Steps())
        after = current.begun - self._warmup
        position = after % (self._measured + self._kept)
        self._measuring = after >= 0 and position < self._measured
        if after >= 0 and position == self._measured and current.pauses:
            self._renew(current)
        current.begun += 1
        self._pause = 0
        self._marks, self._quanta_marks = [], []

    def _note(self) -> None:
        current = self._current
        current.pauses.append([seconds_between(*pair) for pair in self._marks])
        current.quanta.append([seconds_between(*pair) for pair in pairwise(self._quanta_marks)])

    def _renew(self, current: _Steps) -> None:
        """A plan from the measured steps. Collective over the group."""
        pauses = [statistics.median(values) for values in zip(*current.pauses, strict=False)]
        quanta = [statistics.median(values) for values in zip(*current.quanta, strict=False)]
        current.pauses, current.quanta = [], []
        group = self._group()
        if group is not None and group.size() > 1:
            agreed = torch.tensor([-pause for pause in pauses] + quanta, dtype=torch.float64, device=device())
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
            values = agreed.tolist()
            pauses, quanta = [-value for value in values[: len(pauses)]], values[len(pauses) :]
        current.plan = plan(pauses, quanta)
        logger.info(
            "pauses of the pipeline: %.1f ms in %d waits; scoring ahead: %.1f ms in %d parts, of which %d fit",
            1000 * sum(pauses),
            len(pauses),
            1000 * sum(quanta),
            len(quanta),
            sum(current.plan),
        )
