"""The configuration of a run: what may stand in the YAML file, and how the file is read.

A run is one YAML file plus dotted overrides (``objective.epsilon=0.1``). The dataclasses below are the schema:
OmegaConf checks types against them, and a key that they do not have is refused with the nearest one that they do.
Relative paths are relative to the current directory, with one exception: ``base`` is relative to the file that names
it. Everything Megatron has an argument for stands under ``megatron`` by Megatron's own name and is checked later, by
:mod:`remit_megatron.run.megatron_args`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from remit_megatron.data.blend_file import expand_existing
from remit_megatron.runtime.errors import UserError

REPOSITORY_MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"


@dataclass
class ObjectiveConfig:
    """What is minimised."""

    name: str = "remit"
    """Name of a registered objective: ``ntp``, ``remit``, ``rho1`` or ``kd`` (docs/objectives.md)."""

    epsilon: float | None = 0.2
    """Half-width of the interval [1 - epsilon, 1 + epsilon] that weights are clipped to, 0 to 1; null does not clip, 0
    equals ``ntp``. No effect on objectives without weights."""

    centering: str = "sequence"
    """Over what the loss difference is centered: ``sequence`` (the paper), ``document`` or ``none``. No effect on
    objectives without weights."""

    keep: float = 0.8
    """``rho1``: share of the counted tokens that is trained on, above 0 and at most 1. No effect on others."""

    scope: str = "sequence"
    """``rho1``: what a token is ranked with: ``micro_batch``, ``sequence`` or ``global_batch``. The last costs one more
    forward pass of the student in every step. No effect on others."""

    temperature: float = 1.0
    """``kd``: what the logits of both models are divided by; above 0. No effect on others."""

    ntp_weight: float = 0.0
    """``kd``: share of next-token prediction in the loss, 0 to 1. No effect on others."""


@dataclass
class LossConfig:
    """How the loss is computed; what it is, `objective` says."""

    linear: bool = False
    """Whether output layer and loss are computed together, a few sequences at a time, so that a microbatch's logits
    never exist (docs/kernels.md). The same loss and gradients up to rounding; less memory, and often a little slower.
    Not with objectives that need the logits (``kd``) or rank whole microbatches (``rho1`` with ``scope:
    micro_batch``)."""


@dataclass
class ReferenceConfig:
    """The frozen model that scores every token."""

    checkpoint: str | None = None
    """Directory: an output of ``remit import``, of a run, or a Hugging Face model. Required."""

    source: str = "live"
    """Where scores come from: ``live`` runs the reference in every step; ``cache`` reads what ``remit score`` or a live
    run with ``write_cache`` wrote to ``cache_dir``."""

    placement: str = "pipeline"
    """Where a live reference lives: ``pipeline`` shards it like the student; ``replicated`` keeps all layers on every
    pipeline rank, which scores a step ahead in the pipeline's pauses; ``auto`` takes ``replicated`` where the first
    step leaves memory for it. No effect with ``source: cache`` or without pipeline stages."""

    micro_batch_size: int | None = None
    """Samples per forward pass of the reference; null uses the student's. No effect with ``source: cache``."""

    cache_dir: str | None = None
    """Directory of the score cache. Required with ``source: cache``, ``write_cache`` and by ``remit score``."""

    on_missing: str = "score"
    """What happens to a sample that the cache lacks: ``score`` it live and add it, ``refuse`` to go on, or ``wait``
    until another job has written it (``remit score --follow``). No effect with ``source: live``."""

    dtype: str = "uint16"
    """How scores are stored in a cache that is made: ``uint16`` (fixed point, 2 bytes a token) or ``float32``. A cache
    that exists is read and written as it is."""

    write_cache: bool = False
    """Whether the scores of ``source: live`` are also written to ``cache_dir``. No effect with ``source: cache``."""

    fp8: str | None = None
    """``e4m3`` or ``hybrid``: the live reference's linear weights in FP8, in all layers but the first and the last, if
    the gate lets it pass; null keeps the run's own type. Needs Transformer Engine and a GPU that has FP8. The student's
    precision is ``megatron.fp8``."""

    fp8_recipe: str = "tensorwise"
    """How the FP8 reference scales: ``tensorwise``, ``blockwise`` or ``mxfp8``. No effect without ``fp8``."""

    fp8_gate_batches: int = 4
    """Steps in which the reference runs in both precisions and trains by the higher one, before FP8 may take its place;
    counted from every start. No effect without ``fp8``."""

    fp8_tolerance: float = 0.005
    """Largest mean |dw| that FP8 may cause, 0 to 2; above it the reference keeps its type. No effect without
    ``fp8``."""


