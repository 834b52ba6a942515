"""What of the optimizer, the schedule and the data may change when a run goes on."""

from __future__ import annotations

from typing import Any

import pytest

import patches

patches.apply()

from remit_megatron.run.configuration import OptimizerConfig, RunConfig  # noqa: E402
from remit_megatron.run.prepare import count_from, total_steps  # noqa: E402
from remit_megatron.run.resume import (  # noqa: E402
    batch_change,
    check_data,
    check_settings,
    data_record,
    objective_change,
    objective_record,
    settings_in_force,
    settings_of_config,
    training_settings,
)
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.unit.run.test_megatron_args import arguments, run_config  # noqa: E402

BASE: dict[str, Any] = {"train_iters": 60, "global_batch_size": 32}


def settings(megatron: dict[str, Any], gpu: bool = False, **optimizer: bool) -> dict[str, Any]:
    config = run_config(**{name: value for name, value in (BASE | megatron).items() if value is not None})
    config.megatron = {
        name: value for name, value in config.megatron.items() if (BASE | megatron).get(name, 0) is not None
    }
    config.optimizer = OptimizerConfig(**optimizer)
    return training_settings(vars(arguments(config=config)), config)


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        ({}, {"adam_beta1": 0.8}, "megatron.adam_beta1: found 0.8; expected 0.9, as the checkpoints in runs/x have it"),
        ({}, {"adam_beta2": 0.999}, "megatron.adam_beta2: found 0.999; expected 0.95"),
        ({}, {"adam_eps": 1e-6}, "megatron.adam_eps: found 1e-06; expected 1e-08"),
        ({}, {"bf16": True}, "megatron.bf16: found true; expected false"),
        ({}, {"fp16": True}, "megatron.fp16: found true; expected false"),
        ({"fp16": True}, {"bf16": True}, "megatron.fp16: found false; expected true"),
        ({"fp16": True, "loss_scale": 128.0}, {"fp16": True}, "megatron.loss_scale: found nothing; expected a number"),
        ({}, {"optimizer": "sgd"}, "megatron.optimizer: found sgd; expected adam"),
        (
            {"optimizer": "sgd"},
            {"optimizer": "sgd", "sgd_momentum": 0.5},
            "megatron.sgd_momentum: found 0.5; expected 0.9",
        ),
        ({}, {"use_distributed_optimizer": True}, "megatron.use_distributed_optimizer: found true; expected false"),
        ({}, {"decoupled_lr": 1e-4}, "megatron.decoupled_lr: found 0.0001; expected nothing"),
        ({"decoupled_lr": 1e-4}, {}, "megatron.decoupled_lr: found nothing; expected 0.0001"),
        (
            {"decoupled_lr": 1e-4, "decoupled_min_lr": 1e-5},
            {"decoupled_lr": 1e-4, "decoupled_min_lr": 1e-6},
            "megatron.decoupled_min_lr: found 1e-06; expected 1e-05",
        ),
        ({}, {"apply_wd_to_qk_layernorm": True}, "megatron.apply_wd_to_qk_layernorm: found true; expected false"),
        (
            {},
            {"no_weight_decay_cond_type": "apply_wd_to_qk_layernorm"},
            "megatron.apply_wd_to_qk_layernorm: found true; expected false",
        ),
        ({}, {"lr": 5e-4}, "megatron.lr: found 0.0005; expected 0.001"),
        ({}, {"min_lr": 1e-5}, "megatron.min_lr: found 1e-05; expected 1e-07"),
        ({}, {"weight_decay": 0.2}, "megatron.weight_decay: found 0.2; expected 0.1"),
        ({}, {"lr_decay_style": "linear"}, "megatron.lr_decay_style: found linear; expected cosine"),
        ({}, {"train_iters": 80}, "megatron.train_iters: found 80; expected 60"),
        ({}, {"lr_decay_iters": 90}, "megatron.lr_decay_iters: found 90; expected nothing"),
        ({"lr_decay_iters": 60}, {"lr_decay_iters": 60, "train_iters": 80}, "megatron.train_iters: found 80"),
        ({}, {"lr_warmup_iters": 5}, "megatron.lr_warmup_iters: found 5; expected 0"),
        ({}, {"lr_warmup_fraction": 0.1}, "megatron.lr_warmup_fraction: found 0.1; expected nothing"),
        ({}, {"global_batch_size": 64}, "megatron.global_batch_size: found 64; expected 32"),
    ],
)
def test_may_not_change(before, now, line):
    with pytest.raises(UserError) as caught:
        check_settings(settings(before), settings(now), run_dir="runs/x")
    assert str(caught.value).startswith(line)
    assert str(caught.value).endswith("or another run_dir with init: runs/x")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {}),
        ({}, {"adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "bf16": False}),  # defaults, spelled out
        ({}, {"clip_grad": 0.5, "micro_batch_size": 2, "save_interval": 7}),
        ({}, {"lr_decay_iters": 60}),
        ({}, {"train_iters": None, "train_samples": 1920}),
        (
            {"train_iters": None, "train_samples": 1920},
            {"train_iters": None, "train_samples": 1920, "global_batch_size": 64},
        ),
        ({"fp16": True}, {"fp16": True, "loss_scale": 128.0}),
        ({"fp16": True}, {"fp16": True, "initial_loss_scale": 65536, "hysteresis": 4, "min_loss_scale": 2.0}),
        ({"optimizer": "sgd"}, {"optimizer": "sgd", "adam_beta1": 0.5}),
    ],
)
def test_may_change(before, now):
    check_settings(settings(before), settings(now), run_dir="runs/x")


