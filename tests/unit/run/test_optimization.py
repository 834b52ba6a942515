"""Everything that Megatron's scheduler and optimizer assert is met before a run starts, in one line with its key."""

from __future__ import annotations

import math

import pytest

import patches

patches.apply()

from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.unit.run.test_megatron_args import arguments  # noqa: E402

WSD = {"lr_decay_style": "WSD"}
LINEAR = {"weight_decay_incr_style": "linear"}
FP16 = {"fp16": True}
SAMPLES = {"train_iters": None, "train_samples": 320, "global_batch_size": 32}


@pytest.mark.parametrize(
    ("megatron", "line"),
    [
        (WSD, "megatron.lr_wsd_decay_iters: found nothing; expected the length of the last phase"),
        (WSD | {"lr_wsd_decay_iters": 11}, "megatron.lr_wsd_decay_iters: found 11; expected a number from 0 to 10"),
        (
            WSD | {"lr_wsd_decay_iters": 9, "lr_warmup_iters": 2},
            "megatron.lr_wsd_decay_iters: found 9; expected a number from 0 to 8",
        ),
        (WSD | {"lr_wsd_decay_iters": -1}, "megatron.lr_wsd_decay_iters: found -1; expected a number from 0"),
        (WSD | {"lr_wsd_decay_samples": 5}, "megatron.lr_wsd_decay_samples: found 5; expected lr_wsd_decay_iters"),
        (WSD | SAMPLES, "megatron.lr_wsd_decay_samples: found nothing"),
        ({"lr_warmup_init": 2e-3}, "megatron.lr_warmup_init: found 0.002; expected a number from 0 to lr, 0.001"),
        ({"lr_warmup_init": -1e-3}, "megatron.lr_warmup_init: found -0.001"),
        ({"min_lr": -1}, "megatron.min_lr: found -1.0; expected a number from 0 to lr, 0.001"),
        ({"min_lr": 0.1}, "megatron.min_lr: found 0.1; expected at most lr, 0.001"),
        ({"min_lr": math.nan}, "megatron.min_lr: found nan"),
        ({"lr": math.inf}, "megatron.lr: found inf"),
        ({"lr": 1e-30}, "megatron.lr: found 1e-30; expected 1e-12 or more"),
        (
            {"train_iters": 1, "lr_decay_iters": 10, "lr_warmup_iters": 2},
            "megatron.train_iters: found 1; expected two steps or more, or lr_warmup_init",
        ),
        ({"train_iters": 1, "lr_warmup_fraction": 0.01}, "megatron.train_iters: found 1; expected two steps or more"),
        (
            SAMPLES | {"train_samples": 60, "lr_warmup_samples": 8},
            "megatron.train_samples: found 60; expected two steps or more",
        ),
        ({"lr_decay_iters": 0}, "megatron.lr_decay_iters: found 0; expected more than 0"),
        ({"lr_decay_iters": -4}, "megatron.lr_decay_iters: found -4; expected more than 0"),
        ({"lr_warmup_iters": -1}, "megatron.lr_warmup_iters: found -1; expected 0 or more"),
        ({"lr_warmup_iters": 10}, "megatron.lr_warmup_iters: found 10; expected less than 10"),
        ({"lr_warmup_fraction": 1.0}, "megatron.lr_warmup_fraction: found 1.0"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 1}, "megatron.lr_warmup_iters: found 1; expected nothing"),
        (SAMPLES | {"train_samples": 31}, "megatron.train_samples: found 31; expected at least global_batch_size 32"),
        (
            LINEAR,
            "megatron.start_weight_decay: found nothing; expected what Megatron checks: start_weight_decay to be",
        ),
        (
            LINEAR | {"start_weight_decay": 0.2, "end_weight_decay": 0.1},
            "megatron.end_weight_decay: found 0.1; expected at least start_weight_decay, 0.2",
        ),
        (LINEAR | {"start_weight_decay": -0.1, "end_weight_decay": 0.1}, "megatron.start_weight_decay: found -0.1"),
        ({"end_weight_decay": 0.1}, "megatron.end_weight_decay: found 0.1; expected nothing with"),
        ({"weight_decay": -0.1}, "megatron.weight_decay: found -0.1"),
        ({"optimizer": "muon"}, "megatron.optimizer: found muon; expected one of adam, sgd"),
        ({"optimizer": "lion"}, "megatron.optimizer: found lion; expected one of adam, sgd"),
        ({"optimizer": "adamw"}, "megatron.optimizer: found 'adamw'; expected one of adam, sgd"),
        ({"optimizer": "sgd", "use_distributed_optimizer": True}, "megatron.use_distributed_optimizer: found true"),
        ({"optimizer": "sgd", "sgd_momentum": -0.5}, "megatron.sgd_momentum: found -0.5"),
        ({"adam_beta1": 1.0}, "megatron.adam_beta1: found 1.0; expected a number from 0 to below 1"),
        ({"adam_beta2": 1.5}, "megatron.adam_beta2: found 1.5"),
        ({"adam_beta1": -0.1}, "megatron.adam_beta1: found -0.1"),
        ({"adam_eps": 0.0}, "megatron.adam_eps: found 0.0; expected a number above 0"),
        ({"adam_eps": math.nan}, "megatron.adam_eps: found nan"),
        ({"clip_grad": -1.0}, "megatron.clip_grad: found -1.0"),
        ({"decoupled_min_lr": 1e-5}, "megatron.decoupled_min_lr: found 1e-05; expected nothing without decoupled_lr"),
        ({"decoupled_lr": 0.0}, "megatron.decoupled_lr: found 0.0"),
        ({"decoupled_lr": 1e-4, "decoupled_min_lr": 1e-3}, "megatron.decoupled_min_lr: found 0.001"),
        ({"decoupled_lr": 1e-4, "min_lr": 1e-3}, "megatron.decoupled_lr: found 0.0001; expected at least min_lr"),
        ({"loss_scale": 0.0}, "megatron.loss_scale: found 0.0"),
        (FP16 | {"initial_loss_scale": 0.0}, "megatron.initial_loss_scale: found 0.0"),
        (FP16 | {"min_loss_scale": 0.0}, "megatron.min_loss_scale: found 0.0"),
        (FP16 | {"min_loss_scale": 64.0, "initial_loss_scale": 32.0}, "megatron.min_loss_scale: found 64.0"),
        (FP16 | {"loss_scale_window": 10.5}, "megatron.loss_scale_window: found 10.5"),
        (FP16 | {"hysteresis": 0}, "megatron.hysteresis: found 0"),
        (
            {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
            "megatron.override_opt_param_scheduler: found true together",
        ),
        ({"num_distributed_optimizer_instances": 2}, "megatron.num_distributed_optimizer_instances: found 2"),
        (
            {"num_distributed_optimizer_instances": 2, "use_distributed_optimizer": True},
            "megatron.num_distributed_optimizer_instances: found 2; expected a divisor of 1 data-parallel",
        ),
        (
            {"use_precision_aware_optimizer": True, "use_distributed_optimizer": True},
            "megatron.use_precision_aware_optimizer: found True; expected what Megatron checks",
        ),
        ({"exp_avg_dtype": "bf16"}, "megatron.exp_avg_dtype: found"),
        ({"ddp_num_buckets": 2, "ddp_bucket_size": 100}, "megatron"),
    ],
)
def test_refused_before_the_start(megatron, line):
    with pytest.raises(UserError) as caught:
        arguments(**megatron)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "megatron",
    [
        WSD | {"lr_wsd_decay_iters": 8, "lr_warmup_iters": 2},
        WSD | {"lr_wsd_decay_iters": 0},
        WSD | SAMPLES | {"lr_wsd_decay_samples": 64},
        LINEAR | {"start_weight_decay": 0.0, "end_weight_decay": 0.1},
        {"weight_decay": 0.0, "min_lr": 0.0, "lr_warmup_init": 1e-3, "lr_decay_style": "constant"},
        {"lr_decay_style": "inverse-square-root", "lr_warmup_fraction": 0.5},
        {"lr_decay_iters": 5},
        {"lr_decay_iters": 50},
        {"adam_beta1": 0.0, "adam_eps": 1e-5},
        {"optimizer": "sgd", "adam_beta1": 1.0, "sgd_momentum": 0.0},
        {"decoupled_lr": 1e-2, "decoupled_min_lr": 0.0},
        FP16 | {"initial_loss_scale": 65536, "loss_scale_window": 100},
        FP16 | {"loss_scale": 128.0, "initial_loss_scale": 0.5},
        {"initial_loss_scale": 0.0},
    ],
)
def test_accepted(megatron):
    arguments(**megatron)


def test_skipped_samples_are_skipped_by_every_rank():
    from remit_megatron.run.checks import check_supported
    from tests.unit.run.test_megatron_args import run_config

    skipping = {"iterations_to_skip": [2]}
    check_supported(run_config(**skipping), arguments(**skipping))
    # After the last step Megatron would have saved nothing, and the run be told to start again for ever.
    for length in ({"train_iters": 2}, SAMPLES | {"train_samples": 2 * 32}):
        last = arguments(**skipping, **length)
        with pytest.raises(UserError, match="found 2; expected steps from 1 to before the last, 2"):
            check_supported(run_config(**skipping), last)
    args = arguments(2, tensor_model_parallel_size=2, **skipping)
    with pytest.raises(UserError, match="iterations_to_skip"):
        check_supported(run_config(**skipping), args)


def test_a_norm_that_does_not_clip_is_measured():
    assert arguments(clip_grad=0.0).clip_grad == math.inf
