"""Which ranks hold the others up: a GPU that is too hot, a host that is busy with something else, a slow disk.

In a step all ranks wait for the slowest, so that the step's time names nobody. What is measured is what a rank does
before it waits for other replicas of the model: it reads its samples and makes its forward passes. Ranks are compared
with those that have the same layers, in the other replicas. Ranks of one tensor- or context-parallel group wait for
each other inside of a forward pass: they are slow together, and named together. With ``overlap_param_gather`` the
others wait for a slow rank's parameters in their forward passes, too, so that its ratio is smaller than its delay.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from remit_megatron.runtime import parallel

logger = logging.getLogger(__name__)

STEPS = 10  # of an interval
_IN_A_ROW = 3  # intervals after which a rank is slow, or is not any more


class OwnTime:
    """Seconds of this rank's own work in the steps since it was last asked."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self._seconds = 0.0
        self._marks: list[tuple[Any, Any]] = []
        self.measures = False

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Around the work; on a GPU two events in its stream, so that nothing waits."""
        if not self.measures:
            yield
        elif self._gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._marks.append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def take(self) -> float:
        """The seconds; counts anew from here."""
        if self._marks:
            self._marks[-1][1].synchronize()
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._marks) / 1000
        self._seconds, self._marks = 0.0, []
        return seconds


@dataclass(frozen=True)
class Place:
    """Where a rank is: pipeline stage, replica of the model (data-parallel rank), host."""

    stage: int
    replica: int
    host: str


@dataclass(frozen=True)
class Slow:
    """Ranks that are slow together; ``ratio`` of their time to the median of the other replicas'."""

    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    ratio: float

    def text(self) -> str:
        ranks, hosts = ", ".join(map(str, self.ranks)), ", ".join(self.hosts)
        many = len(self.ranks) > 1
        return (
            f"rank{'s' * many} {ranks} on {hosts} {'are' if many else 'is'} slow: reading and forward passes take "
            f"{self.ratio:.1f} times as long as in the other replicas"
        )


class SlowRanks:
    """Judges interval after interval.

    Args:
        places: of all ranks.
        factor: from which ratio on a rank is slow.
    """

    def __init__(self, places: Sequence[Place], *, factor: float):
        self._factor = factor
        groups: dict[tuple[int, int], list[int]] = {}
        for rank, place in enumerate(places):
            groups.setdefault((place.stage, place.replica), []).append(rank)
        self._groups = groups
        self._hosts = {
            group: tuple(dict.fromkeys(places[rank].host for rank in ranks)) for group, ranks in groups.items()
        }
        self._row = dict.fromkeys(groups, 0)  # intervals in a row: slow ones above 0, others below
        self._slow: set[tuple[int, int]] = set()

    def interval(self, seconds: Sequence[float]) -> list[Slow] | None:
        """Takes the own seconds of all ranks in one interval; who is slow from here on, where that has changed."""
        ratios = {group: self._ratio(group, seconds) for group in self._groups}
        before = set(self._slow)
        for group, ratio in ratios.items():
            slow = ratio >= self._factor
            row = self._row[group]
            self._row[group] = max(row, 0) + 1 if slow else min(row, 0) - 1
            if self._row[group] >= _IN_A_ROW:
                self._slow.add(group)
            elif self._row[group] <= -_IN_A_ROW:
                self._slow.discard(group)
        if self._slow == before:
            return None
        found = [Slow(tuple(self._groups[group]), self._hosts[group], ratios[group]) for group in self._slow]
        return sorted(found, key=lambda slow: -slow.ratio)

    def _ratio(self, group: tuple[int, int], seconds: Sequence[float]) -> float:
        others = [
            max(seconds[rank] for rank in ranks)
            for other, ranks in self._groups.items()
            if other[0] == group[0] and other != group
        ]
        usual = statistics.median(others) if others else 0.0
        return max(seconds[rank] for rank in self._groups[group]) / usual if usual > 0 else 1.0


class RankWatch:
    """The same in a run: after every step, on every rank.

    Args:
        own: what this rank measures.
        factor: `logging.slow_rank`.
    """

    def __init__(self, own: OwnTime, *, factor: float):
        self._own, self._factor = own, factor
        self._ranks: SlowRanks | None = None
        self._steps = 0
        own.measures = True

    def after_step(self, groups: Any) -> list[Slow] | None:
        """Collective over all ranks at the end of an interval.

        Args:
            groups: Megatron's process groups.

        Returns:
            Who is slow from here on, on all ranks, where that has changed.
        """
        self._steps += 1
        if self._steps % STEPS:
            return None
        seconds = parallel.gather_numbers(self._own.take())
        if self._ranks is None:  # the first steps compile and fill caches
            place = Place(groups.pp.rank(), groups.dp.rank(), socket.gethostname())
            self._ranks = SlowRanks(parallel.gather_objects(place), factor=self._factor)
            return None
        return self._ranks.interval(seconds)
