"""What a run that goes on must have in common with what it was trained with.

Megatron keeps much of its optimizer's settings in the checkpoint, in the groups of parameters, and takes them from
there whatever the configuration says (betas, epsilon, momentum); by others it finds the groups (rates, which parameters
decay), or the state has another form (precision, kind of optimizer). A difference is accepted and not done, or ends in
an exception. Samples are numbered: with other data, number 1000 is another sample than the run has come to.

Checkpoints say what they were trained with in their manifests, as values in force: a default may be another on another
device. Those that do not are compared with the run's ``config.yaml``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
import yaml

from remit_megatron.run.checks import check_resumed_schedule
from remit_megatron.run.configuration import OptimizerConfig, RunConfig
from remit_megatron.run.score_cache import dataset_names
from remit_megatron.runtime.errors import UserError

# Fields of Megatron's OptimizerConfig that are no part of its state and may change from start to start: how fast it
# works, what one step does with its gradients, what is logged. All others are compared, also those to come.
_MAY_CHANGE = frozenset(
    [
        "barrier_with_L1_time",
        "clip_grad",
        "config_logger_dir",
        "fp8_recipe",
        "grad_norm_skip_threshold",
        "hysteresis",
        "initial_loss_scale",
        "log_num_zeros_in_grad",
        "loss_scale",
        "loss_scale_window",
        "main_grads_dtype",
        "min_loss_scale",
        "optimizer_cuda_graph",
        "optimizer_offload_fraction",
        "overlap_cpu_optimizer_d2h_h2d",
        "overlap_param_gather",
        "overlap_param_gather_with_optimizer_step",
        "params_dtype",
        "pin_cpu_grads",
        "pin_cpu_params",
        "reuse_grad_buf_for_mxfp8_param_ag",
        "timers",
        "use_torch_optimizer_for_cpu_offload",
    ]
)
_BESIDE = ("use_torch_fsdp2", "use_mup", "mup_base_hidden_size")  # what the groups depend on and no field says
_HYPERPARAMETERS = ("adam", "sgd", "lion", "muon", "soap", "adaptive")  # first words of an optimizer's own fields
# Compared unless megatron.override_opt_param_scheduler or use_checkpoint_opt_param_scheduler says whose values count.
_SCHEDULE = (
    "lr_decay_style",
    "lr_warmup_init",
    "weight_decay_incr_style",
    "start_weight_decay",
    "end_weight_decay",
    "lr_warmup_fraction",
)
_LENGTHS = frozenset(
    ["global_batch_size"]
    + [f"{name}_{unit}" for name in ("lr_warmup", "lr_decay", "lr_wsd_decay", "train") for unit in ("iters", "samples")]
)
# Of the last phase of the style WSD, which no checkpoint of Megatron's keeps: another one counts at once. So does
# another rate that the warm-up begins at.
_LAST_PHASE, _WARMUP_START = "megatron.lr_wsd_decay_style", "megatron.lr_warmup_init"
_OF_THE_CHECKPOINT = frozenset(f"megatron.{name}" for name in (*_SCHEDULE, "weight_decay")) - {_WARMUP_START}
_STYLE = "megatron.lr_decay_style"
_BATCH, _DYNAMIC = "megatron.global_batch_size", "megatron.dynamic_loss_scale"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "fp8"}


def training_settings(values: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """What the optimizer's state and the schedule of a run are made with, as JSON takes it.

    Args:
        values: Megatron's arguments by name, validated or not.
        config: the run.

    Returns:
        Keys of a configuration -> values in force. Keys that do not matter for the optimizer at hand are left out.
    """
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    names = [field.name for field in dataclasses.fields(OptimizerConfig) if field.name not in _MAY_CHANGE]
    optimizer = values["optimizer"]

    def matters(name: str) -> bool:
        owner = name.partition("_")[0]
        own = owner not in _HYPERPARAMETERS or optimizer == owner or optimizer not in ("adam", "sgd")
        return own and name in values

    settings = {name: values[name] for name in (*names, *_BESIDE, *_SCHEDULE) if matters(name)}
    if values["weight_decay_incr_style"] == "constant":
        settings = {name: value for name, value in settings.items() if name not in _SCHEDULE[3:5]}
    else:
        settings.pop("weight_decay", None)  # not read then
    if values["lr_decay_style"] == "WSD":
        settings["lr_wsd_decay_style"] = values["lr_wsd_decay_style"]
    settings |= {name: values[name] for name in sorted(_LENGTHS)}
    if values["fp16"]:
        settings["dynamic_loss_scale"] = not values["loss_scale"]
    settings = {f"megatron.{name}": _DTYPES.get(value, value) for name, value in settings.items()}
    return settings | {f"optimizer.{name}": value for name, value in dataclasses.asdict(config.optimizer).items()}


def settings_of_config(text: str, *, gpu: bool) -> dict[str, Any]:
    """`training_settings` of a run whose checkpoints do not say them, from its ``config.yaml``, without lengths.

    Args:
        text: the file's content.
        gpu: whether this machine's defaults are those of a GPU; another machine's cannot be known.
    """
    from remit_megatron.run.megatron_args import default_values, read_overrides

    content = yaml.safe_load(text) or {}
    values = default_values(read_overrides(content.get("megatron") or {}), gpu=gpu)
    config = RunConfig(optimizer=OptimizerConfig(**(content.get("optimizer") or {})))
    return {key: value for key, value in training_settings(values, config).items() if not _is_length(key)}


def compare_settings(
    properties: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: RunConfig,
    arguments: argparse.Namespace,
    *,
    text: str | None,
) -> None:
    """Refuses to go on from a checkpoint with an optimizer or a schedule that is not its own.

    Args:
        properties: what its manifest says.
        settings: of :func:`training_settings`, as they are now.
        text: the run's ``config.yaml``, for a manifest that does not say them; None where there is none.

    Raises:
        UserError: naming the key, with both values.
    """
    before = properties.get("settings")
    if before is None and text is not None:  # of an earlier version
        check_resumed_schedule(text, config)
        before = settings_of_config(text, gpu=torch.cuda.is_available())
    chosen = arguments.override_opt_param_scheduler or arguments.use_checkpoint_opt_param_scheduler
    check_settings(
        before or {},
        settings,
        run_dir=config.run_dir,
        schedule_chosen=chosen,
        all_chosen=arguments.override_opt_param_scheduler,
    )


def settings_in_force(
    settings: Mapping[str, Any], properties: Mapping[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What a run that goes on is trained with: with ``use_checkpoint_opt_param_scheduler`` the schedule is not the
    configuration's but its checkpoint's.

    Args:
        settings: of :func:`training_settings`.
        properties: what the manifest of the checkpoint says; nothing for a new run.
    """
    before = properties.get("settings")
    if before is None or not arguments.use_checkpoint_opt_param_scheduler:
        return dict(settings)

    def kept(key: str) -> bool:
        return key in _OF_THE_CHECKPOINT or (_is_length(key) and "wsd" not in key)

    own = {key: value for key, value in settings.items() if not kept(key)}
    return own | {key: value for key, value in before.items() if kept(key)}


