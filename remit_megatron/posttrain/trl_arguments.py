"""The ``trl`` section of a configuration to TRL's own configuration object: every argument by its own name.

What TRL would take and not do here, or do in a way that a resumed run could not repeat, is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from remit_megatron.posttrain.configuration import PosttrainSettings
from remit_megatron.runtime.errors import UserError, did_you_mean, show
from remit_megatron.runtime.extras import is_installed
from remit_megatron.runtime.settings_files import first_line

# Argument -> where it is said instead, or why it is not there.
_HERE = "nothing: "
REFUSED: dict[str, str] = {
    "output_dir": _HERE + "run_dir says it",
    "seed": _HERE + "seed, beside trl, says it",
    "chat_template_path": _HERE + "chat_template, beside trl, says it",
    "dataset_text_field": _HERE + "the lines of data.train have fixed names",
    "dataset_kwargs": _HERE + "the data is prepared by remit",
    "remove_unused_columns": _HERE + "the data is prepared by remit",
    "label_names": _HERE + "the data is prepared by remit",
    "reward_weights": _HERE + "a line has one verifier",
    "multi_objective_aggregation": _HERE + "a line has one verifier",
    "max_tool_calling_iterations": _HERE + "no tools are called",
    "resume_from_checkpoint": _HERE + "starting the same command again resumes",
    "restore_callback_states_from_checkpoint": _HERE + "starting the same command again resumes",
    "ignore_data_skip": _HERE + "a resumed run goes on where it was",
    "enable_jit_checkpoint": _HERE + "SIGTERM saves",
    "save_only_model": _HERE + "a run could not be resumed; keep.every keeps models alone",
    "logging_steps": _HERE + "metrics.jsonl has every step",
    "logging_strategy": _HERE + "metrics.jsonl has every step",
    "logging_first_step": _HERE + "metrics.jsonl has every step",
    "logging_nan_inf_filter": _HERE + "a loss that is not finite is written as null",
    "log_level": _HERE + "the libraries' logs are in logs/",
    "log_level_replica": _HERE + "the libraries' logs are in logs/",
    "log_on_each_node": _HERE + "every rank has a file in logs/",
    "disable_tqdm": _HERE + "progress is one line of remit's",
    "report_to": _HERE + "metrics.jsonl has every figure",
    "run_name": _HERE + "metrics.jsonl has every figure",
    "project": _HERE + "metrics.jsonl has every figure",
    "trackio_space_id": _HERE + "metrics.jsonl has every figure",
    "trackio_bucket_id": _HERE + "metrics.jsonl has every figure",
    "trackio_static_space_id": _HERE + "metrics.jsonl has every figure",
    "num_completions_to_print": _HERE + "log_completions writes them to checkpoints/completions",
    "log_unique_prompts": _HERE + "log_completions writes them to checkpoints/completions",
    "log_multimodal": _HERE + "texts only",
    "log_completions_hub_repo": _HERE + "nothing is sent to a hub",
    "load_best_model_at_end": _HERE + "the result is the last step's; keep.every keeps others",
    "metric_for_best_model": _HERE + "the result is the last step's; keep.every keeps others",
    "greater_is_better": _HERE + "the result is the last step's; keep.every keeps others",
    "auto_find_batch_size": _HERE + "a batch size found by failing is not the configured one",
    "do_train": _HERE + "the command says it",
    "do_eval": _HERE + "data.valid and eval_strategy say it",
    "do_predict": _HERE + "the command says it",
    "local_rank": _HERE + "the launcher says it",
    "sync_ref_model": _HERE + "TRL does not save the moving reference, so that a resumed run would begin with another",
    "ref_model_mixup_alpha": _HERE + "see sync_ref_model",
    "ref_model_sync_steps": _HERE + "see sync_ref_model",
    "trust_remote_code": _HERE + "code from a model's directory is not run",
    "use_transformers_paged": _HERE + "use_transformers_continuous_batching is its name now",
    "vllm_importance_sampling_cap": _HERE + "vllm_importance_sampling_clip_max is its name now",
}
# What TRL and the libraries under it raise where arguments or data are wrong.
REFUSALS = (ValueError, TypeError, ArithmeticError, NotImplementedError, ImportError)
_HUB = ("push_to_hub", "hub_")
# Argument -> whether a number is one of it, in words. TRL takes others, and fails later or trains nothing.
_Limit = tuple[Callable[[float], bool], str]
_COUNT: _Limit = (lambda value: value >= 1, "at least 1")
_ABOVE_0: _Limit = (lambda value: value > 0, "a number above 0")
_FROM_0: _Limit = (lambda value: value >= 0, "0 or more")
_MOMENTUM: _Limit = (lambda value: 0 <= value < 1, "from 0 to below 1")
_SHARE: _Limit = (lambda value: 0 <= value <= 1, "from 0 to 1")
_LIMITS: dict[str, _Limit] = {
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 for trl.num_train_epochs"),
    "num_generations": (lambda value: value >= 2, "at least 2: a reward is compared with those of the others"),
    "top_p": (lambda value: 0 < value <= 1, "above 0, up to 1"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "eval_accumulation_steps"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"), _COUNT),
    **dict.fromkeys(("num_generations_eval", "num_iterations", "max_completion_length", "max_length"), _COUNT),
    **dict.fromkeys(("save_total_limit", "ddp_timeout", "dataset_num_proc", "precompute_ref_batch_size"), _COUNT),
    **dict.fromkeys(("learning_rate", "num_train_epochs", "temperature", "repetition_penalty"), _ABOVE_0),
    **dict.fromkeys(("save_steps", "eval_steps"), _ABOVE_0),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay", "beta"), _FROM_0),
    **dict.fromkeys(("epsilon", "epsilon_high", "delta", "top_k", "dataloader_num_workers"), _FROM_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _MOMENTUM),
    **dict.fromkeys(("min_p", "top_entropy_quantile", "label_smoothing_factor"), _SHARE),
}
# Argument -> the package that must be there for it.
_PACKAGES = {
    "use_vllm": ("vllm", "an environment of its own, see docs/posttrain.md"),
    "deepspeed": ("deepspeed", "pip install deepspeed"),
    "use_liger_kernel": ("liger_kernel", "pip install liger-kernel"),
}


def config_class(stage: str) -> type:
    """TRL's configuration class of a stage; imports TRL."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.sft_config import SFTConfig

    return {"sft": SFTConfig, "dpo": DPOConfig, "rlvr": GRPOConfig}[stage]


