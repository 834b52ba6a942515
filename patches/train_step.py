"""A place before each step, where model, optimizer and schedule can be had.

Target    megatron-core 0.19.2, megatron.training.training.train_step
Why       Megatron makes them itself and hands them to nobody. Whether a step is to be applied is known between its
          backward pass and its update, and a run that goes back to an earlier checkpoint loads it into them.
Test      tests/distributed/training/test_spikes.py::test_a_spike_is_skipped
Upstream  not reported; its own rerun machine looks for wrong hardware, not for bad data
Drop when Megatron calls back before each step with what it trains

``hook`` receives model (its chunks on this rank), optimizer and schedule of the learning rate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from patches import Patch

hook: Callable[[Any, Any, Any], None] | None = None


def _install() -> None:
    from megatron.training import training

    original = training.train_step

    @functools.wraps(original)
    def train_step(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, *args, **kwargs):
        if hook is not None:
            hook(model, optimizer, opt_param_scheduler)
        return original(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, *args, **kwargs)

    training.train_step = train_step


PATCH = Patch(
    name="train_step",
    target="megatron.training.training.train_step",
    package="megatron-core",
    versions=("0.19.2",),
    why="whether a step is applied is known between backward pass and update, and nobody is handed what is trained",
    test="tests/distributed/training/test_spikes.py::test_a_spike_is_skipped",
    upstream="not reported",
    drop_when="Megatron calls back before each step with what it trains",
    install=_install,
)
