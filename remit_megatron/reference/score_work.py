"""What a scoring job has to do, in pieces that several jobs can share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


def unit_samples(sequence_length: int) -> int:
    """Samples of a piece; the same for every job on the same cache, whatever its layout."""
    return min(max(_UNIT_TOKENS // sequence_length, 16), 4096)


def corpus_units(cache: ReferenceCache, names: Sequence[str], needed: Sequence[np.ndarray]) -> Iterator[WorkUnit]:
    """Stretches of every data set, in order of the corpus, so that jobs of different runs share their pieces.

    Args:
        needed: samples of each data set that are to be scored.
    """
    size = unit_samples(cache.identity.sequence_length)
    for dataset_id, (name, samples) in enumerate(zip(names, needed, strict=True)):
        ordered = np.sort(samples)
        stretches, begins = np.unique(ordered // size, return_index=True)
        for stretch, members in zip(stretches, np.split(ordered, begins[1:]), strict=True):
            yield WorkUnit(f"{name[:16]}.{stretch}", [(dataset_id, int(sample)) for sample in members])


def run_units(blend: Any, key: str, *, sequence_length: int, consumed: Callable[[], int]) -> Iterator[WorkUnit]:
    """A run's samples in the order in which it reads them, from where it is.

    Args:
        key: names the order; the same for jobs that follow the same run.
        consumed: how many samples the run has read by now; asked before every piece.
    """
    size = unit_samples(sequence_length)
    stretch = consumed() // size
    while stretch * size < len(blend):
        located = dict.fromkeys(blend.locate(i) for i in range(stretch * size, min((stretch + 1) * size, len(blend))))
        yield WorkUnit(f"{key[:16]}.{stretch}", list(located))
        stretch = max(stretch + 1, consumed() // size)
