"""MiniPLM's difference sampling (arXiv 2410.17215): scores of samples, exact selection, and the distribution.

A sample's score, over its counted tokens t:

    s = mean of L_reference(x_t) - mean of L_teacher(x_t)        L = -log p in nats

which is large where the teacher knows what a small reference does not. All samples of all data sets are sorted by
falling score, the first are kept, and equal scores are kept in the order of the corpus. A token is counted if both
losses are finite and its loss counts in training. A sample without a counted token has the score -inf: it goes first.

Scores lie in files, 16 bytes a sample with the sorted copy, whose pages the system may take back at any time. What
stays in memory does not depend on the number of samples.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from remit_megatron.runtime.errors import UserError

QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
HISTOGRAM_BINS = 50
_BLOCK = 1 << 20


def difference_score(reference: np.ndarray, teacher: np.ndarray, counted: np.ndarray | None = None) -> float:
    """The score of the module docstring.

    Args:
        reference, teacher: losses in nats, floating point [L]; what is not finite in either drops the token from both.
        counted: bool [L]; None counts all.

    Returns:
        Nats, computed in float64; -inf where no token is counted.
    """
    keep = np.isfinite(reference) & np.isfinite(teacher)
    if counted is not None:
        keep &= counted
    if not keep.any():
        return -np.inf
    return float(reference[keep].mean(dtype=np.float64) - teacher[keep].mean(dtype=np.float64))


class Keep(NamedTuple):
    """How much is kept: a share of the samples, or a number of them."""

    ratio: float | None
    count: int | None

    @classmethod
    def parse(cls, text: str) -> Keep:
        """``0.8``, ``1.0`` are shares; ``2``, ``50000`` are numbers of samples.

        Raises:
            UserError: neither; also "1", which may mean either.
        """
        expected = "a share with a point, as 0.8, above 0 and up to 1.0; or a number of samples, 2 or more"
        try:
            if text.strip().isdecimal():
                keep = cls(None, int(text))
                valid = int(text) > 1
            else:
                keep = cls(float(text), None)
                valid = "." in text and 0 < float(text) <= 1
        except ValueError:
            raise UserError("--keep", text, expected) from None
        if not valid:
            raise UserError("--keep", text, expected)
        return keep

    def of(self, samples: int) -> int:
        """Samples to keep of so many: int(ratio * samples), as MiniPLM's code rounds.

        Raises:
            UserError: none, or more than there are.
        """
        kept = int(self.ratio * samples) if self.ratio is not None else self.count
        assert kept is not None
        if not 1 <= kept <= samples:
            found = f"{self.ratio if self.count is None else self.count} ({kept} of {samples} samples)"
            raise UserError("--keep", found, f"what keeps 1 to {samples}")
        return kept


class Scores:
    """Scores of N samples in corpus order, and sorted; in temporary files that go with the object.

    Args:
        count: N.
        directory: has room for 16 N bytes.

    Attributes:
        in_order: float64 [N], to be filled; -inf for a sample without counted tokens.
        ascending: float64 [N], meaningful after `sort`.
    """

    def __init__(self, count: int, *, directory: str | os.PathLike):
        self.in_order = _file_backed(count, directory)
        self.ascending = _file_backed(count, directory)

    def sort(self) -> None:
        """Fills `ascending` from `in_order`."""
        for start in range(0, len(self.in_order), _BLOCK):
            self.ascending[start : start + _BLOCK] = self.in_order[start : start + _BLOCK]
        self.ascending.sort()

    def threshold(self, kept: int) -> tuple[float, int]:
        """The lowest score among the ``kept`` highest, and how many samples of exactly this score are among them."""
        lowest = self.ascending[len(self.ascending) - kept]
        above = len(self.ascending) - int(np.searchsorted(self.ascending, lowest, side="right"))
        return float(lowest), kept - above

    def selected(self, start: int, stop: int, threshold: float, ties: int) -> tuple[np.ndarray, int]:
        """Which of the samples start ... stop - 1 are kept.

        Args:
            threshold: as `threshold` gave it.
            ties: how many samples of this score may still be kept.

        Returns:
            Their numbers, rising, int64; and ``ties`` for the samples behind ``stop``.
        """
        values = np.asarray(self.in_order[start:stop])
        equal = values == threshold
        keep = (values > threshold) | (equal & (np.cumsum(equal) <= ties))
        return np.flatnonzero(keep) + start, max(0, ties - int(equal.sum()))

    def distribution(self) -> dict[str, Any]:
        """Mean, standard deviation, quantiles (linear between neighbors) and histogram of the finite scores."""
        empty = int(np.searchsorted(self.ascending, -np.inf, side="right"))
        finite = self.ascending[empty:]
        result: dict[str, Any] = {"samples": len(self.ascending), "samples_without_counted_tokens": empty}
        if not len(finite):
            return result
        mean = _sum(finite[start : start + _BLOCK] for start in range(0, len(finite), _BLOCK)) / len(finite)
        blocks = (np.square(finite[start : start + _BLOCK] - mean) for start in range(0, len(finite), _BLOCK))
        result |= {"mean": mean, "std": (_sum(blocks) / len(finite)) ** 0.5}
        result["quantiles"] = {f"{share:g}": _quantile(finite, share) for share in QUANTILES}
        # Equal bins over the middle 99.8%; the first and the last reach to the ends.
        edges = np.linspace(_quantile(finite, 0.001), _quantile(finite, 0.999), HISTOGRAM_BINS + 1)
        edges[0], edges[-1] = finite[0], finite[-1]
        below = np.searchsorted(finite, edges, side="left")
        below[-1] = len(finite)
        result["histogram"] = {"edges": edges.tolist(), "counts": np.diff(below).tolist()}
        return result


def _file_backed(count: int, directory: str | os.PathLike) -> np.memmap:
    """float64 [count] in a file without a name."""
    with tempfile.TemporaryFile(dir=Path(directory)) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(8 * count, 1))  # a full disk would kill the process later
        except OSError as error:
            found = f"{error.strerror} for {8 * count} bytes of scores in {directory}"
            raise UserError("--output", found, "a folder with more room") from None
        return np.memmap(file, dtype=np.float64, mode="r+", shape=(count,))


def _sum(blocks: Iterable[np.ndarray]) -> float:
    return float(sum(block.sum(dtype=np.float64) for block in blocks))


def _quantile(ascending: np.ndarray | Sequence[float], share: float) -> float:
    place = share * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return float(ascending[low] + (place - low) * (ascending[high] - ascending[low]))
