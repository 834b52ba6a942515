"""The configuration of a run: what may stand in the YAML file, and how the file is read.

A run is one YAML file plus dotted overrides (``objective.epsilon=0.1``). The schema is in ``schema.py``:
OmegaConf checks types against them, and a key that they do not have is refused with the nearest one that they do.
Relative paths are relative to the current directory, with two exceptions: ``base`` is relative to the file that names
it, and what is missing as ``configs/…`` comes from the package. Everything Megatron has an argument for stands under
``megatron`` by Megatron's own name and is checked later, by :mod:`remit_megatron.run.megatron_args`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from remit_megatron.data.blend_file import expand_existing
from remit_megatron.run.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReferenceConfig,
    RunConfig,
    SpikesConfig,
    WandbConfig,
)
from remit_megatron.runtime.errors import UserError, did_you_mean, show
from remit_megatron.runtime.files import parse_json
from remit_megatron.runtime.installed import config_names, find_config
from remit_megatron.runtime.settings_files import first_line, merge_settings, read_layers, read_settings, read_text

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LossConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ReferenceConfig",
    "RunConfig",
    "SpikesConfig",
    "WandbConfig",
    "load_config",
    "load_model_description",
    "read_blend",
]

# model.vocab_size=300 changes one value of the model that a file names.
_NAMED = ("model",)
# Values that a key may take; the checks on numbers are in _validate.
CHOICES = {
    "objective.centering": ("sequence", "document", "none"),
    "objective.scope": ("micro_batch", "sequence", "global_batch"),
    "reference.source": ("live", "cache"),
    "reference.placement": ("pipeline", "replicated", "auto"),
    "reference.on_missing": ("score", "refuse", "wait"),
    "reference.dtype": ("uint16", "float32"),
    "reference.fp8": ("e4m3", "hybrid"),
    "reference.fp8_recipe": ("tensorwise", "blockwise", "mxfp8"),
    "checkpoint.resume": ("auto", "never"),
    "spikes.action": ("skip", "rollback"),
    "logging.wandb.mode": ("online", "offline", "disabled"),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run configuration.

    Args:
        path: YAML file; ``configs/…`` that is not here is the one of the package. ``base: other.yaml`` in it starts
            from that file (relative to this one, merged key by key, lists replaced).
        overrides: ``a.b=value``, the value in YAML; the last one wins over all files.

    Raises:
        UserError: a missing file, bad YAML (with its line), an unknown key, a wrong type or a value out of range.
    """
    content = read_settings(path, overrides, named=_NAMED)
    _check_keys(content, RunConfig, "")
    schema = OmegaConf.structured(RunConfig)
    try:
        merged = OmegaConf.merge(schema, content)
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except InterpolationResolutionError as error:
        raise UserError(error.full_key or str(path), first_line(error), "an interpolation that resolves") from None
    except OmegaConfBaseException as error:
        key = error.full_key or str(path)
        raise UserError(key, show(_lookup(content, key)), _expected_type(key)) from None
    assert isinstance(config, RunConfig)
    _validate(config)
    return config


def load_model_description(model: str | Mapping[str, Any]) -> dict[str, Any]:
    """The values of a Hugging Face ``config.json`` that describe an architecture.

    Args:
        model: a file (``.yaml``, ``.json``), a directory with a ``config.json``, a name looked up in
            ``./configs/models`` and then in the ``configs/models`` of the package, or the values themselves, where
            ``base: NAME`` starts from another description.

    Raises:
        UserError: nothing of that name, an unreadable file, or no ``model_type``.
    """
    if isinstance(model, Mapping):
        values = {key: value for key, value in model.items() if key != "base"}
        if "base" in model:
            values = merge_settings(load_model_description(model["base"]), values)
        where = "model"
    elif isinstance(model, str):
        file = _find_model(model)
        if file.suffix == ".json":
            try:
                values = parse_json(read_text(file))
            except ValueError as error:
                line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
                raise UserError(f"{file}{line}", getattr(error, "msg", error), "valid JSON") from None
        else:
            values = read_layers(file, named=_NAMED)
        where = str(file)
    else:
        raise UserError("model", show(model), "a name, a file, or a mapping of architecture values")
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(where, "no model_type", "the values of a Hugging Face config.json, model_type among them")
    return values


