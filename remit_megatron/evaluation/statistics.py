"""Is one model better than another? Of paired scores: difference, interval, p. scipy's and statsmodels' methods.

Everything is a ratio of sums over units that are drawn independently: items, prompts (whose instructions share one
answer), or subtasks. Method: Miller 2024, arXiv 2411.00640, with the bootstrap in place of the normal distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats

# With fewer subtasks neither a bootstrap over them nor a test that flips their signs can say much (2^5 = 32 outcomes).
FEWEST_CLUSTERS = 10
_RESAMPLES = 9999
_AT_ONCE = 4_000_000  # resampled numbers in memory


@dataclass(frozen=True)
class Paired:
    """The scores of two models on the same units.

    Attributes:
        a, b: [units] float64, sums of scores.
        weights: [units] float64, what the scores are summed over (1 for a plain item).
        unit: what a unit is: ``items``, ``prompts``, ``subtasks``.
    """

    a: np.ndarray
    b: np.ndarray
    weights: np.ndarray
    unit: str = "items"

    def difference(self) -> float:
        """Score of b minus score of a."""
        return float((self.b - self.a).sum() / self.weights.sum())


@dataclass(frozen=True)
class Verdict:
    """What is known of a difference.

    Attributes:
        difference: b minus a.
        low, high: of the 95% interval.
        p: two-sided, of no difference.
        interval, test: how they were found, in words.
        units: how many, of what.
    """

    difference: float
    low: float
    high: float
    p: float
    interval: str
    test: str
    units: str


def compare_paired(pairs: Paired, *, resamples: int = _RESAMPLES, seed: int = 0, confidence: float = 0.95) -> Verdict:
    """Difference of two models on the same units, with a bootstrap interval over the units and an exact test.

    Scores of 0 and 1 on plain items take McNemar's exact test; others a permutation test that swaps the models within a
    unit (exact, where there are few).

    Args:
        resamples: of bootstrap and permutations.
    """
    low, high, how = _interval(pairs, resamples, seed, confidence)
    p, test = _test(pairs, resamples, seed)
    return Verdict(pairs.difference(), low, high, p, how, test, f"{len(pairs.a)} {pairs.unit}")


def _interval(pairs: Paired, resamples: int, seed: int, confidence: float) -> tuple[float, float, str]:
    change = pairs.b - pairs.a
    if np.ptp(change / pairs.weights) == 0:
        return pairs.difference(), pairs.difference(), "all units agree"
    plain = bool(np.all(pairs.weights == 1))

    def ratio(numerator: np.ndarray, denominator: np.ndarray, axis: int = -1) -> np.ndarray:
        return numerator.sum(axis=axis) / denominator.sum(axis=axis)

    found = scipy.stats.bootstrap(
        (change,) if plain else (change, pairs.weights),
        np.mean if plain else ratio,
        paired=not plain,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=confidence,
        method="BCa",
        batch=max(1, _AT_ONCE // len(change)),
        rng=np.random.default_rng(seed),
    )
    low, high = (float(value) for value in found.confidence_interval)
    return low, high, f"bootstrap (BCa) over {pairs.unit}"


def _test(pairs: Paired, resamples: int, seed: int) -> tuple[float, str]:
    scores = np.concatenate([pairs.a, pairs.b])
    if np.all(pairs.weights == 1) and np.all((scores == 0) | (scores == 1)):
        gained, lost = int(((pairs.b == 1) & (pairs.a == 0)).sum()), int(((pairs.b == 0) & (pairs.a == 1)).sum())
        if gained + lost == 0:
            return 1.0, "McNemar, exact"
        return float(scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue), "McNemar, exact"
    if np.array_equal(pairs.a, pairs.b):
        return 1.0, "permutation"

    def statistic(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return (b - a).sum(axis=axis)

    found = scipy.stats.permutation_test(
        (pairs.a, pairs.b),
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // len(pairs.a)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue), "permutation, swapping the models"


def mean_of_tasks(tasks: list[Paired], *, resamples: int = _RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """Difference of the mean over tasks and its 95% interval, each task's units resampled on their own."""

    def mean(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)

    # A unit's share of its task's difference, so that the mean over units is the ratio of the sums.
    parts = [(task.b - task.a) / task.weights.mean() for task in tasks]
    value = float(np.mean([task.difference() for task in tasks]))
    if all(np.ptp(part) == 0 for part in parts):
        return value, value, value
    found = scipy.stats.bootstrap(
        parts,
        mean,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        batch=max(1, _AT_ONCE // max(len(part) for part in parts)),
        rng=np.random.default_rng(seed),
    )
    low, high = (float(bound) for bound in found.confidence_interval)
    return value, low, high


def holm(values: list[float]) -> list[float]:
    """p values corrected for their number: the chance of one false finding among all of them stays where it was."""
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(values, method="holm")[1]] if values else []


def compare_seeds(a: list[float], b: list[float]) -> tuple[float, float, float, float]:
    """Paired t-test over seeds: difference, 95% interval, p. ``a[i]`` and ``b[i]`` are of one seed."""
    change = np.asarray(b, float) - np.asarray(a, float)
    if np.ptp(change) == 0:  # no spread to compare with
        p = 1.0 if change[0] == 0 else float("nan")
        return float(change[0]), float(change[0]), float(change[0]), p
    found = scipy.stats.ttest_rel(b, a)
    interval = found.confidence_interval(0.95)
    return float(change.mean()), float(interval.low), float(interval.high), float(found.pvalue)