def test_a_chosen_schedule_may_be_another_and_nothing_else():
    longer = {"train_iters": 80, "lr_decay_style": "linear", "weight_decay": 0.2, "override_opt_param_scheduler": True}
    check_settings(settings({}), settings(longer), run_dir="runs/x", schedule_chosen=True)
    for change in ({"lr": 1e-4}, {"adam_beta1": 0.5}):
        with pytest.raises(UserError):
            check_settings(settings({}), settings(longer | change), run_dir="runs/x", schedule_chosen=True)


WSD: dict[str, Any] = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"lr_wsd_decay_iters": 30},
            "megatron.lr_wsd_decay_iters: found 30; expected 20, as the checkpoints in runs/x",
        ),
        ({"lr_wsd_decay_style": "linear"}, "megatron.lr_wsd_decay_style: found linear; expected exponential"),
    ],
)
def test_the_last_phase_may_not_change_without_a_word(change, line):
    """Megatron keeps it in no checkpoint: the rate of the next step would be another one at once."""
    from remit_megatron.run.optimization import scheduler

    def rate(chosen: dict[str, Any]) -> float:
        schedule = scheduler(arguments(config=run_config(**BASE | chosen)))
        schedule.num_steps = 50 * BASE["global_batch_size"]
        group = {"max_lr": 1e-3, "min_lr": 0.0, "lr_mult": 1.0}
        return schedule.get_lr(group)

    assert rate(WSD) != rate(WSD | change)
    before, now = settings(WSD), settings(WSD | change)
    check_settings(before, before, run_dir="runs/x")
    for chosen in (False, True):  # the checkpoint's schedule, which use_checkpoint_opt_param_scheduler takes, has none
        with pytest.raises(UserError) as caught:
            check_settings(before, now, run_dir="runs/x", schedule_chosen=chosen)
        assert str(caught.value).startswith(line)
    check_settings(before, now, run_dir="runs/x", schedule_chosen=True, all_chosen=True)
    older = {key: value for key, value in before.items() if "wsd" not in key}  # of checkpoints that do not say it
    check_settings(older, now, run_dir="runs/x")
    without = {"lr_wsd_decay_iters": 5}  # no effect with another style
    check_settings(settings({}), settings(without), run_dir="runs/x")


