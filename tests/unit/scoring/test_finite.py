"""Counting what a reference could not score."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from remit_megatron.scoring.finite import Scored, look_at
from remit_megatron.scoring.job import ScoringJob


def test_a_share_above_the_limit_is_named():
    scored = Scored(1000, 20) + Scored(1000, 1)
    assert str(scored) == "21 of 2,000 tokens (1.05%) without a finite score"
    assert scored.fault(0.02) is None and Scored().fault(0.0) is None
    fault = scored.fault(0.01)
    assert fault is not None and "at most 1.00% (reference.max_dropped)" in fault


@pytest.mark.parametrize("samples", [10, 10_000])
def test_scores_that_were_there_are_looked_at(samples):
    """All of a small cache; of a large one as many as tell a share."""
    asked = []

    def read_scores(name: str, sample: int) -> np.ndarray | None:
        asked.append((name, sample))
        return None if sample == 3 else np.array([1.0, np.nan if sample % 2 else 2.0, np.inf, 0.5], dtype=np.float32)

    cache: Any = SimpleNamespace(read_scores=read_scores)
    scored = look_at(cache, ["a", "b"], [np.arange(samples // 2), np.arange(samples // 2, samples)])
    assert len(set(asked)) == len(asked) == min(samples, 4096)
    if samples == 10:
        assert scored == Scored(9 * 4, 9 + 4), "sample 3 is damaged, and no score"
    else:
        assert scored.share == pytest.approx(0.375, abs=0.02)


@pytest.mark.parametrize(
    ("written", "not_finite", "limit", "broken"),
    [(64, 64 * 8, 0.01, True), (63, 63 * 8, 0.01, False), (640, 200, 0.01, False), (64, 64 * 8, 1.0, False)],
)
def test_a_broken_reference_does_not_score_the_rest(written, not_finite, limit, broken):
    job: Any = SimpleNamespace(
        _writer=SimpleNamespace(written=written, not_finite=not_finite), _sequence_length=8, _max_dropped=limit
    )
    job._scored = lambda: ScoringJob._scored(job)
    assert ScoringJob._is_broken(job) is broken
