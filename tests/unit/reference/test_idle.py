"""Work in pauses: what is planned, what runs where, and when pauses are measured again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from remit_megatron.reference import idle
from remit_megatron.reference.idle import IdleFiller, plan


def test_a_pause_gets_what_fits():
    assert plan([1.0, 0.0, 2.0], [0.5] * 10) == [2, 0, 4]
    assert plan([1.0, 5.0], [0.5] * 3) == [2, 1], "no more than there is"
    assert plan([0.4, 0.44], [0.5, 0.5]) == [0, 1], "a part may stick out a little"
    assert plan([1.0], [2.0, 0.1]) == [0], "the order of the work stays"
    assert plan([], [1.0]) == []


class Pipeline:
    """A step of three pauses, the second of which is long, with parts of work of a second each; time is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: int):
        monkeypatch.setattr(idle, "mark", lambda: self.now)
        self.filler = IdleFiller(**settings)
        self.log: list[str] = []
        self.now = 0.0

    def parts(self, count: int) -> Iterator[None]:
        for _ in range(count):
            self.now += 1.0
            self.log.append("part")
            yield

    def wait(self, seconds: float) -> None:
        until = self.now + seconds

        def wait() -> None:
            self.now = max(self.now, until)
            self.log.append("wait")

        self.filler.wait(wait)

    def step(self, *, kind: int = 4, count: int = 6, pause: float = 4.5) -> list[str]:
        """The order of waits, parts and the end of the schedule."""
        self.log.clear()
        with self.filler.step(self.parts(count), kind=kind):
            for seconds in (0.0, pause, 0.5):
                self.wait(seconds)
            self.log.append("end")
        return list(self.log)


UNFILLED = ["wait", "wait", "wait", "end", *["part"] * 6]


FILLED = ["wait", *["part"] * 4, "wait", "wait", "end", "part", "part"]


def test_measured_first_and_filled_then(monkeypatch):
    pipeline = Pipeline(monkeypatch, warmup=1, measured=3, kept=2)
    orders = [pipeline.step(pause=pause) for pause in (9.0, 4.5, 9.0, 4.0, 4.5, 4.5)]
    assert orders == [UNFILLED] * 4 + [FILLED] * 2, "the median of the measured steps counts, the first does not"
    started = pipeline.now
    assert pipeline.step() == UNFILLED, "measured again"
    assert pipeline.now - started == 4.5 + 0.5 + 6
    assert (pipeline.filler.filled, pipeline.filler.left_over) == (8, 5 * 6 + 2 * 2)


def test_filled_pauses_cost_nothing(monkeypatch):
    pipeline = Pipeline(monkeypatch, warmup=0, measured=1)
    lengths = []
    for _ in range(2):
        started = pipeline.now
        pipeline.step()
        lengths.append(pipeline.now - started)
    assert lengths == [4.5 + 0.5 + 6, 4.5 + 0.5 + 2]


def test_kinds_have_plans_of_their_own_and_work_may_end_early(monkeypatch):
    pipeline = Pipeline(monkeypatch, warmup=0, measured=1)
    assert pipeline.step() == UNFILLED
    assert pipeline.step(kind=5) == UNFILLED
    assert pipeline.step(count=1)[:2] == ["wait", "part"]
    assert pipeline.step(count=0) == ["wait", "wait", "wait", "end"]


def test_outside_a_step_nothing_happens(monkeypatch):
    pipeline = Pipeline(monkeypatch, warmup=0, measured=1)
    pipeline.step()
    pipeline.log.clear()
    pipeline.wait(0.0)
    assert pipeline.log == ["wait"]


def test_finish_comes_before_the_end_of_the_context(monkeypatch):
    pipeline = Pipeline(monkeypatch)
    with pipeline.filler.step(pipeline.parts(2), kind=1):
        pipeline.filler.finish()
        assert pipeline.log == ["part", "part"]
    assert pipeline.log == ["part", "part"]


def test_an_error_leaves_the_rest_undone(monkeypatch):
    pipeline = Pipeline(monkeypatch)
    with pytest.raises(RuntimeError, match="of the student"), pipeline.filler.step(pipeline.parts(2), kind=1):
        raise RuntimeError("of the student")
    assert pipeline.log == []
    pipeline.step()