def in_force(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    chosen = now | {"use_checkpoint_opt_param_scheduler": True}
    found = arguments(config=run_config(**BASE | chosen))
    return settings_in_force(settings(chosen), {"settings": settings(before)}, found)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"lr_decay_style": "linear"}),
        ({}, {"weight_decay": 0.5}),
        ({"lr_warmup_iters": 5}, {}),
        ({}, {"train_iters": 80}),
        ({"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1}, {}),
    ],
)
def test_checkpoints_say_the_schedule_that_was_in_force(before, now):
    """With the checkpoint's schedule what the configuration says of it is not done, and must not be written down."""
    assert in_force(before, now) == settings(before)
    assert in_force({}, {"clip_grad": 0.5, "adam_beta1": 0.9}) == settings({})
    new = settings(now)
    assert settings_in_force(new, {}, arguments(config=run_config(**BASE | now))) == new


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        (WSD, {}, "megatron.lr_decay_style: found cosine; expected WSD"),
        (
            {"lr_warmup_iters": 5},
            {"lr_warmup_iters": 5, "lr_warmup_init": 1e-4},
            "megatron.lr_warmup_init: found 0.0001; expected 0",
        ),
    ],
)
def test_what_the_checkpoint_s_schedule_does_not_have(before, now, line):
    with pytest.raises(UserError) as caught:
        check_settings(settings(before), settings(now), run_dir="runs/x", schedule_chosen=True)
    assert str(caught.value).startswith(line)
    check_settings(settings(before), settings(now), run_dir="runs/x", schedule_chosen=True, all_chosen=True)


def test_another_batch_is_said_with_what_it_does_to_the_schedule():
    assert batch_change(settings({}), settings({}), consumed=64) is None
    assert batch_change({}, settings({}), consumed=64) is None
    line = batch_change(settings({}), settings({"global_batch_size": 16}), consumed=640)
    assert line is not None and "is 16, and was 32" in line and line.endswith("at sample 640 of a schedule of 960")
    samples = {"train_iters": None, "train_samples": 1920}
    line = batch_change(settings(samples), settings(samples | {"global_batch_size": 64}), consumed=640)
    assert line is not None and line.endswith("at sample 640 of a schedule of 1,920")


@pytest.mark.parametrize(
    ("megatron", "batch", "steps"),
    [
        ({"train_samples": 1000}, 32, 31),  # what does not fill a batch is not trained on
        ({"train_samples": 1000}, 16, 10 + 42),
        ({"train_samples": 1000}, 64, 10 + 10),
        ({"train_samples": 320}, 64, 10),
        ({"train_samples": 100}, 32, 10),
        ({"train_iters": 60}, 16, 60),
    ],
)
def test_a_run_is_as_long_as_it_says_whatever_its_batches(megatron, batch, steps):
    """Ten steps of 32 samples, and the rest in another batch."""
    values = {"train_iters": None} | megatron | {"global_batch_size": batch}
    config = run_config()
    config.megatron = {name: value for name, value in (config.megatron | values).items() if value is not None}
    found = arguments(config=config)
    samples = count_from(found, step=10, consumed=320)
    assert total_steps(found) == steps and samples == 320 + (steps - 10) * batch
    found.train_iters = steps  # as Megatron's loop has it
    assert total_steps(found) == steps
    assert count_from(found, step=0, consumed=0) == total_steps(found) * batch


def test_what_is_minimised_may_change_and_is_said():
    config = RunConfig(run_dir="runs/x")
    before = objective_record(config, {"epsilon": 0.2, "centering": "sequence"}, "models/reference")
    assert objective_change(before, dict(before), step=7) is None
    other = RunConfig(run_dir="runs/x")
    other.data.mask_eod_loss = True
    now = objective_record(other, {"epsilon": None, "centering": "sequence"}, None)
    line = objective_change(before, now, step=7)
    assert line is not None and line.startswith("from step 8 on objective.epsilon is nothing, and was 0.2; ")
    assert "data.mask_eod_loss is true, and was false; reference.checkpoint is nothing, and was /" in line


def test_other_weights_in_the_place_of_the_reference_are_said():
    config = RunConfig(run_dir="runs/x")
    records = {weights: objective_record(config, {}, "/models/reference", weights) for weights in ("a", "b", None)}
    line = "from step 8 on reference.checkpoint holds other weights, in /models/reference"
    assert objective_change(records["a"], records["b"], step=7) == line
    assert objective_change(records["a"], records["a"], step=7) is None
    assert objective_change(records[None], records["b"], step=7) is None  # of an older version
    elsewhere = objective_record(config, {}, "/models/other", "b")
    moved = objective_change(records["a"], elsewhere, step=7)
    assert moved is not None and "weights" not in moved


def test_which_parameters_decay_may_not_change():
    with pytest.raises(UserError) as caught:
        check_settings(settings({}), settings({}, decay_norms=True), run_dir="runs/x")
    assert str(caught.value).startswith("optimizer.decay_norms: found true; expected nothing")