def check_settings(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    run_dir: str | None,
    schedule_chosen: bool = False,
    all_chosen: bool = False,
) -> None:
    """Refuses to go on with an optimizer or a schedule that is not the checkpoints'.

    Args:
        before, now: of :func:`training_settings`.
        run_dir: of the run.
        schedule_chosen: whether the configuration says whose schedule counts (``override_opt_param_scheduler`` or
            ``use_checkpoint_opt_param_scheduler``); then it may be another one.
        all_chosen: whether it says so of what the checkpoint's schedule does not have, too: the last phase of WSD and
            the rate that the warm-up begins at (``override_opt_param_scheduler``).

    Raises:
        UserError: naming the first key that differs, with both values.
    """
    free = set(_OF_THE_CHECKPOINT) if schedule_chosen else set()
    if all_chosen:
        free |= {_LAST_PHASE, _WARMUP_START}
    elif before.get(_STYLE) == "WSD":
        free.discard(_STYLE)  # the checkpoint's schedule would lack the length of its last phase
    for key in now:
        compared = key in before and key not in free and not _is_length(key) and key != _DYNAMIC
        if compared and before[key] != now[key]:
            _refuse(key, before[key], now[key], run_dir)
    # A constant scale may replace a dynamic one; the other way round the checkpoint does not hold what is wanted.
    if now.get(_DYNAMIC) and before.get(_DYNAMIC) is False:
        _refuse("megatron.loss_scale", "a number", "nothing", run_dir)
    if _BATCH not in before:
        return
    if not schedule_chosen:
        _check_lengths(before, now, run_dir, ("lr_warmup", "lr_decay", "train"))
    if not all_chosen and _LAST_PHASE in before and _LAST_PHASE in now:
        _check_lengths(before, now, run_dir, ("lr_wsd_decay",))


