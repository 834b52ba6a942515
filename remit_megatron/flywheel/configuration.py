"""The file of a flywheel: rounds of stages, read and checked before anything runs (docs/flywheel.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remit_megatron.flywheel.references import NAME, PREVIOUS, references
from remit_megatron.runtime.errors import UserError, did_you_mean, show
from remit_megatron.runtime.settings_files import read_settings

# What the stages of every kind may say.
COMMON_KEYS = ("kind", "rounds", "after", "nproc", "slurm")
# kind -> keys it must have, keys it may have.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (("config",), ("model", "reference", "scores", "objective", "set")),
    "score": (("config",), ("model", "reference", "set", "all")),
    "export": (("model",), ("dtype",)),
    "evaluate": (
        ("suite",),
        (
            *("model", "models", "data", "limit", "backend", "batch_size", "dtype", "max_length", "chat_template"),
            *("allow_code", "model_arg"),
        ),
    ),
    "sft": (("config",), ("model", "set")),
    "dpo": (("config",), ("model", "set")),
    "rlvr": (("config",), ("model", "set")),
    "check": (("config",), ("model", "reference", "samples", "require", "set")),
    "report": ((), ("runs", "results", "title")),
    "command": (("words",), ("output", "produces", "inputs")),
}
# What a stage gives, by which others may take it.
PRODUCTS = {
    "train": "model",
    "score": "scores",
    "export": "model",
    "evaluate": "evaluation",
    "sft": "model",
    "dpo": "model",
    "rlvr": "model",
    "check": "check",
    "report": "report",
}
COMMAND_PRODUCTS = ("file", "model", "scores", "evaluation")
# key of a stage -> the product that a ${stage:…} there must have. What is in `set` and `words` is a path to anything.
TAKES = {"model": "model", "models": "model", "reference": "model", "scores": "scores", "runs": "model"}
TAKES |= {"results": "evaluation"}
# Keys of a stage that hold what another stage gave, and nothing around it.
WHOLE = tuple(TAKES)

_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "config": (str, "the file of a configuration"),
    "model": (str, "a path or ${stage:NAME}"),
    "models": (dict, "names and models: {NAME: PATH, …}"),
    "reference": (str, "a path or ${stage:NAME}"),
    "scores": (str, "a path or ${stage:NAME}"),
    "objective": ((str, dict), "the name of an objective, or its settings"),
    "set": (dict, "keys of the configuration and their values"),
    "all": (bool, "true or false"),
    "dtype": (str, "a name"),
    "suite": (str, "a suite's name, a file, or one lm-eval task"),
    "data": (str, "a directory"),
    "limit": (int, "a number"),
    "backend": (str, "hf or vllm"),
    "batch_size": ((int, str), "a number, or auto"),
    "max_length": (int, "a number"),
    "chat_template": (str, "suite, yes or no"),
    "allow_code": (bool, "true or false"),
    "model_arg": (list, "a list of A=B"),
    "samples": (int, "a number"),
    "require": (str, "ahead"),
    "runs": (list, "a list of stages or run directories"),
    "results": (list, "a list of stages or results files"),
    "title": (str, "a text"),
    "words": (list, "a list of words, as a shell would have them"),
    "output": (str, "the name of a file or directory"),
    "produces": (str, f"one of {', '.join(COMMAND_PRODUCTS)}"),
    "inputs": (list, "a list of paths"),
    "rounds": (list, "a list of numbers"),
    "after": (list, "a list of stages"),
    "nproc": (int, "a number"),
    "slurm": (dict, "options of sbatch"),
}
# Options that the chain itself sets, or that would make of a job something else than one stage.
_OWN_OPTIONS = ("dependency", "kill-on-invalid-dep", "parsable", "wrap", "array", "job-name", "test-only", "wait")


@dataclass(frozen=True)
class FlywheelConfig:
    """A flywheel as its file says it.

    Attributes:
        run_dir: directory that receives everything.
        stages: name to what it says, of one round.
        rounds: how many times the stages run.
        round0: what ``previous/NAME`` means in round 1: name to path.
        objectives: arms of mid-training: name to keys of the section ``objective``, and perhaps ``reference``.
        seed: of every stage that says no other; None leaves each configuration's own.
        code: what of the code belongs to a stage's key: ``version`` or ``source``.
        slurm: options of sbatch for every stage.
    """

    run_dir: Path
    stages: dict[str, dict[str, Any]]
    rounds: int = 1
    round0: dict[str, str] = field(default_factory=dict)
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int | None = None
    code: str = "version"
    slurm: dict[str, Any] = field(default_factory=dict)


_KEYS = ("run_dir", "stages", "rounds", "round0", "objectives", "seed", "code", "slurm")


def load_flywheel(path: str | Path, overrides: Sequence[str] = ()) -> FlywheelConfig:
    """Reads the file of a flywheel.

    Args:
        path: YAML file; ``base`` and ``configs/…`` as in a run's.
        overrides: ``a.b=value``, such as ``stages.sft.nproc=2``.

    Raises:
        UserError: an unknown key (with the nearest), a wrong type, or a value out of range.
    """
    content = read_settings(path, overrides)
    for key, value in content.items():
        if key not in _KEYS:
            raise UserError(key or "''", show(value), f"one of {', '.join(_KEYS)}{did_you_mean(key, _KEYS)}")
    run_dir = content.get("run_dir")
    if not isinstance(run_dir, str) or not run_dir:
        raise UserError("run_dir", show(run_dir), "the directory that receives what the flywheel writes")
    rounds = content.get("rounds", 1)
    if type(rounds) is not int or rounds < 1:
        raise UserError("rounds", show(rounds), "1 or more")
    seed = content.get("seed")
    if seed is not None and (type(seed) is not int or seed < 1):
        raise UserError("seed", show(seed), "1 or more, or null for each configuration's own")
    code = content.get("code", "version")
    if code not in ("version", "source"):
        raise UserError("code", show(code), "version or source")
    stages = content.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise UserError("stages", show(stages), "names of stages and what each does")
    for name, stage in stages.items():
        _check_stage(name, stage, rounds)
    objectives = _objectives(content.get("objectives") or {})
    if clash := sorted(set(objectives) & set(stages)):
        raise UserError(f"objectives.{clash[0]}", "the name of a stage, too", "a name of its own")
    return FlywheelConfig(
        run_dir=Path(run_dir),
        stages=stages,
        rounds=rounds,
        round0=_round0(content.get("round0") or {}),
        objectives=objectives,
        seed=seed,
        code=code,
        slurm=_sbatch_options("slurm", content.get("slurm") or {}),
    )


def _check_stage(name: str, stage: Any, rounds: int) -> None:
    where = f"stages.{name}"
    if not NAME.fullmatch(name) or name == PREVIOUS or re.fullmatch(r"round\d+", name):
        raise UserError(where, show(name), "a name of letters, digits and _, not previous or roundN")
    if not isinstance(stage, dict):
        raise UserError(where, show(stage), f"a mapping with kind, one of {', '.join(KINDS)}")
    kind = stage.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{where}.kind", show(kind), f"one of {', '.join(KINDS)}{did_you_mean(str(kind), list(KINDS))}")
    required, optional = KINDS[kind]
    known = (*required, *optional, *COMMON_KEYS)
    for key, value in stage.items():
        if key not in known:
            expected = f"one of {', '.join(known)}{did_you_mean(str(key), known)}"
            raise UserError(f"{where}.{key}", show(value), expected)
        expected_type, words = _TYPES.get(key, (str, ""))
        wrong_bool = isinstance(value, bool) and expected_type is not bool
        if not isinstance(value, expected_type) or wrong_bool:
            raise UserError(f"{where}.{key}", show(value), words)
        _check_items(f"{where}.{key}", key, value, words)
    if missing := [key for key in required if not stage.get(key)]:
        raise UserError(f"{where}.{missing[0]}", "nothing", _TYPES[missing[0]][1])
    for key in ("nproc", "limit", "samples", "max_length"):
        if stage.get(key, 1) < 1:
            raise UserError(f"{where}.{key}", stage[key], "1 or more")
    for number in stage.get("rounds", []):
        if type(number) is not int or not 1 <= number <= rounds:
            raise UserError(f"{where}.rounds", show(number), f"numbers from 1 to {rounds}, the flywheel's rounds")
    if kind == "evaluate" and bool(stage.get("model")) == bool(stage.get("models")):
        raise UserError(f"{where}.model", show(stage.get("model")), "one of model and models")
    if kind == "report" and not stage.get("runs"):
        raise UserError(f"{where}.runs", "nothing", "at least one run")
    if kind == "check" and stage.get("require", "ahead") != "ahead":
        raise UserError(f"{where}.require", show(stage["require"]), "ahead, or nothing")
    if kind == "command":
        _check_command(where, stage)
    _sbatch_options(f"{where}.slurm", stage.get("slurm") or {})


def _check_items(where: str, key: str, value: Any, expected: str) -> None:
    """What is in a list or a mapping of a stage, and that a text says something."""
    if value == "":
        raise UserError(where, "''", expected)
    if key in ("runs", "results", "after", "model_arg"):
        for number, item in enumerate(value):
            if not isinstance(item, str) or not item:
                raise UserError(f"{where}[{number}]", show(item), expected)
    if key == "models":
        for name, path in value.items():
            if not isinstance(name, str) or not name or not isinstance(path, str) or not path:
                raise UserError(f"{where}.{name}", show(path), expected)
    if key == "set" and (wrong := [name for name in value if not isinstance(name, str) or not name]):
        raise UserError(where, show(wrong[0]), expected)


def _check_command(where: str, stage: Mapping[str, Any]) -> None:
    if stage.get("produces", "file") not in COMMAND_PRODUCTS:
        raise UserError(f"{where}.produces", show(stage["produces"]), f"one of {', '.join(COMMAND_PRODUCTS)}")
    for key in ("words", "inputs"):
        for number, word in enumerate(stage.get(key, [])):
            if isinstance(word, dict | list) or word is None:
                raise UserError(f"{where}.{key}[{number}]", show(word), "a text or a number")
    output = stage.get("output", "output")
    if Path(output).is_absolute() or ".." in Path(output).parts or output.startswith("."):
        raise UserError(f"{where}.output", show(output), "a name inside of the stage's own directory")


def _objectives(value: Any) -> dict[str, dict[str, Any]]:
    if isinstance(value, list):
        value = {name: {} for name in value if isinstance(name, str)} if all(map(_is_name, value)) else None
    expected = "a list of objectives, or names with keys of the section objective: {wide: {name: remit, epsilon: 0.5}}"
    if not isinstance(value, dict):
        raise UserError("objectives", show(value), expected)
    for name, settings in value.items():
        if not _is_name(name) or not isinstance(settings, dict | None):
            raise UserError(f"objectives.{name}", show(settings), expected)
        if re.fullmatch(r"round\d+", name) or name == PREVIOUS:
            raise UserError(f"objectives.{name}", name, "a name that is not previous or roundN")
    return {name: {"name": name, **(settings or {})} for name, settings in value.items()}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _round0(value: Any) -> dict[str, str]:
    expected = "stages and the paths that stand for them before round 1: {rlvr: DIR, …}"
    if not isinstance(value, dict):
        raise UserError("round0", show(value), expected)
    for name, path in value.items():
        if not isinstance(path, str) or not path or list(references(path, field=f"round0.{name}")):
            raise UserError(f"round0.{name}", show(path), expected)
    return value


def _sbatch_options(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(where, show(value), "long options of sbatch: {nodes: 4, time: 08:00:00}")
    for name, option in value.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", str(name)) or isinstance(option, dict | list):
            raise UserError(f"{where}.{name}", show(option), "a long option of sbatch without its dashes")
        if name in _OWN_OPTIONS:
            raise UserError(f"{where}.{name}", show(option), "no option that the chain sets itself")
    return value
