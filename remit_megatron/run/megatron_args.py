"""From a run's configuration to Megatron's validated arguments.

Megatron reads its settings from one ``argparse.Namespace``. Its own parser gives names, types, choices and defaults
here; nothing of it is repeated. Values are taken in this order, later ones winning: Megatron's defaults, ours
(``megatron_keys.DEFAULTS``), the model's architecture, ``megatron:`` of the configuration, and the keys that other
parts of the configuration own.

``patches.apply()`` must run before this module is used: importing ``megatron.training`` asks for a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import linecache
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from remit_megatron.models.environment import check_attention_environment
from remit_megatron.models.layout import check_pipeline_parallel, check_tensor_parallel, pipeline_layers
from remit_megatron.run.configuration import RunConfig
from remit_megatron.run.megatron_flags import refusal
from remit_megatron.run.megatron_keys import ARCHITECTURE, DEFAULTS, OWNED, UNSUPPORTED, Situation
from remit_megatron.run.megatron_values import check_values, value_refusal
from remit_megatron.run.optimization import check_optimization, construct
from remit_megatron.runtime.errors import UserError, did_you_mean, show
from remit_megatron.runtime.files import INT64

logger = logging.getLogger(__name__)

_POSITIVE = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "micro_batch_size",
    "global_batch_size",
    "seq_length",
    "train_iters",
    "train_samples",
    "save_interval",
    "eval_interval",
    "lr",
    "make_vocab_size_divisible_by",
)
# What torch and the files hold; beyond it, products of two arguments are no floats.
_LARGEST = INT64[-1]
_NO_PLACE = "a graph of the whole step would have no place for the reference"
_FLAGS = (argparse._StoreTrueAction, argparse._StoreFalseAction, argparse.BooleanOptionalAction)


def build_arguments(
    config: RunConfig,
    architecture: Mapping[str, Any],
    *,
    world_size: int,
    rank: int,
    local_rank: int = 0,
    gpu: bool | None = None,
    load: str | Path | None = None,
    pretrained_checkpoint: str | Path | None = None,
) -> argparse.Namespace:
    """Builds the namespace that ``megatron.training`` runs on.

    Args:
        config: the run.
        architecture: Megatron's arguments that describe the model, by name, from its family; ``vocab_size`` is the
            number of rows without padding.
        world_size: processes of the run. Nothing is launched, so a plan may name any number.
        rank: this process among them.
        local_rank: this process on its host.
        gpu: whether the run computes on GPUs; None asks torch.
        load: directory to resume from; None is ``run_dir/checkpoints``, or nothing with ``checkpoint.resume: never``.
        pretrained_checkpoint: Megatron checkpoint to start from where there is nothing to resume; None starts from
            random weights.

    Returns:
        The namespace after ``validate_args``, fit for ``set_global_variables(args, build_tokenizer=False)``.

    Raises:
        UserError: an unknown key, a wrong type, a key that belongs elsewhere, or a combination that cannot run.
    """
    from remit_megatron.models import fp8
    from remit_megatron.models.build import padded_vocab_size

    gpu = torch.cuda.is_available() if gpu is None else gpu
    chosen = read_overrides(config.megatron)
    _refuse_contradictions(chosen, architecture)
    values = _gather(config, architecture, chosen, gpu=gpu)
    values["local_rank"] = local_rank
    values["load"] = str(load) if load else None if config.checkpoint.resume == "never" else str(config.checkpoints_dir)
    values["pretrained_checkpoint"] = str(pretrained_checkpoint) if pretrained_checkpoint else None
    _check_required(values)
    check_values(values, chosen, gpu=gpu)
    _check_layout(values, world_size)
    fp8.check_run(values)
    check_optimization(values)
    values["padded_vocab_size"] = padded_vocab_size(
        values["vocab_size"], values["make_vocab_size_divisible_by"], values["tensor_model_parallel_size"]
    )
    _prepare_environment(config, values)

    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    with _quiet(), _arguments_of_this_program():
        # The values are the parser's defaults, so that what parse_args derives from them is right as well.
        args = parse_args(extra_args_provider=lambda parser: _with_defaults(parser, values))
    args.rank, args.world_size = rank, world_size
    with _quiet(), _translated(args, chosen):
        validate_args(args)
    _check_graphs(config.megatron, args.cuda_graph_impl)
    with _quiet(), _translated(args, chosen):
        # Their own checks come before anything is built or loaded.
        core_transformer_config_from_args(args)
        construct(args)
    _check_length(args)
    _check_done(args, values, chosen)
    args.use_persistent_ckpt_worker = False
    if args.clip_grad == 0:
        args.clip_grad = math.inf  # Megatron's 0 does not even measure the norm, which every step is judged by
    return args


def read_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Brings ``megatron:`` into Megatron's names and types.

    A key may be the name in the namespace or the flag, with dashes or underscores: ``layernorm_epsilon: 1e-6`` and
    ``norm-epsilon: 1e-6`` are the same, and so are ``add_bias_linear: false`` and ``disable-bias-linear: true``.

    Raises:
        UserError: an unknown key, a key given twice, a wrong type, or a key that belongs elsewhere.
    """
    actions, spellings = _known_arguments()
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in overrides.items():
        field = f"megatron.{key}"
        name = str(key).lstrip("-").replace("-", "_")
        destination, inverted = (name, False) if name in actions else spellings.get(name, (None, False))
        if destination is None or destination == "help":
            raise UserError(field, show(value), f"an argument of Megatron{_nearest(name, [*actions, *spellings])}")
        if destination in OWNED:
            place = OWNED[destination]
            expected = (
                f"no such key here, set {place}" if not place.startswith("nowhere") else f"no such key: {place[9:]}"
            )
            raise UserError(field, show(value), expected)
        converted = coerce(actions[destination], value, field=field)
        if inverted and isinstance(converted, bool):
            converted = not converted
        if destination in UNSUPPORTED and converted not in (None, False):
            raise UserError(field, show(value), f"{UNSUPPORTED[destination]} instead")
        expected = refusal(destination) or value_refusal(destination)
        if expected and converted != actions[destination].default:
            raise UserError(field, show(value), expected)
        if destination in given:
            raise UserError(field, f"both {given[destination]} and {key}", "one of the two names of one argument")
        values[destination], given[destination] = converted, str(key)
    return values


