"""The rule by which a step is a spike."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from remit_megatron.run.schema import SpikesConfig
from remit_megatron.training.spikes import Spike, SpikeRule, samples_text


def filled(count: int, **settings) -> SpikeRule:
    rule = SpikeRule(SpikesConfig(**settings))
    for number in range(count):
        rule.ordinary(3.0 + 0.1 * (-1) ** number, 1.0)
    return rule


def test_limits_are_mean_and_deviations_of_the_window():
    rule = filled(0, window=4, deviations=3.0)
    values = [9.0, 2.0, 3.0, 2.5, 3.5]
    for value in values:
        rule.ordinary(value, 2 * value)
    last = values[-4:]
    assert rule.limits().loss == pytest.approx(statistics.fmean(last) + 3 * statistics.pstdev(last))
    assert rule.limits().grad_norm == pytest.approx(2 * rule.limits().loss)


def test_nothing_is_judged_before_half_of_the_window():
    assert filled(63).limits().loss == math.inf
    assert math.isfinite(filled(64).limits().loss)


def test_an_ordinary_run_has_none():
    """Losses that fall and scatter as those of a run do: the default rule does not fire in 20,000 steps."""
    draw = random.Random(5)
    rule = SpikeRule(SpikesConfig())
    for step in range(20_000):
        loss = 2.0 + 2.0 * math.exp(-step / 300) + draw.gauss(0.0, 0.05)
        norm = 0.4 * math.exp(draw.gauss(0.0, 0.15))
        assert loss <= rule.limits().loss and norm <= rule.limits().grad_norm, step
        rule.ordinary(loss, norm)


def test_spikes_are_counted_within_the_window():
    rule = filled(10, window=8, give_up=2)
    assert [rule.spike(step) for step in (20, 25, 33, 34, 35)] == [False, False, False, False, True]
    assert rule.count == 5


def test_what_a_checkpoint_keeps_comes_back_as_it_was():
    rule = filled(100)
    rule.ordinary(1 / 3, 0.1)
    rule.spike(101)
    other = SpikeRule(SpikesConfig())
    other.load(json.loads(json.dumps(rule.state())))
    assert other.limits() == rule.limits() and other.state() == rule.state()


def test_going_back_forgets_steps_but_no_spikes():
    rule = filled(100)
    then = rule.state()
    rule.ordinary(50.0, 50.0)
    rule.spike(102)
    rule.rolled_back(then)
    assert rule.limits() == filled(100).limits() and rule.count == 1 and rule.state()["recent"] == [102]


def test_figures_that_are_not_finite_are_no_part_of_it():
    rule = filled(100)
    before = rule.limits()
    rule.ordinary(math.nan, None)
    rule.ordinary(math.inf, math.nan)
    assert rule.limits() == before


def test_what_is_said():
    spike = Spike(7, "loss", 4.5, 3.25, 4.5, None, False)
    assert spike.text(window=9).startswith("step 7: loss 4.5000 is above 3.2500") and "no update" in spike.text(
        window=9
    )
    assert samples_text([{"data": "a/corpus", "samples": list(range(10))}]).endswith("6, 7 and 2 more")
