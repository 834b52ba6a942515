"""The line that a run's first steps say of its reference."""

from __future__ import annotations

import pytest

from remit_megatron.training.first_look import STEPS, FirstLook, nothing_to_distill


def said(deltas, spread: float = 0.1, steps: int = 100) -> list[str]:
    look = FirstLook(steps=steps)
    lines = [look.add({"delta_mean": delta, "weight_std": spread}) for delta in deltas]
    return [line for line in lines if line is not None]


AHEAD = [0.2 + 0.01 * (step % 3) for step in range(30)]


def test_it_is_said_once_and_in_time():
    look = FirstLook(steps=100)
    lines = [look.add({"delta_mean": delta, "weight_std": 0.1}) for delta in AHEAD]
    assert [number for number, line in enumerate(lines, 1) if line] == [STEPS]
    assert len(said(AHEAD[:4], steps=4)) == 1 and said(AHEAD[:4], steps=5) == []


@pytest.mark.parametrize(
    "deltas, spread, expected",
    [
        (AHEAD, 0.1, "the reference is ahead of the student by 0.209 nats a token"),
        ([-delta for delta in AHEAD], 0.1, "warning: the reference is behind the student by 0.209 nats"),
        ([(-1) ** step * 0.1 for step in range(10)], 0.1, "warning: the reference is neither ahead"),
        (AHEAD, 0.001, "warning: the weights hardly differ from 1"),
    ],
)
def test_what_is_said(deltas, spread, expected):
    assert said(deltas, spread)[0].startswith(expected)


def test_steps_without_figures_do_not_count():
    look = FirstLook(steps=2)
    assert look.add({"delta_mean": None, "weight_std": None}) is None
    assert look.add({"delta_mean": 0.1, "weight_std": 0.1}) is None
    assert look.add({"delta_mean": 0.1, "weight_std": 0.1}) is not None


def test_of_kept_tokens_no_lead_is_said():
    """They are those where the reference is ahead; and there are no weights whose spread could be small."""

    def said_of(deltas: list[float], spread: float) -> list[str]:
        look = FirstLook(steps=100, selects=True)
        lines = [look.add({"delta_mean": delta, "delta_std": spread, "weight_std": 0.0}) for delta in deltas]
        return [line for line in lines if line is not None]

    assert said_of(AHEAD, 0.3) == said_of([-delta for delta in AHEAD], 0.3) == []
    (line,) = said_of(AHEAD, 0.001)
    assert line.startswith("warning: student and reference hardly differ (spread of the loss difference 0.001 nats")


@pytest.mark.parametrize(
    ("objective", "share", "warns"),
    [
        (0.0, 0.0, True),
        (3e-7, 0.0, True),
        (1.6, 0.5, True),
        (1.6001, 0.5, False),
        (0.01, 0.0, False),
        (3.2, 1.0, False),
    ],
)
def test_a_reference_that_is_the_student_is_said(objective, share, warns):
    line = nothing_to_distill({"objective_loss": objective, "lm_loss": 3.2}, ntp_weight=share)
    assert (line is not None and "nothing to distill" in line) == warns
