"""How many steps a run has."""

from __future__ import annotations

import pytest

from remit_megatron.runtime.run_length import planned_steps

SAMPLES = {"train-samples": 1000, "global_batch_size": 100, "seq_length": 8}


@pytest.mark.parametrize(
    ("megatron", "last", "steps"),
    [
        ({"train_iters": 7}, {"iteration": 3, "consumed_tokens": 1}, 7),
        (SAMPLES, None, 10),
        (SAMPLES, {"iteration": 4, "consumed_tokens": 400 * 8}, 10),
        (SAMPLES, {"iteration": 4, "consumed_tokens": 200 * 8}, 12),  # by 50 so far
        (SAMPLES, {"iteration": 20, "consumed_tokens": 1000 * 8}, 20),
        (SAMPLES, {"iteration": 20, "consumed_tokens": 1001 * 8}, 20),
        (SAMPLES | {"train-samples": 1099}, None, 10),
        (SAMPLES | {"seq_length": None}, {"iteration": 4, "consumed_tokens": 3200}, 10),
        (SAMPLES, {"iteration": 4}, 10),
        ({"train_samples": 1000}, None, None),
        ({}, {"iteration": 1}, None),
    ],
)
def test_steps_of_a_run(megatron, last, steps):
    assert planned_steps(megatron, last) == steps