@dataclass
class DataConfig:
    """Tokens to train on."""

    train: Any = None
    """Blend for training: a prefix of ``.bin``/``.idx`` files, a list of prefixes (in proportion to their tokens), a
    list of ``[weight, prefix]``, or a blend file that ``remit data mix`` wrote (``.yaml``). Weights are positive and
    need not sum to 1. Required."""

    valid: Any = field(default_factory=list)
    """Blend for evaluation, in the same forms; empty turns evaluation off."""

    tokenizer: str | None = None
    """The tokenizer the data was built with: a directory with ``tokenizer.json``, or a checkpoint (its
    ``hf/tokenizer.json`` is taken). Null takes the one beside ``init``."""

    packing_seed: int = 0
    """Seed of the order in which documents are packed into samples. Part of the identity of a sample, so that scores in
    a cache stay valid; it is not the run's ``seed``."""

    mask_eod_loss: bool = False
    """Whether the prediction after an end-of-document token (the next document's first) does not count."""

    document_mask: bool = False
    """Whether attention stops at document boundaries inside a sample."""

    cache_dir: str | None = None
    """Directory for index files of the data sets; null is ``run_dir/data_cache``. Runs over the same data may share
    one."""

    num_workers: int = 2
    """Data loader processes per rank; 0 loads in the training process."""


@dataclass
class OptimizerConfig:
    """Which parameters ``megatron.weight_decay`` applies to. Everything else of the optimizer is an argument of
    Megatron."""

    decay_norms: bool | None = None
    """Whether parameters of one axis decay: norms and biases; null is Megatron's rule, which leaves them out."""

    decay_embeddings: bool | None = None
    """Whether the input embedding decays, which is the head too in a model that ties the two; null is Megatron's rule,
    by which it does. A head of its own always decays."""


@dataclass
class CheckpointConfig:
    """What is kept of a run, and whether it goes on from there."""

    keep: int | None = 2
    """How many of the newest complete checkpoints stay on disk; null keeps all."""

    resume: str = "auto"
    """``auto`` goes on from the newest complete checkpoint in ``run_dir`` where there is one; ``never`` refuses a
    ``run_dir`` that has one."""


@dataclass
class WandbConfig:
    """Weights & Biases. No effect, with a warning, where the package is missing."""

    project: str = "remit"
    """Project the run is filed under."""

    name: str | None = None
    """Name of the run; null is the last part of ``run_dir``."""

    entity: str | None = None
    """User or team; null is the account's default."""

    mode: str = "offline"
    """``online``, ``offline`` (files in ``run_dir/wandb``, for ``wandb sync``) or ``disabled``."""


@dataclass
class LoggingConfig:
    """What is written while a run goes on. ``metrics.jsonl`` is always written, one line a step."""

    interval: int = 1
    """Steps between two progress lines and two points in tensorboard."""

    wandb: WandbConfig | None = None
    """Weights & Biases; null does not use it."""

    tensorboard: bool = True
    """Whether ``run_dir/tensorboard`` is written. No effect, with a warning, where the package is missing."""