def coerce(action: argparse.Action, value: Any, *, field: str) -> Any:
    """Checks a YAML value against what the parser's action takes, and converts it as the command line would.

    Raises:
        UserError: the value is not one that the argument can have.
    """
    if isinstance(action, _FLAGS):
        if not isinstance(value, bool):
            raise UserError(field, show(value), "true or false")
        return value
    if value is None:
        if action.default is not None:
            raise UserError(field, "null", f"a value ({show(action.default)} is Megatron's default)")
        return None
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        # Some arguments take a list as one expression; those have no nargs and come in _coerce_one.
        items = list(value) if isinstance(value, list | tuple) else [value]
        if isinstance(action.nargs, int) and len(items) != action.nargs:
            raise UserError(field, show(value), f"a list of {action.nargs} values")
        return [_coerce_one(action, item, field=field) for item in items]
    return _coerce_one(action, value, field=field)


def _coerce_one(action: argparse.Action, value: Any, *, field: str) -> Any:
    choices = [getattr(choice, "name", choice) for choice in action.choices or ()]
    if choices and value not in choices:
        hint = did_you_mean(str(value), [str(choice) for choice in choices])
        raise UserError(field, show(value), f"one of {', '.join(map(str, choices))}{hint}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if action.type is int:
        if not number or not math.isfinite(value) or value != int(value):
            raise UserError(field, show(value), "a whole number")
        if abs(value) > _LARGEST:
            raise UserError(field, show(value), "a number of 64 bits")
        return int(value)
    if action.type is float:
        if not number:
            raise UserError(field, show(value), "a number")
        return float(value)
    if action.type in (str, None):
        if not isinstance(value, str) and not number:
            raise UserError(field, show(value), "a text")
        if value == "" != action.default:
            raise UserError(field, "''", "a text that is not empty")
        return str(value)
    assert callable(action.type), action
    text = json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)
    try:
        return action.type(text)
    except (ValueError, KeyError, TypeError, AssertionError, SyntaxError):
        raise UserError(field, show(value), f"a value of {'/'.join(action.option_strings)}") from None


