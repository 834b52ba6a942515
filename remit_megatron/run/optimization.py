"""What Megatron's optimizer and schedule refuse, asked before anything is started.

Much of it Megatron checks only where the optimizer is built, after minutes of loading and on every rank, and some of it
never: a momentum of 1, a warm-up that begins above its peak. :func:`check_optimization` says it in one line;
:func:`construct` then builds Megatron's own objects, so that nothing that they assert is left for the run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from remit_megatron.runtime.errors import UserError

# What an optimizer of Megatron takes: the key, and what its value has to be.
_HYPERPARAMETERS = {
    "adam": ("adam_beta1", "adam_beta2", "adam_eps"),
    "sgd": ("sgd_momentum",),
    "lion": ("lion_beta1", "lion_beta2"),
    "muon": ("muon_momentum", "adam_beta1", "adam_beta2", "adam_eps"),
}
_CORE_OPTIMIZERS = ("adam", "sgd")
# A rate below it changes next to no weight: an update of Adam is about as large, and half the distance of two float32
# numbers around 0.02 is 9e-10.
_LOWEST_RATE = 1e-12


def check_optimization(values: Mapping[str, Any]) -> None:
    """Refuses learning rates, schedules, weight decay and optimizer settings that cannot be meant or cannot run.

    Args:
        values: Megatron's arguments by name, before ``validate_args``.

    Raises:
        UserError: naming the key.
    """
    _check_rates(values)
    _check_lengths(values)
    _check_weight_decay(values)
    _check_optimizer(values)
    _check_loss_scale(values)


def _refuse_unless(condition: bool, values: Mapping[str, Any], key: str, expected: str) -> None:
    if not condition:
        found = values[key]
        raise UserError(f"megatron.{key}", "nothing" if found is None else found, expected)


def _check_rates(values: Mapping[str, Any]) -> None:
    lr, lowest, start = values["lr"], values["min_lr"], values["lr_warmup_init"]
    _refuse_unless(math.isfinite(lr), values, "lr", "a finite number")
    expected = f"{_LOWEST_RATE:g} or more: float32 weights would stay as they are"
    _refuse_unless(lr >= _LOWEST_RATE, values, "lr", expected)
    _refuse_unless(lowest >= 0, values, "min_lr", f"a number from 0 to lr, {lr}")
    _refuse_unless(lowest <= lr, values, "min_lr", f"at most lr, {lr}")
    _refuse_unless(0 <= start <= lr, values, "lr_warmup_init", f"a number from 0 to lr, {lr}")
    decoupled, decoupled_lowest = values["decoupled_lr"], values["decoupled_min_lr"]
    if decoupled is None:
        _refuse_unless(decoupled_lowest is None, values, "decoupled_min_lr", "nothing without decoupled_lr")
        return
    _refuse_unless(0 < decoupled < math.inf, values, "decoupled_lr", "a finite number above 0")
    if decoupled_lowest is not None:
        expected = f"a number from 0 to decoupled_lr, {decoupled}"
        _refuse_unless(0 <= decoupled_lowest <= decoupled, values, "decoupled_min_lr", expected)
    elif decoupled < lowest:
        expected = f"at least min_lr, {lowest}, or decoupled_min_lr below it"
        raise UserError("megatron.decoupled_lr", decoupled, expected)


def _check_lengths(values: Mapping[str, Any]) -> None:
    """Lengths of warm-up, decay and annealing, in the unit that the run's length has."""
    unit, other = ("iters", "samples") if values["train_iters"] is not None else ("samples", "iters")
    for key in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if values[f"{key}_{other}"]:
            expected = f"{key}_{unit}, as for train_{unit}"
            raise UserError(f"megatron.{key}_{other}", values[f"{key}_{other}"], expected)
    decay = values[f"lr_decay_{unit}"]
    _refuse_unless(decay is None or decay > 0, values, f"lr_decay_{unit}", "more than 0, or nothing")
    decay = decay or values[f"train_{unit}"]
    warmup, fraction = f"lr_warmup_{unit}", values["lr_warmup_fraction"]
    _refuse_unless(values[warmup] >= 0, values, warmup, "0 or more")
    _refuse_unless(values[warmup] < decay, values, warmup, f"less than {decay}, the end of decay")
    if fraction is not None:
        _refuse_unless(0 <= fraction < 1, values, "lr_warmup_fraction", "a number from 0 to below 1")
        _refuse_unless(not values[warmup], values, warmup, "nothing beside lr_warmup_fraction")
    if values["lr_decay_style"] == "WSD":
        key = f"lr_wsd_decay_{unit}"
        _refuse_unless(values[key] is not None, values, key, "the length of the last phase of lr_decay_style WSD")
        longest = decay - (values[warmup] if fraction is None else math.ceil(fraction * decay))
        expected = f"a number from 0 to {longest}, from the end of warm-up to the end of decay"
        _refuse_unless(0 <= values[key] <= longest, values, key, expected)
    if values["override_opt_param_scheduler"] and values["use_checkpoint_opt_param_scheduler"]:
        found = "true together with use_checkpoint_opt_param_scheduler: true"
        raise UserError("megatron.override_opt_param_scheduler", found, "one of the two")