@dataclass
class RunConfig:
    """One mid-training run."""

    model: Any = None
    """Architecture: a name in ``configs/models``, a file, or the values themselves (with ``base: NAME`` to start from a
    named one). Null takes it from ``init``."""

    init: str | None = None
    """Checkpoint the run starts from: an output of ``remit import``, of a run, or a Hugging Face directory; null starts
    from random weights. No effect once ``run_dir`` has a checkpoint of its own."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""

    loss: LossConfig = field(default_factory=LossConfig)
    """How the loss is computed."""

    reference: ReferenceConfig | None = None
    """The frozen model that scores tokens; null for objectives that need none."""

    data: DataConfig = field(default_factory=DataConfig)
    """Tokens to train on."""

    megatron: dict[str, Any] = field(default_factory=dict)
    """Any Megatron argument by its own name (docs/configuration.md). The length of training is ``train_iters`` or
    ``train_samples``."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """What weight decay applies to."""

    run_dir: str | None = None
    """Directory that receives everything the run writes. Required."""

    seed: int = 1234
    """Seed of weights drawn at random, dropout, and the order of samples; 1 or more."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept of the run."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is written while the run goes on."""

    @property
    def checkpoints_dir(self) -> Path:
        return Path(self.run_dir or "") / "checkpoints"

    @property
    def data_cache_dir(self) -> Path:
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(self.run_dir or "") / "data_cache"

    def to_yaml(self) -> str:
        """Every key with its value, interpolations resolved; reading it back gives this configuration."""
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))


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
    "logging.wandb.mode": ("online", "offline", "disabled"),
}


def show(value: object, limit: int = 80) -> str:
    """A value as it stands in a one-line message: strings quoted, long ones cut, ``nothing`` for None."""
    if value is None:
        return "nothing"
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """``; did you mean X?`` with the nearest of ``known``, or an empty string where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run configuration.

    Args:
        path: YAML file. ``base: other.yaml`` in it starts from that file (relative to this one, merged key by key,
            lists replaced).
        overrides: ``a.b=value``, the value in YAML; the last one wins over all files.

    Raises:
        UserError: a missing file, bad YAML (with its line), an unknown key, a wrong type or a value out of range.
    """
    content = _read_with_base(Path(path), ())
    for override in overrides:
        content = _merge(content, _parse_override(override))
    _check_keys(content, RunConfig, "")
    schema = OmegaConf.structured(RunConfig)
    try:
        merged = OmegaConf.merge(schema, content)
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except InterpolationResolutionError as error:
        raise UserError(error.full_key or str(path), _first_line(error), "an interpolation that resolves") from None
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
            ``./configs/models`` and then in the repository's ``configs/models``, or the values themselves, where
            ``base: NAME`` starts from another description.

    Raises:
        UserError: nothing of that name, an unreadable file, or no ``model_type``.
    """
    if isinstance(model, Mapping):
        values = {key: value for key, value in model.items() if key != "base"}
        if "base" in model:
            values = _merge(load_model_description(model["base"]), values)
        where = "model"
    elif isinstance(model, str):
        file = _find_model(model)
        if file.suffix == ".json":
            try:
                values = json.loads(_read_text(file))
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{error.lineno}", error.msg, "valid JSON") from None
        else:
            values = _read_with_base(file, ())
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
        "logging.interval": 1,
        "data.num_workers": 0,
        "data.packing_seed": 0,
        "seed": 1,
    }
    for key, minimum in minima.items():
        value = _get(config, key)
        if value is not None and value < minimum:
            raise UserError(key, value, f"{minimum} or more")
    if not config.run_dir:
        raise UserError("run_dir", show(config.run_dir), "the directory that receives what the run writes")
    if config.model is None and not config.init:
        raise UserError("model", "nothing", "an architecture, or init with a checkpoint to take it from")
    if not config.data.tokenizer and not config.init:
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
        _validate_fp8(config.reference)
    config.data.train = expand_existing(read_blend("data.train", config.data.train), field="data.train")
    config.data.valid = expand_existing(read_blend("data.valid", config.data.valid or []), field="data.valid")
    if not config.data.train:
        raise UserError("data.train", "an empty blend", "at least one data set")


def _validate_fp8(reference: ReferenceConfig) -> None:
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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "a readable file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), _first_line(error), "a readable text file") from None


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        content = OmegaConf.create(text)
        plain = OmegaConf.to_container(content, resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark and not where.startswith("override ") else where
        raise UserError(place, error.problem or _first_line(error), "valid YAML") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(where, _first_line(error), "valid YAML") from None
    if not isinstance(plain, dict):
        raise UserError(where, f"a {type(plain).__name__}", "a mapping of keys to values")
    for key in plain:
        if not isinstance(key, str):
            raise UserError(where, show(key), "keys that are names")
    return typing.cast("dict[str, Any]", plain)


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    file = path.resolve()
    if file in seen:
        chain = " -> ".join(item.name for item in (*seen, file))
        raise UserError(f"{seen[-1].name}: base", chain, "files that do not start from each other in a circle")
    content = _parse_yaml(_read_text(path), str(path))
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UserError(f"{path}: base", show(base), "the name of a file, relative to this one")
    return _merge(_read_with_base(path.parent / base, (*seen, file)), content)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError("override", show(override), "KEY=VALUE with a dotted key, such as objective.epsilon=0.1")
    content: Any = _parse_yaml(f"value: {value}", f"override {key}")["value"]
    for part in reversed(key.split(".")):
        content = {part.strip(): content}
    return content


def _merge(below: Any, above: Any, key: str = "") -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        merged = dict(below)
        for name, value in above.items():
            merged[name] = _merge(below[name], value, f"{key}.{name}".lstrip(".")) if name in below else value
        return merged
    if key == "model" and isinstance(below, str) and isinstance(above, dict) and "base" not in above:
        return {"base": below, **above}  # model.vocab_size=300 changes one value of the named model
    return above


def _check_keys(content: Mapping[str, Any], schema: type, prefix: str) -> None:
    hints = typing.get_type_hints(schema)
    known = [item.name for item in dataclasses.fields(schema)]
    for name, value in content.items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            if not hint and not prefix:
                hint = "; arguments of Megatron go under megatron"
            raise UserError(f"{prefix}{name}", show(value), f"one of {', '.join(known)}{hint}")
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
    if path.is_dir() and (path / "config.json").is_file():
        return path / "config.json"
    folders = [Path("configs/models"), REPOSITORY_MODELS]
    for candidate in (path, *(folder / f"{name}.yaml" for folder in folders)):
        if candidate.is_file():
            return candidate
    known = sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")})
    raise UserError("model", show(name), f"a file, or one of {', '.join(known)}{did_you_mean(name, known)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