@functools.cache
def _known_arguments() -> tuple[dict[str, argparse.Action], dict[str, tuple[str, bool]]]:
    """Megatron's arguments by their name in the namespace, and (name, inverted) by every other spelling."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    with _quiet():
        add_megatron_arguments(parser)
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # argparse takes the default of the first of two with one name
    spellings: dict[str, tuple[str, bool]] = {}
    for action in parser._actions:
        for option in action.option_strings:
            off = isinstance(action, argparse._StoreFalseAction) or (
                isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-")
            )
            spellings[option.lstrip("-").replace("-", "_")] = (action.dest, off)
    return actions, {name: meaning for name, meaning in spellings.items() if name not in actions}


def _nearest(name: str, known: Sequence[str]) -> str:
    if hint := did_you_mean(name, known):
        return hint
    parts = [candidate for candidate in known if name in candidate or candidate in name][:3]
    return f"; did you mean {' or '.join(parts)}?" if parts else ""


def _refuse_contradictions(chosen: Mapping[str, Any], architecture: Mapping[str, Any]) -> None:
    for key in chosen:
        if key not in ARCHITECTURE or chosen[key] == architecture.get(key, object()):
            continue
        if key in architecture:
            raise UserError(f"megatron.{key}", show(chosen[key]), f"{show(architecture[key])}, which the model has")
        default = _known_arguments()[0][key].default
        if chosen[key] != default:
            raise UserError(f"megatron.{key}", show(chosen[key]), "no such key here: the model's description decides")


def default_values(chosen: Mapping[str, Any], *, gpu: bool) -> dict[str, Any]:
    """Every argument of Megatron: what was chosen, else what we set where nobody does, else Megatron's default.

    Args:
        chosen: of :func:`read_overrides`.
        gpu: whether the run computes on GPUs.
    """
    from remit_megatron.models.spec import transformer_engine_usable

    situation = Situation(
        gpu=gpu,
        transformer_engine=gpu and transformer_engine_usable(),
        fused_gradients=_installed("fused_weight_gradient_mlp_cuda"),
        chosen=dict(chosen),
    )
    # Copies: validate_args appends to some of the lists.
    values = {key: copy.copy(action.default) for key, action in _known_arguments()[0].items() if key != "help"}
    return values | {key: default.resolve(situation) for key, default in DEFAULTS.items()} | dict(chosen)


def _gather(config: RunConfig, architecture: Mapping[str, Any], chosen: dict[str, Any], *, gpu: bool) -> dict[str, Any]:
    """The value of every argument, before Megatron derives further ones."""
    from remit_megatron.models.spec import transformer_engine_usable

    actions, _ = _known_arguments()
    for key in architecture:
        if key not in actions:
            raise ValueError(f"architecture: found {key}; expected names of Megatron's arguments only")
    values = default_values(chosen, gpu=gpu) | dict(architecture) | chosen
    transformer_engine = gpu and transformer_engine_usable()
    if values["transformer_impl"] == "transformer_engine" and not transformer_engine:
        raise UserError("megatron.transformer_impl", "transformer_engine", "local: Transformer Engine is not installed")
    if values["transformer_impl"] == "transformer_engine" and not (values["bf16"] or values["fp16"]):
        expected = "local: Transformer Engine rounds float32 products to TF32 (4e-3 on log-probabilities, emulated)"
        raise UserError("megatron.transformer_impl", "transformer_engine without bf16 and fp16", expected)
    for key in ("fp8", "fp4"):
        if values[key] and values["transformer_impl"] != "transformer_engine":
            raise UserError(f"megatron.{key}", show(values[key]), "null: it needs Transformer Engine")
    _check_graphs(config.megatron, values["cuda_graph_impl"])
    _check_fused_gradients(values)
    values |= {
        "calculate_per_token_loss": True,
        "create_attention_mask_in_dataloader": False,
        "seed": config.seed,
        "save": str(config.checkpoints_dir),
        "num_workers": config.data.num_workers,
        "data_cache_path": str(config.data_cache_dir),
        "eod_mask_loss": config.data.mask_eod_loss,
        "log_interval": config.logging.interval,
        "tensorboard_log_interval": chosen.get("tensorboard_log_interval", config.logging.interval),
        "tensorboard_dir": str(Path(config.run_dir or "") / "tensorboard") if config.logging.tensorboard else None,
    }
    if not config.data.valid:
        values["eval_iters"] = 0
    if values["async_save"]:
        # Megatron switches asynchronous saves off without a persistent worker; patches/asynchronous_save.py needs none.
        values |= {"async_strategy": "mcore", "use_persistent_ckpt_worker": True}
    return values | _wandb(config)


def _check_graphs(given: Mapping[str, Any], impl: str) -> None:
    """Refuses a CUDA graph of the whole step, which Megatron also makes of what is said about modules.

    Args:
        given: ``megatron:`` of the configuration, under any spelling of its keys.
        impl: ``cuda_graph_impl``, as it was set or as Megatron has made it.
    """
    for key, value in given.items():
        name = key.lstrip("-").replace("-", "_")
        if not name.startswith("cuda_graph_"):
            continue
        named = {str(item) for item in (value if isinstance(value, list | tuple) else [value])}
        if "full_iteration" in named:
            others = "none, local or transformer_engine" if name == "cuda_graph_impl" else "modules of the layers"
            raise UserError(f"megatron.{key}", "full_iteration", f"{others}: {_NO_PLACE}")
        if "full_iteration_inference" in named:
            raise UserError(f"megatron.{key}", "full_iteration_inference", "modules: nothing is generated in a run")
    if impl == "full_iteration":
        raise UserError("megatron.cuda_graph_impl", impl, f"another: {_NO_PLACE}")


def _check_fused_gradients(values: Mapping[str, Any]) -> None:
    """Weight gradients added to the buffer inside the matrix product: by Transformer Engine's layers, or by apex."""
    if not values["gradient_accumulation_fusion"] or _installed("fused_weight_gradient_mlp_cuda"):
        return
    missing = "apex's fused_weight_gradient_mlp_cuda, which is not installed"
    if values["transformer_impl"] != "transformer_engine":
        raise UserError("megatron.gradient_accumulation_fusion", "true", f"false: Megatron's own layers need {missing}")
    if values["defer_embedding_wgrad_compute"]:
        expected = f"false: the output layer needs {missing}"
        raise UserError("megatron.defer_embedding_wgrad_compute", "true", expected)


