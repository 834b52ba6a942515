"""What a scoring job has to do, in pieces that several jobs can share."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from remit_megatron.reference.cache import ReferenceCache

# Tokens of a piece of work: long enough that leases cost nothing, short enough that a killed job loses little.
_UNIT_TOKENS = 1 << 19


@dataclass(frozen=True)
class WorkUnit:
    """A piece of work.

    Attributes:
        name: of its lease; the same in every job that knows this piece.
        samples: (position of the data set in the blend, sample) of what may have to be scored.
    """

    name: str
    samples: list[tuple[int, int]]

    def missing(self, cache: ReferenceCache, names: Sequence[str]) -> list[tuple[int, int]]:
        """Those that are not in the cache."""
        dataset_ids, samples = np.array(self.samples, dtype=np.int64).reshape(-1, 2).T
        complete = np.zeros(len(self.samples), dtype=bool)
        for dataset_id in sorted({dataset_id for dataset_id, _ in self.samples}):
            members = dataset_ids == dataset_id
            complete[members] = cache.completeness(names[dataset_id], samples[members])
        return [sample for sample, done in zip(self.samples, complete.tolist(), strict=True) if not done]


class Work(Protocol):
    """Pieces by number, made when they are asked for: their samples are never all in memory."""

    def __getitem__(self, number: int) -> WorkUnit:
        """Piece number ``number``."""
        ...

    def order(self) -> Iterator[int]:
        """Numbers in the order in which one replica is to take them. A number may come again: to look once more."""
        ...


def unit_samples(sequence_length: int) -> int:
    """Samples of a piece; the same for every job on the same cache, whatever its layout."""
    return min(max(_UNIT_TOKENS // sequence_length, 16), 4096)


class CorpusWork:
    """Stretches of every data set, so that jobs of different runs share their pieces.

    Every replica goes through them in an order of its own. In one order for all, everyone would come upon the pieces
    that the others are at, again and again.

    Args:
        names: identities of the data sets.
        needed: samples of each data set that are to be scored.
        sequence_length: tokens of a sample.
        seed: of the order; None draws one.
    """

    def __init__(
        self, names: Sequence[str], needed: Sequence[np.ndarray], *, sequence_length: int, seed: int | None = None
    ):
        size = unit_samples(sequence_length)
        self._names, self._random = names, random.Random(seed)
        self._samples = [np.sort(samples) for samples in needed]
        self._begins: list[np.ndarray] = []
        self._stretches: list[np.ndarray] = []
        self._first = [0]
        for samples in self._samples:
            stretches, begins = np.unique(samples // size, return_index=True)
            self._stretches.append(stretches)
            self._begins.append(np.append(begins, len(samples)))
            self._first.append(self._first[-1] + len(stretches))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, number: int) -> WorkUnit:
        dataset_id = bisect_right(self._first, number) - 1
        place = number - self._first[dataset_id]
        begin, end = self._begins[dataset_id][place : place + 2]
        samples = self._samples[dataset_id][begin:end].tolist()
        name = f"{self._names[dataset_id][:16]}.{self._stretches[dataset_id][place]}"
        return WorkUnit(name, [(dataset_id, sample) for sample in samples])

    def order(self) -> Iterator[int]:
        """Each number once: from a random one on, in steps of a random length that reaches all of them."""
        count = len(self)
        if not count:
            return
        step = count
        while math.gcd(step, count) > 1:
            step = self._random.randrange(1, count)
        place = self._random.randrange(count)
        for _ in range(count):
            yield place
            place = (place + step) % count


class RunWork:
    """A run's samples in the order in which it reads them, from where it is.

    Args:
        blend: the run's samples.
        key: names the order; the same for jobs that follow the same run.
        sequence_length: tokens of a sample.
        consumed: how many samples the run has read by now; asked before every piece.
    """

    def __init__(self, blend: Any, key: str, *, sequence_length: int, consumed: Callable[[], int]):
        self._blend, self._key, self._consumed = blend, key, consumed
        self._size = unit_samples(sequence_length)

    def __len__(self) -> int:
        return -(-len(self._blend) // self._size)

    def __getitem__(self, number: int) -> WorkUnit:
        places = range(number * self._size, min((number + 1) * self._size, len(self._blend)))
        return WorkUnit(f"{self._key[:16]}.{number}", list(dict.fromkeys(self._blend.locate(i) for i in places)))

    def order(self) -> Iterator[int]:
        """Ahead of the run; and before each piece the one that the run is at, where a score may turn out damaged."""
        ahead = 0
        while ahead < len(self):
            present = self._consumed() // self._size
            if present < ahead:
                yield present
            ahead = max(ahead, present)
            if ahead < len(self):
                yield ahead
            ahead += 1
