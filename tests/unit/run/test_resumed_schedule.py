"""What of a schedule may change when a run is resumed."""

import dataclasses

import pytest

from remit_megatron.run.checks import check_resumed_schedule
from remit_megatron.run.configuration import RunConfig
from remit_megatron.runtime.errors import UserError

BASE = {"lr": 1e-3, "min_lr": 1e-5, "train_iters": 60, "global_batch_size": 32}


def check(before, **changes):
    config = RunConfig(run_dir="runs/a", megatron={**BASE, **before})
    now = {name: value for name, value in {**BASE, **before, **changes}.items() if value is not None}
    check_resumed_schedule(config.to_yaml(), dataclasses.replace(config, megatron=now))


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ({}, {}),
        ({}, {"micro_batch_size": 4, "save_interval": 7, "tensor_model_parallel_size": 2}),
        ({"lr_decay_iters": 60}, {"train_iters": 80}),
        ({}, {"train_iters": 80, "override_opt_param_scheduler": True}),
        ({}, {"global_batch_size": 64, "use_checkpoint_opt_param_scheduler": True}),
        ({"train_iters": None, "train_samples": 999}, {"global_batch_size": 64}),
    ],
)
def test_may_change(before, changes):
    check(before, **changes)


@pytest.mark.parametrize(
    ("before", "changes", "line"),
    [
        ({}, {"lr": 5e-4}, "megatron.lr: found 0.0005; expected 0.001, as the checkpoints in runs/a have it"),
        ({}, {"lr": 5e-4, "override_opt_param_scheduler": True}, "megatron.lr: found 0.0005; expected 0.001"),
        ({}, {"min_lr": None}, "megatron.min_lr: found None; expected 1e-05"),
        ({}, {"train_iters": 80}, "megatron.train_iters: found 80; expected 60"),
        ({}, {"lr_decay_iters": 90}, "megatron.lr_decay_iters: found 90; expected None"),
        ({}, {"global_batch_size": 64}, "megatron.global_batch_size: found 64; expected 32"),
        ({"lr_warmup_fraction": 0.1}, {"lr_warmup_fraction": 0.2}, "megatron.lr_warmup_fraction: found 0.2"),
    ],
)
def test_may_not_change(before, changes, line):
    with pytest.raises(UserError) as caught:
        check(before, **changes)
    assert str(caught.value).startswith(line)