def _check_weight_decay(values: Mapping[str, Any]) -> None:
    style, first, last = (values[key] for key in ("weight_decay_incr_style", "start_weight_decay", "end_weight_decay"))
    if style == "constant":
        _refuse_unless(0 <= values["weight_decay"] < math.inf, values, "weight_decay", "a finite number, 0 or more")
        for key in ("start_weight_decay", "end_weight_decay"):
            expected = "nothing with weight_decay_incr_style constant; weight_decay is the value"
            _refuse_unless(values[key] is None, values, key, expected)
        return
    if first is None or last is None:
        return  # validate_args says that they have to be set
    for key in ("start_weight_decay", "end_weight_decay"):
        _refuse_unless(0 <= values[key] < math.inf, values, key, "a finite number, 0 or more")
    _refuse_unless(last >= first, values, "end_weight_decay", f"at least start_weight_decay, {first}: it cannot fall")


def _check_optimizer(values: Mapping[str, Any]) -> None:
    name = values["optimizer"]
    _check_is_installed(name, values)
    for key in _HYPERPARAMETERS.get(name.removeprefix("dist_"), ()):
        if "beta" in key or "momentum" in key:
            _refuse_unless(0 <= values[key] < 1, values, key, "a number from 0 to below 1")
        else:
            _refuse_unless(0 < values[key] < math.inf, values, key, "a number above 0")
    if name == "sgd" and values["use_distributed_optimizer"]:
        expected = "false with optimizer sgd: Megatron shards the state of adam only"
        raise UserError("megatron.use_distributed_optimizer", "true", expected)
    instances = values["num_distributed_optimizer_instances"]
    _refuse_unless(instances >= 1, values, "num_distributed_optimizer_instances", "1 or more")
    if instances > 1 and not values["use_distributed_optimizer"]:
        expected = "1 without use_distributed_optimizer"
        raise UserError("megatron.num_distributed_optimizer_instances", instances, expected)
    _refuse_unless(values["clip_grad"] >= 0, values, "clip_grad", "a norm above 0, or 0 to not clip")


def _check_is_installed(name: str, values: Mapping[str, Any]) -> None:
    if name in _CORE_OPTIMIZERS:
        return
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS, HAVE_EMERGING_OPTIMIZERS

    if not HAVE_EMERGING_OPTIMIZERS:
        expected = f"one of {', '.join(_CORE_OPTIMIZERS)}: others need the package emerging-optimizers"
        raise UserError("megatron.optimizer", name, f"{expected}, which is not installed")
    known = [*_CORE_OPTIMIZERS, *_EMERGING_OPTIMIZERS]
    if name.removeprefix("dist_") not in known:
        raise UserError("megatron.optimizer", name, f"one of {', '.join(known)}")
    if values["fp16"]:
        raise UserError("megatron.fp16", "true", f"false with optimizer {name}")


def _check_loss_scale(values: Mapping[str, Any]) -> None:
    fixed = values["loss_scale"]
    _refuse_unless(fixed is None or 0 < fixed < math.inf, values, "loss_scale", "a number above 0, or nothing")
    if not values["fp16"] or fixed is not None:
        return  # the others are those of fp16's dynamic scale
    first, lowest = values["initial_loss_scale"], values["min_loss_scale"]
    _refuse_unless(0 < first < math.inf, values, "initial_loss_scale", "a number above 0")
    _refuse_unless(0 < lowest <= first, values, "min_loss_scale", f"above 0, at most initial_loss_scale {first:g}")
    window = values["loss_scale_window"]
    _refuse_unless(window >= 1 and window == int(window), values, "loss_scale_window", "a whole number of steps")
    _refuse_unless(values["hysteresis"] >= 1, values, "hysteresis", "1 or more")


def construct(args: argparse.Namespace) -> None:
    """Builds the optimizer's configuration, the gradients' and the scheduler as the run would, and steps through it.

    Args:
        args: after ``validate_args``.

    Raises:
        AssertionError, ValueError, RuntimeError: Megatron refuses them.
    """
    from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

    get_megatron_optimizer_config(args)
    get_megatron_ddp_config(args)
    schedule = scheduler(args)
    (group,) = schedule.optimizer.param_groups
    for step in {0, 1, int(schedule.lr_warmup_steps), schedule.lr_decay_steps, schedule.wd_incr_steps}:
        schedule.num_steps = step
        schedule.get_lr(group)
        schedule.get_wd(group)


def scheduler(args: argparse.Namespace) -> Any:
    """Megatron's ``OptimizerParamScheduler`` of a run, of one group of no parameters; its steps count samples.

    As ``megatron.training.training.get_optimizer_param_scheduler`` does it, which reads global arguments.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    if args.train_iters:
        factor, unit = args.global_batch_size, "iters"
    else:
        factor, unit = 1, "samples"
    length = getattr(args, f"train_{unit}") * factor
    decay = (getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")) * factor
    warmup, anneal = getattr(args, f"lr_warmup_{unit}") * factor, getattr(args, f"lr_wsd_decay_{unit}")
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    group = {"lr": args.lr, "max_lr": args.lr, "min_lr": args.min_lr, "wd_mult": 1.0, "lr_mult": 1.0}
    return OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),  # pyright: ignore[reportArgumentType]
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=length,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=None if anneal is None else anneal * factor,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