def _wandb(config: RunConfig) -> dict[str, Any]:
    wandb = config.logging.wandb
    if wandb is None or wandb.mode == "disabled":
        return {}
    if not _installed("wandb"):
        logger.warning("logging.wandb is set and the package wandb is not installed: nothing is reported to it")
        return {}
    return {
        "wandb_project": wandb.project,
        "wandb_exp_name": wandb.name or Path(config.run_dir or "").resolve().name,
        "wandb_entity": wandb.entity,
        "wandb_save_dir": str(Path(config.run_dir or "") / "wandb"),
    }


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package that is missing or does not import
        return False


def _check_required(values: Mapping[str, Any]) -> None:
    if values["train_iters"] is None and values["train_samples"] is None:
        raise UserError("megatron.train_iters", "nothing", "the number of steps, or megatron.train_samples")
    if values["train_iters"] is not None and values["train_samples"] is not None:
        expected = "nothing, because megatron.train_iters is set"
        raise UserError("megatron.train_samples", values["train_samples"], expected)
    limit = values["max_position_embeddings"]
    for key, expected in (
        ("lr", "the peak learning rate"),
        ("seq_length", f"tokens per sample, at most {limit} for this model"),
        ("vocab_size", "the number of rows of the embedding"),
        ("micro_batch_size", "samples of one forward pass on each data-parallel rank"),
    ):
        if values[key] is None:
            raise UserError(OWNED.get(key, f"megatron.{key}"), "nothing", expected)
    for key in ("save_interval", "eval_interval"):
        if values[key] is None:
            raise UserError(f"megatron.{key}", "nothing", "a number of steps")
    for key in _POSITIVE:
        if values[key] is not None and not values[key] > 0:
            raise UserError(f"megatron.{key}", values[key], "more than 0")
    if values["fp16"] and values["bf16"]:
        raise UserError("megatron.bf16", "true together with fp16: true", "one of the two")


