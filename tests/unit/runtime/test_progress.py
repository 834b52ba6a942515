"""Lines of long work: when they come, and what they say."""

from __future__ import annotations

import io
import re

import pytest

from remit_megatron.runtime import progress
from remit_megatron.runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Its only value is the time."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_line_at_most_every_interval(clock):
    stream = io.StringIO()
    shown = Progress("scores", total=100, unit="rows", interval=5.0, stream=stream)
    for done, seconds in ((10, 0.5), (20, 1.5), (30, 3.0), (60, 6.6)):
        clock[0] = 100.0 + seconds
        shown.update(done)
    shown.finish()
    first, second, last = lines(stream)
    assert first == "scores: 20/100 rows (20%), 13.3 rows/s, 0:06 left"
    assert second == "scores: 60/100 rows (60%), 9.09 rows/s, 0:04 left"
    assert re.fullmatch(r"scores: 60/100 rows \(60%\), 9\.09 rows/s, took 0:07", last)


@pytest.mark.parametrize(("seconds", "expected"), [(9.0, 0), (11.0, 2)])
def test_short_work_shows_nothing(clock, seconds, expected):
    stream = io.StringIO()
    shown = Progress("evaluation", total=4, unit="rows", interval=10.0, delay=10.0, stream=stream)
    clock[0] += seconds
    shown.update(2)
    shown.end()
    assert len(lines(stream)) == expected
