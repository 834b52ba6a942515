"""The configuration of a post-training run: what may stand in its YAML file, and how it is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from remit_megatron.runtime.errors import UserError, did_you_mean, show
from remit_megatron.runtime.settings_files import first_line, read_settings

STAGES = ("sft", "dpo", "rlvr")
ENGINES = ("trl", "nemo_rl", "command")
NO_TEMPLATE = "none"


@dataclass(frozen=True)
class DataSettings:
    """Files of JSON lines, plain or compressed; see :mod:`remit_megatron.posttrain.examples` for what a line holds.

    Attributes:
        train: files, patterns or folders, read in this order.
        valid: the same, held out; evaluated when ``trl.eval_strategy`` says.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeepSettings:
    """Intermediate models, ``models/step-N`` of the run directory.

    Attributes:
        every: steps between two of them; None keeps none.
    """

    every: int | None = None


@dataclass(frozen=True)
class PosttrainSettings:
    """One stage of post-training.

    Attributes:
        stage: ``sft``, ``dpo`` or ``rlvr``.
        model: what it starts from: a Hugging Face directory, a run, or a checkpoint.
        run_dir: receives everything that the run writes; ``model/`` in it is the result.
        data: what it learns from.
        engine: ``trl`` runs here; ``nemo_rl`` renders a job for NeMo-RL; ``command`` starts a program of yours.
        chat_template: None is the tokenizer's own, ``none`` is no template at all, else a Jinja file.
        verifier: of the lines that name none (rlvr).
        trl: arguments of TRL's SFTConfig, DPOConfig or GRPOConfig, by their own names.
        keep: intermediate models.
        nemo_rl, command: settings of the other engines; see their modules.
        seed: of the order of the data, of generation, and of what else is drawn.
    """

    stage: str
    model: str
    run_dir: str
    data: DataSettings
    engine: str = "trl"
    chat_template: str | None = None
    verifier: str | None = None
    trl: dict[str, Any] = field(default_factory=dict)
    keep: KeepSettings = KeepSettings()
    nemo_rl: dict[str, Any] = field(default_factory=dict)
    command: dict[str, Any] = field(default_factory=dict)
    seed: int = 1234

    def to_plain(self) -> dict[str, Any]:
        """As the YAML file would say it, every key written out."""
        plain = dataclasses.asdict(self)
        plain["data"] = {name: list(files) for name, files in plain["data"].items()}
        return plain


def load_settings(path: str | Path, overrides: Sequence[str] = (), *, stage: str) -> PosttrainSettings:
    """Reads a configuration.

    Args:
        path: YAML file; ``base: other.yaml`` in it starts from that file.
        overrides: ``a.b=value``, over the file's.
        stage: one of ``STAGES``.

    Raises:
        UserError: a missing file, bad YAML, an unknown key, a wrong type or value.
    """
    content = read_settings(path, overrides)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(error.full_key or str(path), first_line(error), "an interpolation that resolves") from None
    assert isinstance(resolved, dict)
    return settings_of({str(key): value for key, value in resolved.items()}, stage=stage)


def settings_of(content: Mapping[str, Any], *, stage: str) -> PosttrainSettings:
    """Settings from plain values, for callers that have them in memory.

    Raises:
        UserError: an unknown or missing key, a wrong type or value.
    """
    known = [item.name for item in dataclasses.fields(PosttrainSettings) if item.name != "stage"]
    _check_names(content, known, "")
    values = {name: value for name, value in content.items() if value is not None}
    values["data"] = _data(values.get("data"))
    values["keep"] = _keep(values.get("keep", {}))
    for name in ("model", "run_dir", "engine", "chat_template", "verifier"):
        if name in values and (not isinstance(values[name], str) or not values[name]):
            raise UserError(name, show(values[name]), "a text that is not empty")
    for name, expected in (
        ("model", "a Hugging Face directory, a run, or a checkpoint"),
        ("run_dir", "the directory that receives what the run writes"),
    ):
        if name not in values:
            raise UserError(name, "nothing", expected)
    for name in ("trl", "nemo_rl", "command"):
        value = values.get(name, {})
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise UserError(name, show(value), "a mapping of names to values")
        values[name] = dict(value)
    engine = values.get("engine", "trl")
    if engine not in ENGINES:
        raise UserError("engine", show(engine), f"one of {', '.join(ENGINES)}{did_you_mean(engine, ENGINES)}")
    for name in ("nemo_rl", "command"):
        if values[name] and engine != name:
            raise UserError(name, f"settings, with engine {engine}", f"none, or engine: {name}")
    if values["trl"] and engine == "command":
        raise UserError("trl", "arguments, with engine command", "none: the command has its own")
    if values["keep"].every is not None and engine == "command":
        raise UserError("keep.every", values["keep"].every, "null, with engine command: it keeps models of its own")
    seed = values.get("seed", 1234)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise UserError("seed", show(seed), "a whole number from 0 to 2147483647")
    if values.get("verifier") and stage != "rlvr":
        raise UserError("verifier", show(values["verifier"]), f"nothing: {stage} has no rewards")
    return PosttrainSettings(stage=stage, **values)


def check_keep(keep: KeepSettings, steps: int) -> None:
    """Refuses intermediate models of which a run of ``steps`` steps would keep none.

    Raises:
        UserError: as said.
    """
    if keep.every is not None and keep.every > steps:
        raise UserError("keep.every", keep.every, f"at most {steps}, the steps of the run, or null to keep none")


def read_resolved(run_dir: Path) -> str | None:
    """The configuration that the run was started with, as it was written; None for a new run."""
    path = run_dir / "config.yaml"
    return path.read_text() if path.exists() else None


def dump(content: Mapping[str, Any]) -> str:
    """YAML with the keys in their order."""
    return yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True, width=120)


def _data(value: Any) -> DataSettings:
    if not isinstance(value, Mapping):
        raise UserError("data", show(value), "a mapping with train, and valid where it is evaluated")
    _check_names(value, ["train", "valid"], "data.")
    train, valid = (_files(f"data.{name}", value.get(name)) for name in ("train", "valid"))
    if not train:
        raise UserError("data.train", show(value.get("train")), "at least one file of JSON lines")
    return DataSettings(train, valid)


def _files(key: str, value: Any) -> tuple[str, ...]:
    files = [value] if isinstance(value, str) else value or []
    if not isinstance(files, list | tuple) or not all(isinstance(file, str) and file for file in files):
        raise UserError(key, show(value), "a file, or a list of files")
    return tuple(files)


def _keep(value: Any) -> KeepSettings:
    if not isinstance(value, Mapping):
        raise UserError("keep", show(value), "a mapping with every")
    _check_names(value, ["every"], "keep.")
    every = value.get("every")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise UserError("keep.every", show(every), "a number of steps, at least 1, or null")
    return KeepSettings(every)


def _check_names(content: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for name, value in content.items():
        if name not in known:
            hint = did_you_mean(str(name), known) or ("" if prefix else "; arguments of TRL go under trl")
            raise UserError(f"{prefix}{name}" or "''", show(value), f"one of {', '.join(known)}{hint}")