def check_names(settings: PosttrainSettings) -> None:
    """Refuses what the stage's class of TRL has no argument for, what is refused here, and values of a wrong type or
    out of their range.

    Raises:
        UserError: as said.
    """
    _check(settings.trl, config_class(settings.stage))


def build_arguments(settings: PosttrainSettings, *, has_valid: bool) -> Any:
    """TRL's configuration object with the values of ``settings.trl`` and what follows from the rest.

    Raises:
        UserError: an argument that TRL does not have, that is refused, of a wrong type, or that TRL refuses.
    """
    check_names(settings)
    cls, given = config_class(settings.stage), dict(settings.trl)
    _check_evaluation(given, has_valid)
    cpu = not torch.cuda.is_available()
    values: dict[str, Any] = {
        "output_dir": str(Path(settings.run_dir) / "checkpoints"),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": "none",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "push_to_hub": False,
        "dataloader_pin_memory": not cpu,
        "ddp_find_unused_parameters": False,  # all are used, and looking for others warns on every rank
    }
    if cpu:
        values |= {"use_cpu": True, "bf16": False}
    if settings.stage == "rlvr":
        values["num_completions_to_print"] = 0  # log_completions writes files; its tables would fill the terminal
    for name, (package, advice) in _PACKAGES.items():
        if given.get(name) and not is_installed(package):
            raise UserError(f"trl.{name}", f"{show(given[name])}, without {package}", advice)
    if cpu and given.get("use_vllm"):
        raise UserError("trl.use_vllm", "true, on a machine without a GPU", "false")
    # The checkpoints are removed by us, when the newer one is known to be whole.
    arguments = {**values, **given, "save_total_limit": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that TRL's own defaults use too
            return cls(**arguments)
    except REFUSALS as error:
        found = first_line(error)
        name = next((name for name in sorted(given, key=len, reverse=True) if name in found), None)
        raise UserError(f"trl.{name}" if name else "trl", found, "arguments that TRL takes together") from None


def check_amount(arguments: Any, *, stage: str, records: int) -> None:
    """Refuses training data of which a pass would have no whole batch: TRL ends such a run, done, without a step.

    Args:
        arguments: TRL's configuration object.
        records: lines of ``data.train``.

    Raises:
        UserError: as said.
    """
    if stage == "rlvr":
        drawn, group = arguments.generation_batch_size, arguments.num_generations
        needed, why = drawn // group, f"a step asks {drawn // group} of them, for {drawn} completions, {group} of each"
    elif arguments.dataloader_drop_last and not getattr(arguments, "packing", False):
        needed = arguments.train_batch_size * arguments.world_size
        why = "trl.dataloader_drop_last leaves out a batch that is not whole"
    else:
        return
    if records < needed:
        raise UserError("data.train", f"{records} lines", f"at least {needed}: {why}")


def resolved_arguments(arguments: Any) -> dict[str, Any]:
    """What TRL uses of every argument that a configuration may name, for config.yaml: plain values."""
    plain = arguments.to_dict()
    return {
        name: _plain(plain[name])
        for name in sorted(plain)
        if name not in REFUSED and not name.startswith(_HUB) and plain[name] is not None
    }


def _check(given: Mapping[str, Any], cls: type) -> None:
    hints = typing.get_type_hints(cls)
    known = sorted(field.name for field in dataclasses.fields(cls) if field.init)
    usable = [name for name in known if name not in REFUSED and not name.startswith(_HUB)]
    for name, value in given.items():
        if name in REFUSED and name in known:
            raise UserError(f"trl.{name}", show(value), REFUSED[name])
        if name not in known:
            raise UserError(f"trl.{name}", show(value), f"an argument of TRL's {cls.__name__}{_nearest(name, usable)}")
        if name.startswith(_HUB):
            raise UserError(f"trl.{name}", show(value), _HERE + "nothing is sent to a hub")
        if not _fits(value, hints[name]):
            raise UserError(f"trl.{name}", show(value), _words(hints[name]))
        right, expected = _LIMITS.get(name, (lambda _: True, ""))
        if isinstance(value, int | float) and not right(value):
            raise UserError(f"trl.{name}", show(value), expected)


def _nearest(name: str, usable: list[str]) -> str:
    gone = {
        "warmup_ratio": "warmup_steps, where a number below 1 is a share",
        "max_prompt_length": "none: TRL cuts no prompts",
    }
    return f"; {gone[name]}" if name in gone else did_you_mean(name, usable)


def _check_evaluation(given: Mapping[str, Any], has_valid: bool) -> None:
    strategy = given.get("eval_strategy", "no")
    if has_valid and strategy == "no" and not given.get("eval_on_start"):
        raise UserError("trl.eval_strategy", show(strategy), "steps (with eval_steps) or epoch, for data.valid")
    if not has_valid and (strategy != "no" or given.get("eval_on_start")):
        raise UserError("data.valid", "nothing", f"files, for trl.eval_strategy {strategy}")
    if strategy == "steps" and "eval_steps" not in given:
        raise UserError("trl.eval_steps", "nothing", "the number of steps between two evaluations")
    if given.get("save_strategy") == "best":
        raise UserError("trl.save_strategy", "'best'", "steps, epoch or no: the result is the last step's")


def _fits(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is Any or (value is None and kind is type(None)):
            return True
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return not math.isnan(value)
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return True
        if kind is bool and isinstance(value, bool):
            return True
        if kind is list and isinstance(value, list | str):
            return True
        if isinstance(kind, type) and kind not in (int, float, bool, list) and isinstance(value, kind):
            return True
        if isinstance(kind, type) and issubclass(kind, str) and isinstance(value, str):
            return True  # enumerations of names; TRL says which
    # scale_rewards is said to be a string and takes true and false too.
    return hint is str and isinstance(value, bool)


def _words(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
    names[list] = "a list"
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    words = [names[kind] for option in options if (kind := typing.get_origin(option) or option) in names]
    words += ["null"] if type(None) in options else []
    return " or ".join(words) or f"a {getattr(hint, '__name__', hint)}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
