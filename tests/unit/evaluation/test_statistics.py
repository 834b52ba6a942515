"""The statistics, by simulation: false alarms at their rate, intervals that cover at theirs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from remit_megatron.evaluation.statistics import Paired, compare_paired, compare_seeds, holm, mean_of_tasks

TIMES = 1000


def binary_pairs(generator: np.random.Generator, items: int, a: float, b: float) -> Paired:
    """Two models whose items share a difficulty, so that their answers are correlated as real ones are."""
    difficulty = generator.normal(size=items)
    shift = [math.log(p / (1 - p)) for p in (a, b)]
    scores = [
        (generator.random(items) < 1 / (1 + np.exp(-(logit + 1.5 * difficulty)))).astype(float) for logit in shift
    ]
    return Paired(scores[0], scores[1], np.ones(items))


def test_no_difference_is_found_as_rarely_as_promised_and_intervals_cover():
    """1,000 pairs of models that are equally good on 500 items."""
    generator = np.random.default_rng(1)
    alarms = covered = 0
    for _ in range(TIMES):
        verdict = compare_paired(binary_pairs(generator, 500, 0.4, 0.4), resamples=399)
        assert verdict.test == "McNemar, exact" and verdict.interval == "bootstrap (BCa) over items"
        alarms += verdict.p < 0.05
        covered += verdict.low <= 0 <= verdict.high
    assert 0.03 <= alarms / TIMES <= 0.07, alarms
    assert 0.93 <= covered / TIMES <= 0.97, covered


def test_a_real_difference_is_covered_and_usually_found():
    generator = np.random.default_rng(2)
    population = binary_pairs(generator, 2_000_000, 0.4, 0.5).difference()
    covered = found = 0
    for _ in range(200):
        verdict = compare_paired(binary_pairs(generator, 1000, 0.4, 0.5), resamples=599)
        covered += verdict.low <= population <= verdict.high
        found += verdict.p < 0.05
    assert 0.92 <= covered / 200 <= 0.98, covered
    assert found > 130, found


def test_numbers_and_uneven_weights_take_the_permutation_test():
    """Instructions of one prompt share its answer; documents have different lengths."""
    generator = np.random.default_rng(3)
    alarms = covered = 0
    for _ in range(TIMES):
        weights = generator.integers(1, 4, size=120).astype(float)
        shared = generator.normal(size=120)
        a, b = (weights * (shared + generator.normal(size=120)) for _ in range(2))
        verdict = compare_paired(Paired(a, b, weights, "prompts"), resamples=399)
        assert verdict.test.startswith("permutation") and verdict.units == "120 prompts"
        alarms += verdict.p < 0.05
        covered += verdict.low <= 0 <= verdict.high
    assert 0.03 <= alarms / TIMES <= 0.07, alarms
    assert 0.93 <= covered / TIMES <= 0.97, covered


def test_subtasks_are_resampled_whole():
    """27 subtasks, each with a leaning of its own: over items the interval would be far too short."""
    generator = np.random.default_rng(4)
    alarms = covered = too_short = 0
    for _ in range(200):
        leaning = generator.normal(scale=0.5, size=27)
        change = np.repeat(leaning, 50) + generator.normal(size=27 * 50)
        zero = np.zeros(27)
        sums = change.reshape(27, 50).sum(axis=1)
        verdict = compare_paired(Paired(zero, sums, np.full(27, 50.0), "subtasks"), resamples=599)
        alarms += verdict.p < 0.05
        covered += verdict.low <= 0 <= verdict.high
        naive = compare_paired(Paired(np.zeros(27 * 50), change, np.ones(27 * 50)), resamples=99)
        too_short += not naive.low <= 0 <= naive.high
    assert alarms / 200 <= 0.09, alarms
    assert covered / 200 >= 0.90, covered
    assert too_short / 200 > 0.3, too_short


def test_nothing_changed_and_all_changed():
    same = compare_paired(Paired(np.ones(5), np.ones(5), np.ones(5)))
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    all_gained = compare_paired(Paired(np.zeros(8), np.ones(8), np.ones(8)))
    assert all_gained.difference == 1 and all_gained.p == pytest.approx(2 / 2**8)


def test_mean_of_tasks_counts_every_task_alike():
    large = Paired(np.zeros(900), np.repeat([0.0, 1.0], 450), np.ones(900))
    small = Paired(np.zeros(20), np.zeros(20), np.ones(20))
    value, low, high = mean_of_tasks([large, small], resamples=499)
    assert value == pytest.approx(0.25) and low < 0.25 < high
    # The standard error of a mean of two tasks, of which one does not vary.
    assert (high - low) / (2 * 1.96) == pytest.approx(math.sqrt(0.25 / 900) / 2, rel=0.15)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_seeds_take_a_paired_t_test():
    import scipy.stats

    a, b = [0.30, 0.32, 0.29], [0.33, 0.34, 0.33]
    difference, low, high, p = compare_seeds(a, b)
    assert difference == pytest.approx(0.03)
    assert p == pytest.approx(scipy.stats.ttest_1samp(np.subtract(b, a), 0).pvalue)
    assert low < difference < high
    assert compare_seeds([0.1, 0.2], [0.1, 0.2])[3] == 1
    assert math.isnan(compare_seeds([0.0, 0.25], [0.5, 0.75])[3])  # no spread, so nothing to compare with