def batch_change(before: Mapping[str, Any], now: Mapping[str, Any], *, consumed: int) -> str | None:
    """A line that says what another batch does to the schedule, which counts samples; or None.

    Args:
        before, now: of :func:`training_settings`.
        consumed: samples so far.
    """
    if before.get(_BATCH) in (None, now[_BATCH]):
        return None
    if now["megatron.train_iters"] is not None:
        length = (now["megatron.lr_decay_iters"] or now["megatron.train_iters"]) * now[_BATCH]
    else:
        length = now["megatron.lr_decay_samples"] or now["megatron.train_samples"]
    return (
        f"{_BATCH} is {now[_BATCH]}, and was {before[_BATCH]}: the learning rate goes on at sample {consumed:,} of a "
        f"schedule of {length:,}"
    )


def _is_length(key: str) -> bool:
    return key.removeprefix("megatron.") in _LENGTHS


def _check_lengths(
    before: Mapping[str, Any], now: Mapping[str, Any], run_dir: str | None, names: tuple[str, ...]
) -> None:
    """Warm-up, decay and length, which Megatron compares in samples."""
    unit = "iters" if now["megatron.train_iters"] is not None else "samples"
    if unit == "iters" and before["megatron.train_iters"] is not None and before[_BATCH] != now[_BATCH]:
        _refuse(_BATCH, before[_BATCH], now[_BATCH], run_dir)

    def samples(settings: Mapping[str, Any], name: str) -> float:
        if settings["megatron.train_iters"] is not None:
            return (settings[f"megatron.{name}_iters"] or 0) * settings[_BATCH]
        return settings[f"megatron.{name}_samples"] or 0

    for name in names:
        key = f"megatron.{name}_{unit}"
        was, found = samples(before, name), samples(now, name)
        if name == "lr_decay":
            was, found = was or samples(before, "train"), found or samples(now, "train")
            # The decay is as long as the run where nothing else is said.
            key = key if now[key] or before[key] else f"megatron.train_{unit}"
        if was != found:
            _refuse(key, before[key], now[key], run_dir)


def _refuse(key: str, was: Any, found: Any, run_dir: str | None) -> NoReturn:
    expected = f"{_shown(was)}, as the checkpoints in {run_dir} have it, or another run_dir with init: {run_dir}"
    raise UserError(key, _shown(found), expected)


def _shown(value: Any) -> Any:
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else value


_FINGERPRINT = "reference.weights"