def read_blend(key: str, value: Any) -> list[Any]:
    """Checks a blend and brings it into the form of a list: of prefixes, or of ``[weight, prefix]``.

    Prefixes without weights stay without: the data layer takes them in proportion to their tokens. What a blend means
    is decided in :func:`remit_megatron.data.blend.parse_blend`; the check here is early, and needs no torch.

    Raises:
        UserError: another shape, an empty prefix, or a weight that is not a positive finite number.
    """
    expected = "a prefix, a list of prefixes, or a list of [weight, prefix] with positive weights"
    if isinstance(value, str) and value:
        return [value]
    if not isinstance(value, list | tuple):
        raise UserError(key, show(value), expected)
    blend: list[Any] = []
    for index, entry in enumerate(value):
        if isinstance(entry, str) and entry:
            blend.append(entry)
            continue
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], str) or not entry[1]:
            raise UserError(f"{key}[{index}]", show(entry), expected)
        weight = entry[0]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UserError(f"{key}[{index}]", show(weight), "a positive weight")
        blend.append([float(weight), entry[1]])
    if len({isinstance(entry, str) for entry in blend}) > 1:
        raise UserError(key, show(value), expected)
    return blend


def blend_prefixes(*blends: list[Any]) -> list[str]:
    """The prefixes of blends in the form of :func:`read_blend`, in order and without their weights."""
    return [entry if isinstance(entry, str) else entry[1] for blend in blends for entry in blend]