def _check_length(args: argparse.Namespace) -> None:
    """What only shows when Megatron has filled in batch sizes and ranks."""
    if args.train_samples is not None and args.train_samples < args.global_batch_size:
        expected = f"at least global_batch_size {args.global_batch_size}, one step"
        raise UserError("megatron.train_samples", args.train_samples, expected)
    steps = args.train_iters or args.train_samples // args.global_batch_size
    warms_up = any((args.lr_warmup_iters, args.lr_warmup_samples, args.lr_warmup_fraction))
    if steps == 1 and warms_up and not args.lr_warmup_init:
        key = "train_iters" if args.train_iters else "train_samples"
        expected = "two steps or more, or lr_warmup_init: the first step of a warm-up from 0 has a learning rate of 0"
        raise UserError(f"megatron.{key}", getattr(args, key), expected)
    replicas, instances = args.data_parallel_size, args.num_distributed_optimizer_instances
    if replicas * args.context_parallel_size % instances:
        expected = f"a divisor of {replicas} data-parallel x {args.context_parallel_size} context-parallel ranks"
        raise UserError("megatron.num_distributed_optimizer_instances", instances, expected)


def _check_done(args: argparse.Namespace, values: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Refuses a flag or a number of which Megatron has made another one without a word."""
    for name in chosen:
        value = values[name]
        made = getattr(args, name, value)
        plain = isinstance(value, bool | int | float) and isinstance(made, bool | int | float | None)
        own = name not in DEFAULTS and value == _known_arguments()[0][name].default  # which nobody has to mean
        if plain and made != value and not own:
            raise UserError(f"megatron.{name}", show(value), f"{show(made)}, which Megatron makes of it in this run")


def _check_layout(values: dict[str, Any], world_size: int) -> None:
    tp, pp, cp = (values[f"{axis}_parallel_size"] for axis in ("tensor_model", "pipeline_model", "context"))
    if world_size % (tp * pp * cp):
        expected = f"a product that divides the {world_size} process{'es' if world_size > 1 else ''} of the run"
        found = f"tensor {tp} x pipeline {pp} x context {cp} = {tp * pp * cp}"
        raise UserError("megatron: parallel sizes", found, expected)
    dp = world_size // (tp * pp * cp)
    with _in_section("megatron"):
        check_tensor_parallel(values, tp, shared_groups=False)
        check_pipeline_parallel(values, values)
    _check_virtual_stages(values, pp)
    length, limit = values["seq_length"], values["max_position_embeddings"]
    if limit is not None and length > limit:
        raise UserError("megatron.seq_length", length, f"at most {limit}, the model's max_position_embeddings")
    if cp > 1 and length % (2 * cp):
        raise UserError("megatron.seq_length", length, f"a multiple of {2 * cp}, twice the context_parallel_size")
    if values["sequence_parallel"] and tp == 1:
        expected = "false, or a tensor_model_parallel_size above 1"
        raise UserError("megatron.sequence_parallel", "true with tensor_model_parallel_size 1", expected)
    if values["sequence_parallel"] and (length // cp) % tp:
        expected = f"a multiple of {tp * cp} with sequence_parallel (tensor {tp} x context {cp})"
        raise UserError("megatron.seq_length", length, expected)
    step = values["micro_batch_size"] * dp
    for prefix in ("", "eval_"):
        total, micro = values[f"{prefix}global_batch_size"], values[f"{prefix}micro_batch_size"]
        step = (micro or values["micro_batch_size"]) * dp
        if total is not None and total % step:
            expected = f"a multiple of {step} ({prefix}micro_batch_size {step // dp} x {dp} data-parallel ranks)"
            raise UserError(f"megatron.{prefix}global_batch_size", total, expected)


@contextlib.contextmanager
def _in_section(section: str) -> Iterator[None]:
    """Names what is refused by where it stands in the configuration."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{section}.{error.field}", error.found, error.expected) from None