def objective_record(
    config: RunConfig,
    settings: Mapping[str, Any],
    reference: str | os.PathLike | None,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """What a run minimises, as JSON takes it. It may change when a run goes on, and the run says so.

    Args:
        config: the run.
        settings: of the objective, those that it takes.
        reference: where the weights of the reference are: a run's directory holds others from day to day.
        fingerprint: of these weights (`weights_fingerprint`).
    """
    return {
        "objective.name": config.objective.name,
        **{f"objective.{name}": value for name, value in settings.items()},
        "data.mask_eod_loss": config.data.mask_eod_loss,
        "data.document_mask": config.data.document_mask,
        "reference.checkpoint": None if reference is None else os.path.abspath(reference),
        _FINGERPRINT: fingerprint,
    }


def objective_change(before: Mapping[str, Any], now: Mapping[str, Any], *, step: int) -> str | None:
    """A line that says how what is minimised differs from the steps before, or None.

    Args:
        before, now: of :func:`objective_record`.
        step: the last one of those before.
    """
    changes = [
        f"{key} is {_shown(now.get(key))}, and was {_shown(before.get(key))}"
        for key in dict.fromkeys((*now, *before))
        if now.get(key) != before.get(key) and key != _FINGERPRINT
    ]
    place, weights = "reference.checkpoint", before.get(_FINGERPRINT)
    if now.get(place) == before.get(place) and weights not in (None, now.get(_FINGERPRINT)):
        changes.append(f"{place} holds other weights, in {now[place]}")
    return f"from step {step + 1} on {'; '.join(changes)}" if changes else None


def data_record(
    datasets: Sequence[tuple[str, str]], weights: Sequence[float], config: RunConfig, *, sequence_length: int
) -> dict[str, Any]:
    """What decides which tokens are number n of a run's samples, as JSON takes it.

    Args:
        datasets: prefix and identity of the training data sets.
        weights: their shares.
        config: the run.
        sequence_length: tokens of a sample.
    """
    # In the order of the blend's tree, for which equal data and weights may stand in any order in the file.
    order = sorted(range(len(weights)), key=lambda number: (-weights[number], number))
    names = dataset_names([prefix for prefix, _ in datasets])
    return {
        "seed": config.seed,
        "sequence_length": sequence_length,
        "packing_seed": config.data.packing_seed,
        "train": [[weights[number], names[number], datasets[number][1]] for number in order],
    }


def data_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first key by which samples are others than before, with the value now and before, or None.

    Names and places of files do not count, their contents do.

    Args:
        before, now: of :func:`data_record`.
    """
    keys = {"seed": "seed", "sequence_length": "megatron.seq_length", "packing_seed": "data.packing_seed"}
    for name, key in keys.items():
        if before[name] != now[name]:
            return key, str(now[name]), str(before[name])
    was, found = before["train"], now["train"]
    same = len(was) == len(found) and all(
        entry[2] == other[2] and math.isclose(entry[0], other[0]) for entry, other in zip(was, found, strict=True)
    )
    return None if same else ("data.train", _described(found), _described(was))


def _described(train: list[list[Any]]) -> str:
    return ", ".join(f"{weight:.4g} of {name} ({identity[:8]})" for weight, name, identity in train)


def check_data(before: Mapping[str, Any], now: Mapping[str, Any], config: RunConfig, *, consumed: int) -> str | None:
    """Refuses to go on with other samples than the run was trained on, unless ``checkpoint.new_data`` allows it.

    Args:
        before, now: of :func:`data_record`.
        config: the run as it is now.
        consumed: samples that it has been trained on.

    Returns:
        A line for whoever watches the run, where the samples are others from here on.

    Raises:
        UserError: naming the key, with both values.
    """
    change = data_change(before, now)
    if change is None:
        return None
    key, found, was = change
    if not config.checkpoint.new_data:
        expected = (
            f"{was}, as the checkpoints in {config.run_dir} were trained with; checkpoint.new_data=true goes on at "
            f"sample {consumed} of the new order, another run_dir with init: {config.run_dir} at its first"
        )
        raise UserError(key, found, expected)
    return f"{key} is {found}, and was {was}: going on at sample {consumed} of the new order"
