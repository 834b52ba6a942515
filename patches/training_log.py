"""A place after each step: metrics are derived from the step's sums before Megatron logs them.

Target    megatron-core 0.19.2, megatron.training.training.training_log
Why       Megatron averages what the loss function returns and logs it to the terminal, TensorBoard and wandb; it has no
          callback. Standard deviations, tokens per second and metrics.jsonl need the step's sums and its time.
Test      tests/integration/test_train_cli.py::test_metrics_have_every_field
Upstream  not reported
Drop when Megatron calls back after each step

``hook`` receives the step's losses (none on ranks without the last pipeline stage), iteration, learning rate, loss
scale, gradient norm and whether the step was skipped; it returns the losses that Megatron is to log. ``rate`` gives the
learning rate of the step: Megatron looks after the step, when the optimizer has the next one's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from patches import Patch

hook: Callable[..., dict[str, Any]] | None = None
rate: Callable[[], float | None] | None = None


def _install() -> None:
    from megatron.training import training

    original = training.training_log

    @functools.wraps(original)
    def training_log(
        loss_dict,
        total_loss_dict,
        learning_rate,
        iteration,
        loss_scale,
        report_memory_flag,
        skipped_iter,
        grad_norm,
        *args,
        **kwargs,
    ):
        if rate is not None:
            learning_rate = rate()
        if hook is not None:
            loss_dict = hook(
                loss_dict,
                iteration=iteration,
                learning_rate=learning_rate,
                loss_scale=float(loss_scale),
                grad_norm=grad_norm,
                skipped=bool(skipped_iter),
            )
        return original(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            grad_norm,
            *args,
            **kwargs,
        )

    training.training_log = training_log


PATCH = Patch(
    name="training_log",
    target="megatron.training.training.training_log",
    package="megatron-core",
    versions=("0.19.2",),
    why="there is no callback after a step; metrics.jsonl and the progress line need its sums and its time",
    test="tests/integration/test_train_cli.py::test_metrics_have_every_field",
    upstream="not reported",
    drop_when="Megatron calls back after each step",
    install=_install,
)