def _check_virtual_stages(values: Mapping[str, Any], pp: int) -> None:
    shared = pipeline_layers(values, values)
    if shared is None:
        return
    layers, what = shared
    for key in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        if values[key] is not None and (values[key] < 1 or (layers // pp) % values[key]):
            expected = f"a divisor of the {layers // pp} {what} of a pipeline stage"
            raise UserError(f"megatron.{key}", values[key], expected)


def _prepare_environment(config: RunConfig, values: Mapping[str, Any]) -> None:
    check_attention_environment(values["attention_backend"], values["transformer_impl"])
    if not values["use_torch_fsdp2"]:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as cli.py does, for those who come another way
    elif os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        expected = "8, say, in the environment: use_torch_fsdp2 overlaps what one connection would put in a row"
        raise UserError("CUDA_DEVICE_MAX_CONNECTIONS", "1", expected)
    if config.logging.wandb is not None:
        os.environ.setdefault("WANDB_MODE", config.logging.wandb.mode)  # Megatron's call to wandb.init has no mode
        os.environ.setdefault("WANDB_SILENT", "true")  # its report at the end is longer than a short run's own lines


def _with_defaults(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser.set_defaults(**values)
    return parser


@contextlib.contextmanager
def _arguments_of_this_program() -> Iterator[None]:
    """Hides our command line from parse_args, which reads ``sys.argv``."""
    argv, sys.argv = sys.argv, ["megatron"]
    try:
        yield
    finally:
        sys.argv = argv


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What Megatron prints and warns goes to the log, at level debug."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for line in printed.getvalue().splitlines():
                logger.debug("%s", line)
            for warning in caught:
                logger.debug("%s", warning.message)


@contextlib.contextmanager
def _translated(args: argparse.Namespace, chosen: Mapping[str, Any]) -> Iterator[None]:
    """Turns a failed check of Megatron into one line that names the argument, one of ``chosen`` where it can."""
    try:
        yield
    except (Exception, SystemExit) as error:  # its checks also fail by what they do not check: an IndexError, say
        _raise_translated(error, args, chosen)


def _raise_translated(error: BaseException, args: argparse.Namespace, chosen: Mapping[str, Any]) -> NoReturn:
    message, source = " ".join(str(error).split()), _failed_statement(error)
    actions, spellings = _known_arguments()
    # The check reads arguments as attributes; its message may name more of them, as flags or as they are.
    words = re.findall(r"(?:args|self)\.(\w+)", source)
    words += [word.strip("-").replace("-", "_") for word in re.findall(r"[A-Za-z_-][\w-]*_\w+|--[\w-]+", message)]
    named = list(dict.fromkeys(name for word in words if (name := spellings.get(word, (word,))[0]) in actions))
    named.sort(key=lambda name: name not in chosen)
    key = f"megatron.{named[0]}" if named else "megatron"
    found = show(getattr(args, named[0], None)) if named else "a combination that Megatron refuses"
    condition = re.sub(r"(?:args|self)\.(\w+) is not None", r"\1 to be set", source.removeprefix("assert "))
    condition = re.sub(r"(?:args|self)\.", "", condition)
    text = message if message and not isinstance(error, SystemExit) else condition
    raise UserError(key, found, f"what Megatron checks: {text.rstrip('.')}") from None


def _failed_statement(error: BaseException) -> str:
    """The source of what raised: in an ``assert`` without a message, the condition is all there is to go by."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    code = traceback.tb_frame.f_code
    first, last, *_ = list(code.co_positions())[traceback.tb_lasti // 2]
    lines = range(first or traceback.tb_lineno, (last or traceback.tb_lineno) + 1)
    return " ".join(linecache.getline(code.co_filename, line).strip() for line in lines)
