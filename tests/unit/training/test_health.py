"""Which steps end a run, and how they are shown."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import torch

from remit_megatron.training.health import StepOutcome, StepWatch, no_update, not_finite
from remit_megatron.training.metrics import RunRecorder, read_records

GOOD = StepOutcome(
    iteration=7,
    tokens=256,
    counted=256,
    dropped=0,
    lm_loss=3.2,
    objective_loss=3.1,
    grad_norm=0.5,
    skipped=False,
    loss_scale=None,
)


def step(**changes) -> StepOutcome:
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0, "counted": 0, "lm_loss": math.nan, "objective_loss": math.nan}, "all are masked"),
        ({"counted": 0, "dropped": 256, "objective_loss": math.nan}, "none of 256 has a finite score"),
        ({"counted": 0, "objective_loss": math.nan}, "no token that counts of 256"),
        ({"counted": 253, "dropped": 3}, "3 of 256 tokens (1.17%) without a finite score"),
        ({"lm_loss": math.nan, "objective_loss": math.nan}, "lm_loss nan, the student's own loss"),
        ({"objective_loss": math.inf}, "objective_loss inf with lm_loss 3.2000"),
        ({"grad_norm": math.nan}, "a gradient of norm nan"),
        ({"grad_norm": math.inf}, "a gradient of norm inf"),
        ({"counted": 0, "dropped": 256, "skipped": True, "grad_norm": None}, "none of 256 has a finite score"),
    ],
)
def test_a_step_that_teaches_nothing_is_named(changes, words):
    fault = StepWatch(max_dropped=0.01).fault(step(**changes))
    assert fault is not None and fault.startswith("step 7: found ") and words in fault and "\n" not in fault


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"counted": 254, "dropped": 2},
        {"counted": 200, "objective_loss": -1.0},  # a selection
        {"skipped": True, "grad_norm": None, "loss_scale": 2.0**31},
        {"skipped": True, "grad_norm": None, "lm_loss": math.nan, "objective_loss": math.nan, "loss_scale": 64.0},
        {"grad_norm": 0.0},
    ],
)
def test_a_step_that_may_be_as_it_is(changes):
    assert StepWatch(max_dropped=0.01).fault(step(**changes)) is None


def test_the_limit_of_dropped_tokens_is_the_configuration_s():
    dropped = step(counted=128, dropped=128)
    assert StepWatch(max_dropped=0.5).fault(dropped) is None
    fault = StepWatch(max_dropped=0.49).fault(dropped)
    assert fault is not None and "at most 49.00% (reference.max_dropped)" in fault


def test_skipping_that_no_smaller_scale_mends_ends():
    watch = StepWatch(max_dropped=0.01, smallest_loss_scale=1.0)
    falling = [step(skipped=True, grad_norm=None, loss_scale=2.0**power) for power in range(32, 0, -1)]
    assert [watch.fault(outcome) for outcome in falling] == [None] * 32
    lowest = step(skipped=True, grad_norm=None, loss_scale=1.0)
    assert [watch.fault(lowest) for _ in range(9)] == [None] * 9
    assert watch.fault(step()) is None, "an update between them: the count begins again"
    assert [watch.fault(lowest) for _ in range(9)] == [None] * 9
    fault = watch.fault(lowest)
    assert fault is not None and "10 skipped steps in a row" in fault
    constant = StepWatch(max_dropped=0.01)
    faults = [constant.fault(step(skipped=True, grad_norm=None, loss_scale=128.0)) for _ in range(10)]
    assert faults[:9] == [None] * 9 and faults[9] is not None


def test_steps_without_a_gradient_end():
    watch = StepWatch(max_dropped=0.01)
    nothing = step(grad_norm=0.0)
    assert [watch.fault(nothing) for _ in range(9)] == [None] * 9
    assert watch.fault(step()) is None, "one that learns: the count begins again"
    assert [watch.fault(nothing) for _ in range(9)] == [None] * 9
    fault = watch.fault(nothing)
    assert fault is not None and "10 steps in a row with a gradient of 0" in fault


def test_weights_that_are_not_finite_are_counted():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Embedding(4, 2).bfloat16())
    assert not_finite([model]) == {}
    with torch.no_grad():
        model[0].bias[1] = torch.inf
        model[1].weight[2] = torch.nan
    assert not_finite([model, torch.nn.Linear(1, 1)]) == {"0.bias": 1, "1.weight": 2}


def test_records_that_are_none_are_left_out(tmp_path):
    good = {"iteration": 1, "lm_loss": 3.0}
    lines = [
        json.dumps(good).encode(),
        b"{}",
        b"3",
        b"null",
        b'{"iteration": "x"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"it',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_records(tmp_path / "metrics.jsonl") == [good]
    RunRecorder(tmp_path, total_steps=2, resumed_at=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(good) + "\n"


def test_a_skipped_step_has_a_line_and_is_shown(tmp_path):
    shown = io.StringIO()
    recorder = RunRecorder(tmp_path, total_steps=2, resumed_at=0, stream=shown)
    record = {
        "iteration": 1,
        "lm_loss": 3.2,
        "objective_loss": 3.1,
        "dropped_tokens": 0,
        "learning_rate": 1e-3,
        "grad_norm": None,
        "tokens_per_second": 100.0,
        "skipped": True,
        "loss_scale": 2.0**31,
    }
    recorder.step(record)
    recorder.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == record
    assert "skipped  loss scale 2.14748e+09" in shown.getvalue() and "grad" not in shown.getvalue()


def test_what_is_said_of_a_run_without_updates():
    assert "3 steps" in no_update(3) and "initial_loss_scale" in no_update(3)