def test_a_default_of_another_device_is_found():
    """What a GPU has where nothing is said: bf16 and the distributed optimizer."""
    from remit_megatron.run.megatron_args import default_values

    chosen = {"lr": 1e-3, "train_iters": 60}
    on_gpu = training_settings(default_values(chosen, gpu=True), RunConfig())
    with pytest.raises(UserError) as caught:
        check_settings(on_gpu, settings({}), run_dir="runs/x")
    assert str(caught.value).startswith("megatron.bf16: found false; expected true")


def test_every_field_of_the_optimizer_is_compared_or_may_change():
    """A field that a new Megatron brings is compared until somebody has looked at it."""
    from remit_megatron.run.resume import _MAY_CHANGE

    compared = {key.removeprefix("megatron.") for key in settings({}) if key.startswith("megatron.")}
    assert not compared & _MAY_CHANGE
    assert {
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "optimizer",
        "bf16",
        "fp16",
        "use_distributed_optimizer",
    } <= compared
    assert {"exp_avg_dtype", "main_params_dtype", "use_precision_aware_optimizer", "optimizer_cpu_offload"} <= compared


def test_settings_are_json():
    import json

    found = settings({"fp16": True})
    assert json.loads(json.dumps(found)) == found


def test_a_run_of_an_earlier_version_is_compared_by_its_configuration():
    config = RunConfig(run_dir="runs/x", megatron={"lr": 1e-3, "train_iters": 60, "adam-beta1": 0.8})
    before = settings_of_config(config.to_yaml(), gpu=False)
    check_settings(before, settings({"adam_beta1": 0.8}), run_dir="runs/x")
    with pytest.raises(UserError) as caught:
        check_settings(before, settings({}), run_dir="runs/x")
    assert str(caught.value).startswith("megatron.adam_beta1: found 0.9; expected 0.8")


def blend(*parts: tuple[float, str, str]) -> Any:
    total = sum(weight for weight, _, _ in parts)
    datasets = [(prefix, identity * 64) for _, prefix, identity in parts]
    return datasets, [weight / total for weight, _, _ in parts]


WEB, MATH = (3.0, "data/web", "a"), (1.0, "data/math", "b")


@pytest.mark.parametrize(
    "now",
    [
        blend(WEB, MATH),
        blend((0.75, "elsewhere/web", "a"), (0.25, "elsewhere/math", "b")),
        blend(MATH, WEB),
    ],
    ids=["same", "moved", "listed in another order"],
)
def test_the_same_data_by_another_name(now):
    config = RunConfig(run_dir="runs/x")
    before = data_record(*blend(WEB, MATH), config, sequence_length=64)
    assert check_data(before, data_record(*now, config, sequence_length=64), config, consumed=10) is None


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (
            dict(blend=blend(WEB)),
            "data.train: found 1 of web (aaaaaaaa); expected 0.75 of web (aaaaaaaa), 0.25 of math",
        ),
        (dict(blend=blend((1.0, "data/web", "a"), MATH)), "data.train: found 0.5 of web"),
        (dict(blend=blend((3.0, "data/web", "c"), MATH)), "data.train: found 0.75 of web (cccccccc)"),
        (dict(seed=7), "seed: found 7; expected 1234"),
        (dict(sequence_length=128), "megatron.seq_length: found 128; expected 64"),
        (dict(packing_seed=3), "data.packing_seed: found 3; expected 0"),
    ],
)
def test_other_data_is_refused_or_said(now, line):
    config = RunConfig(run_dir="runs/x")
    before = data_record(*blend(WEB, MATH), config, sequence_length=64)
    other = RunConfig(run_dir="runs/x", seed=now.get("seed", 1234))
    other.data.packing_seed = now.get("packing_seed", 0)
    record = data_record(*now.get("blend", blend(WEB, MATH)), other, sequence_length=now.get("sequence_length", 64))
    with pytest.raises(UserError) as caught:
        check_data(before, record, other, consumed=10)
    assert str(caught.value).startswith(line)
    assert "checkpoint.new_data=true goes on at sample 10 of the new order" in str(caught.value)
    other.checkpoint.new_data = True
    said = check_data(before, record, other, consumed=10)
    assert said is not None and said.endswith("going on at sample 10 of the new order")