def _validate(config: RunConfig) -> None:
    for key, choices in CHOICES.items():
        value = _get(config, key)
        if value is not None and value not in choices:
            raise UserError(key, show(value), f"one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
    objective = config.objective
    if objective.epsilon is not None and not 0 <= objective.epsilon <= 1:
        raise UserError("objective.epsilon", objective.epsilon, "a number from 0 to 1, or null for no clipping")
    if not 0 < objective.keep <= 1:
        raise UserError("objective.keep", objective.keep, "a number above 0 and at most 1")
    if not 0 < objective.temperature < math.inf:
        raise UserError("objective.temperature", objective.temperature, "a number above 0")
    if not 0 <= objective.ntp_weight <= 1:
        raise UserError("objective.ntp_weight", objective.ntp_weight, "a number from 0 to 1")
    minima = {
        "reference.micro_batch_size": 1,
        "reference.fp8_gate_batches": 1,
        "checkpoint.keep": 1,
        "spikes.window": 4,
        "spikes.give_up": 1,
        "logging.interval": 1,
        "evaluation.every": 1,
        "evaluation.limit": 1,
        "data.num_workers": 0,
        "data.packing_seed": 0,
        "seed": 1,
    }
    for key, minimum in minima.items():
        value = _get(config, key)
        if value is not None and value < minimum:
            raise UserError(key, value, f"{minimum} or more")
    if config.spikes is not None and not 0 < config.spikes.deviations < math.inf:
        raise UserError("spikes.deviations", config.spikes.deviations, "a number above 0")
    if config.logging.slow_rank is not None and not 1 < config.logging.slow_rank < math.inf:
        raise UserError("logging.slow_rank", config.logging.slow_rank, "a number above 1, or null")
    if not config.run_dir:
        raise UserError("run_dir", show(config.run_dir), "the directory that receives what the run writes")
    # A run that goes on has both in its checkpoints.
    goes_on = config.checkpoint.resume == "auto" and any(config.checkpoints_dir.glob("iter_*/manifest.json"))
    if config.model is None and not config.init and not goes_on:
        raise UserError("model", "nothing", "an architecture, or init with a checkpoint to take it from")
    if not config.data.tokenizer and not config.init and not goes_on:
        found = show(config.data.tokenizer)
        raise UserError("data.tokenizer", found, "the directory of the tokenizer the data was built with")
    if config.reference is not None and not config.reference.checkpoint:
        found = show(config.reference.checkpoint)
        raise UserError("reference.checkpoint", found, "the directory of the reference model")
    if config.reference is not None and not config.reference.cache_dir:
        for key, value in (
            ("source: cache", config.reference.source == "cache"),
            ("write_cache: true", config.reference.write_cache),
        ):
            if value:
                raise UserError("reference.cache_dir", "nothing", f"the directory of the scores, for reference.{key}")
    if config.reference is not None:
        _validate_reference(config.reference)
    config.data.train = expand_existing(read_blend("data.train", config.data.train), field="data.train")
    config.data.valid = expand_existing(read_blend("data.valid", config.data.valid or []), field="data.valid")
    if not config.data.train:
        raise UserError("data.train", "an empty blend", "at least one data set")


def _validate_reference(reference: ReferenceConfig) -> None:
    if not 0 <= reference.max_dropped <= 1:
        raise UserError("reference.max_dropped", reference.max_dropped, "a number from 0 to 1")
    if not 0 <= reference.fp8_tolerance <= 2:
        raise UserError("reference.fp8_tolerance", reference.fp8_tolerance, "a number from 0 to 2")
    if reference.fp8 is not None and (reference.source == "cache" or reference.write_cache):
        expected = "null: what a cache holds outlives the run, and no gate has measured it"
        raise UserError("reference.fp8", f"{reference.fp8} with a score cache", expected)


def _get(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if value is None:
            return None
        value = getattr(value, part)
    return value


def _check_keys(content: Mapping[str, Any], schema: type, prefix: str) -> None:
    hints = typing.get_type_hints(schema)
    known = [item.name for item in dataclasses.fields(schema)]
    for name, value in content.items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            if not hint and not prefix:
                hint = "; arguments of Megatron go under megatron"
            raise UserError(
                f"{prefix}{name}" if name else f"{prefix}''", show(value), f"one of {', '.join(known)}{hint}"
            )
        key, nested = f"{prefix}{name}", _dataclass_of(hints[name])
        if nested is not None and isinstance(value, Mapping):
            _check_keys(value, nested, f"{key}.")
            continue
        # OmegaConf turns 3 into true and true into 1: taken as a slip here. Interpolations are checked when resolved.
        options = {hints[name], *typing.get_args(hints[name])}
        interpolation = isinstance(value, str) and "${" in value
        wrong_bool = isinstance(value, bool) and not options.isdisjoint({int, float})
        wrong_bool |= not isinstance(value, bool) and bool in options
        wrong_mapping = typing.get_origin(hints[name]) is dict and not isinstance(value, Mapping)
        if not interpolation and value is not None and (nested is not None or wrong_bool or wrong_mapping):
            raise UserError(key, show(value), _expected_type(key))


def _dataclass_of(hint: Any) -> type | None:
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _lookup(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _expected_type(key: str) -> str:
    """What may stand under a key, in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    schema: Any = RunConfig
    for part in key.split("."):
        hint = typing.get_type_hints(schema).get(part) if _dataclass_of(schema) else None
        schema = _dataclass_of(hint) or hint
    if _dataclass_of(schema):
        return f"a mapping with {', '.join(item.name for item in dataclasses.fields(schema))}"
    if typing.get_origin(schema) is dict:
        return "a mapping"
    words = [names[option] for option in (schema, *typing.get_args(schema)) if option in names]
    return " or ".join(words) or "a mapping"


def _find_model(name: str) -> Path:
    path = Path(name)
    if len(path.name) > 250:  # no file system has such a name, and asking for it is an error of its own
        raise UserError("model", show(name), "a file, or a name in configs/models")
    if path.is_dir() and (path / "config.json").is_file():
        return path / "config.json"
    for candidate in (find_config(path), find_config(Path("configs/models") / f"{name}.yaml", announce=False)):
        if candidate.is_file():
            return candidate
    known = config_names("models")
    raise UserError("model", show(name), f"a file, or one of {', '.join(known)}{did_you_mean(name, known)}")
