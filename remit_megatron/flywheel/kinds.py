"""What each kind of stage runs, what decides its result, and where that result is.

A command is given as the words behind ``remit`` (or, of the kind ``command``, as they are). Each goes on by itself from
what it finds in the stage's directory, so that starting a stage is the same as starting it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remit_megatron.flywheel.chain import WITHOUT_REFERENCE, Stage
from remit_megatron.flywheel.keys import STAGE, Digests, posttrain_content, run_content, suite_content
from remit_megatron.flywheel.references import Reference, filled, only
from remit_megatron.run.configuration import RunConfig, blend_prefixes, load_config
from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.extras import require
from remit_megatron.runtime.installed import find_config
from remit_megatron.scoring.verdicts import GAIN, beginning

if TYPE_CHECKING:
    from remit_megatron.posttrain.configuration import PosttrainSettings

POSTTRAIN = ("sft", "dpo", "rlvr")
# Where the kinds that take a run's or a post-training's configuration put it.
RUN = "run"
_OWN_SETTINGS = {
    "run_dir": "nothing: the flywheel has a directory for each stage",
    "init": "the key `model` of the stage",
    "reference.checkpoint": "the key `reference` of the stage",
    "model": "the key `model` of the stage",
}
# Kinds whose command starts ranks by itself.
_WITH_NPROC = ("train", "score", "check", "evaluate", *POSTTRAIN)


@dataclass(frozen=True)
class Filling:
    """What stands in place of references: real paths for a command, keys for a digest.

    Attributes:
        fill: the place of a reference's result.
        directory: of the stage.
        seed: of the flywheel.
    """

    fill: Callable[[Reference], str]
    directory: Path
    seed: int | None


@dataclass(frozen=True)
class Command:
    """What a stage starts.

    Attributes:
        words: behind ``remit`` or, where ``program`` is set, everything.
        nproc: ranks that it has; None for commands that have none.
    """

    words: list[str]
    nproc: int | None = None
    program: bool = False


def command(stage: Stage, filling: Filling) -> Command:
    """The command of a stage.

    Raises:
        UserError: a setting that is not the stage's to set.
    """
    settings = filled(stage.settings, filling.fill, field=stage.field)
    directory, nproc = filling.directory, settings.get("nproc")
    if stage.kind == "command":
        places = _places(stage, filling)
        return Command([_placed(word, places) for word in settings["words"]], nproc, program=True)
    words = _WORDS[stage.kind](stage, settings, filling, directory)
    return Command([str(word) for word in words], (nproc or 1) if stage.kind in _WITH_NPROC else None)


def content(stage: Stage, filling: Filling, digests: Digests) -> dict[str, Any]:
    """What decides a stage's result (docs/flywheel.md): its key is the digest of this.

    Args:
        filling: with keys in place of the paths of other stages.

    Raises:
        UserError: the configuration that it names is wrong.
    """
    settings = filled(stage.settings, filling.fill, field=stage.field)
    nproc = settings.get("nproc") or 1
    result: dict[str, Any] = {"kind": stage.kind}
    if stage.kind in ("train", "score", "check"):
        config = _run_config(stage, settings, filling)
        result["config"] = run_content(config, digests, nproc=nproc)
        result |= {name: settings[name] for name in ("all", "samples", "require") if name in settings}
        if stage.kind == "train" and settings.get("scores"):
            result["scores"] = digests.of_scores(settings["scores"])
    elif stage.kind in POSTTRAIN:
        overrides = _posttrain_overrides(stage, settings, filling)
        result["config"] = posttrain_content(stage.kind, settings["config"], overrides, digests, nproc=nproc)
    elif stage.kind == "export":
        result |= {"model": digests.of(settings["model"], field=f"{stage.field}.model"), "dtype": settings.get("dtype")}
    elif stage.kind == "evaluate":
        models = _models(stage, settings).items()
        result["models"] = {name: digests.of(path, field=f"{stage.field}.model") for name, path in models}
        result["suite"] = suite_content(settings["suite"], digests)
        if "data" in settings:
            result["data"] = digests.of(settings["data"], field=f"{stage.field}.data")
        names = ("limit", "backend", "dtype", "max_length", "chat_template", "allow_code", "model_arg")
        result |= {name: settings[name] for name in names if name in settings}
    elif stage.kind == "report":
        for name in ("runs", "results"):
            result[name] = [digests.of(path, field=f"{stage.field}.{name}") for path in settings.get(name, [])]
        result["title"] = settings.get("title")
    else:
        result |= _command_content(stage, settings, digests, filling)
    return result


def check_arguments(stage: Stage, filling: Filling) -> None:
    """Refuses what Megatron or TRL has no argument for, which the stage itself would only find when its turn comes.
    Imports the one or the other, some seconds.

    Args:
        filling: as for :func:`content`.

    Raises:
        UserError: an unknown name, a value of a wrong type, or an argument that is refused.
    """
    settings = filled(stage.settings, filling.fill, field=stage.field)
    if stage.kind in ("train", "score", "check"):
        import patches

        patches.apply()
        from remit_megatron.run.megatron_args import read_overrides

        read_overrides(_run_config(stage, settings, filling).megatron)
    elif stage.kind in POSTTRAIN:
        found = _posttrain_settings(stage, settings, filling)
        if found.engine == "trl":  # the others have checks of their own, and need no TRL
            require("trl", field=f"{stage.field}: engine trl")
        if found.trl and found.engine == "trl":
            from remit_megatron.posttrain.trl_arguments import check_names

            check_names(found)


def result_place(stage: Stage, directory: Path, step: int | None = None) -> Path:
    """The path by which others take a stage's result, or what it was at a step."""
    if stage.kind == "train":
        return directory / RUN if step is None else directory / RUN / "checkpoints" / f"iter_{step:07d}"
    if stage.kind in POSTTRAIN:
        return directory / RUN / ("model" if step is None else f"models/step-{step}")
    names = {"score": "scores", "export": "model", "evaluate": "evaluation", "check": "check.json"}
    names["report"] = "report.html"
    return directory / (names.get(stage.kind) or str(stage.settings.get("output", "output")))


def step_problem(stage: Stage, step: int, filling: Filling) -> tuple[str, str] | None:
    """What a stage would have to say to keep its model of a step, as (found, expected); None where it does.

    Args:
        filling: as for :func:`content`.
    """
    settings = filled(stage.settings, filling.fill, field=stage.field)
    if stage.kind in POSTTRAIN:
        found = _posttrain_settings(stage, settings, filling)
        every = found.keep.every
        if every is None or step % every:
            return f"keep.every {show(every)}", f"keep.every, a number that divides {step}"
        last = found.trl.get("max_steps", -1)
        if isinstance(last, int) and 0 < last < step:
            return f"trl.max_steps {last}", f"trl.max_steps of {step} or more"
        return None
    config = _run_config(stage, settings, filling)
    interval = config.megatron.get("save_interval")
    if not isinstance(interval, int) or interval < 1 or step % interval:
        return f"megatron.save_interval {show(interval)}", f"megatron.save_interval, a number that divides {step}"
    if config.checkpoint.keep is not None:
        return f"checkpoint.keep {config.checkpoint.keep}", "checkpoint.keep null"
    last = config.megatron.get("train_iters")
    if isinstance(last, int) and last < step:
        return f"megatron.train_iters {last}", f"megatron.train_iters of {step} or more"
    return None


def token_data(stage: Stage, filling: Filling) -> list[str]:
    """Prefixes of the data sets from outside that a stage reads.

    Args:
        filling: as for :func:`content`.
    """
    if stage.kind not in ("train", "score", "check"):
        return []
    settings = filled(stage.settings, filling.fill, field=stage.field)
    data = _run_config(stage, settings, filling).data
    return [prefix for prefix in blend_prefixes(data.train, data.valid) if not prefix.startswith(STAGE)]


def job_of_its_own(stage: Stage, filling: Filling) -> str | None:
    """The engine of a post-training that submits itself to Slurm, and ends with 75 until its job is done.

    Args:
        filling: as for :func:`content`.
    """
    if stage.kind not in POSTTRAIN:
        return None
    settings = filled(stage.settings, filling.fill, field=stage.field)
    found = _posttrain_settings(stage, settings, filling)
    return found.engine if found.engine == "nemo_rl" else None


def finished(stage: Stage, directory: Path) -> bool:
    """Whether the result is there whole although nobody noted it; for commands that refuse one that exists."""
    return stage.kind == "export" and result_place(stage, directory).exists()


def verdict(stage: Stage, directory: Path) -> str:
    """What is wrong with a result although its command ended well, in words; empty where nothing is.

    A check with ``require: ahead`` fails where its sentence promises no gain.
    """
    if stage.kind != "check" or stage.settings.get("require") != "ahead":
        return ""
    place = result_place(stage, directory)
    try:
        sentence = str(json.loads(place.read_text(encoding="utf-8"))["verdict"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{place}: found no verdict ({error!r})"
    return "" if beginning(sentence) == GAIN else f"require: ahead: {sentence}"


def _set(stage: Stage, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of ``set``; refuses what the stage itself says or the flywheel decides."""
    for key, value in _dotted(settings.get("set") or {}):
        owner = key if stage.kind in POSTTRAIN or key != "model" else ""
        if owner in _OWN_SETTINGS and not (stage.kind in POSTTRAIN and owner == "init"):
            raise UserError(f"{stage.field}.set.{key}", show(value), _OWN_SETTINGS[owner])
        yield key, value


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def _run_overrides(stage: Stage, settings: dict[str, Any], filling: Filling) -> list[str]:
    values = dict(_set(stage, settings))
    section = settings.get("objective") or {}
    values |= {f"objective.{name}": value for name, value in section.items()}
    if section.get("name") in WITHOUT_REFERENCE:
        values = {name: value for name, value in values.items() if not name.startswith("reference.")}
        values["reference"] = None
    if settings.get("model"):
        values["init"] = settings["model"]
    if settings.get("reference"):
        values["reference.checkpoint"] = settings["reference"]
    if stage.kind == "score":
        values["reference.cache_dir"] = str(result_place(stage, filling.directory))
    elif settings.get("scores"):
        values |= {"reference.source": "cache", "reference.cache_dir": settings["scores"]}
        # What another stage gave is not written to.
        values.setdefault("reference.on_missing", "refuse")
    if filling.seed is not None:
        values.setdefault("seed", filling.seed)
    values["run_dir"] = str(filling.directory / RUN)
    return [_override(key, value) for key, value in values.items()]


def _run_config(stage: Stage, settings: dict[str, Any], filling: Filling) -> RunConfig:
    return load_config(settings["config"], _run_overrides(stage, settings, filling))


def _posttrain_settings(stage: Stage, settings: dict[str, Any], filling: Filling) -> PosttrainSettings:
    from remit_megatron.posttrain.configuration import load_settings

    return load_settings(settings["config"], _posttrain_overrides(stage, settings, filling), stage=stage.kind)


def _posttrain_overrides(stage: Stage, settings: dict[str, Any], filling: Filling) -> list[str]:
    values = dict(_set(stage, settings))
    if settings.get("model"):
        values["model"] = settings["model"]
    if filling.seed is not None:
        values.setdefault("seed", filling.seed)
    values["run_dir"] = str(filling.directory / RUN)
    return [_override(key, value) for key, value in values.items()]


def _run_words(stage: Stage, settings: dict[str, Any], filling: Filling, directory: Path) -> list[Any]:
    command = {"train": ["train"], "score": ["score"], "check": ["check", "reference"]}[stage.kind]
    words = [*command, settings["config"], *_run_overrides(stage, settings, filling)]
    if stage.kind == "score" and settings.get("all"):
        words.append("--all")
    if stage.kind == "check":
        words += ["--samples", settings["samples"]] if "samples" in settings else []
        words += ["--output", result_place(stage, directory)]
    return words


def _posttrain_words(stage: Stage, settings: dict[str, Any], filling: Filling, _: Path) -> list[Any]:
    return ["posttrain", stage.kind, settings["config"], *_posttrain_overrides(stage, settings, filling)]


def _export_words(stage: Stage, settings: dict[str, Any], _: Filling, directory: Path) -> list[Any]:
    words = ["export", "--checkpoint", settings["model"], "--output", result_place(stage, directory)]
    return words + (["--dtype", settings["dtype"]] if "dtype" in settings else [])


def _evaluate_words(stage: Stage, settings: dict[str, Any], _: Filling, directory: Path) -> list[Any]:
    words: list[Any] = ["evaluate", *(f"{name}={path}" for name, path in _models(stage, settings).items())]
    words += ["--suite", settings["suite"], "--output", result_place(stage, directory)]
    for name in ("data", "limit", "backend", "batch_size", "dtype", "max_length", "chat_template"):
        words += [f"--{name.replace('_', '-')}", settings[name]] if name in settings else []
    words += [f"--model-arg={word}" for word in settings.get("model_arg", [])]
    return words + (["--allow-code"] if settings.get("allow_code") else [])


def _report_words(stage: Stage, settings: dict[str, Any], _: Filling, directory: Path) -> list[Any]:
    words: list[Any] = ["report", *settings["runs"]]
    for path in settings.get("results", []):
        words += ["--results", path]
    words += ["--title", settings["title"]] if "title" in settings else []
    return [*words, "--output", result_place(stage, directory)]


_WORDS: dict[str, Callable[[Stage, dict[str, Any], Filling, Path], list[Any]]] = {
    **dict.fromkeys(("train", "score", "check"), _run_words),
    **dict.fromkeys(POSTTRAIN, _posttrain_words),
    "export": _export_words,
    "evaluate": _evaluate_words,
    "report": _report_words,
}


def _models(stage: Stage, settings: dict[str, Any]) -> dict[str, str]:
    """Names and paths of the models that are evaluated. The name of one alone is its stage's, and its objective's."""
    if "models" in settings:
        return {str(name): str(path) for name, path in settings["models"].items()}
    reference = only(stage.settings["model"], field=f"{stage.field}.model")
    if reference is None:
        return {Path(settings["model"]).name or "model": settings["model"]}
    objective = reference.objective or stage.objective
    step = None if reference.step is None else f"step{reference.step}"
    return {"-".join(part for part in (objective, reference.name, step) if part): settings["model"]}


def _places(stage: Stage, filling: Filling) -> dict[str, str]:
    return {
        "{output}": str(result_place(stage, filling.directory)),
        "{dir}": str(filling.directory),
        "{seed}": str(filling.seed if filling.seed is not None else ""),
        "{nproc}": str(stage.settings.get("nproc", 1)),
        "{round}": str(stage.round),
        "{objective}": stage.objective or "",
    }


def _placed(word: Any, places: dict[str, str]) -> str:
    text = str(word)
    for name, value in places.items():
        text = text.replace(name, value)
    return text


def _command_content(stage: Stage, settings: dict[str, Any], digests: Digests, filling: Filling) -> dict[str, Any]:
    written = [str(word) for word in settings["words"]]
    places = _places(stage, filling)
    # What stands for a directory stays as it is written: where a stage runs does not decide what comes out.
    places = {name: value for name, value in places.items() if name not in ("{output}", "{dir}")}
    if filling.seed is None and any("{seed}" in word for word in written):
        raise UserError(f"{stage.field}.words", "{seed} without a seed", "`seed` in the flywheel's file")
    words = [_placed(word, places) for word in written]
    files = {word: find_config(word, announce=False) for word in words}
    files = {word: str(path) for word, path in files.items() if path.is_file()}
    inputs = [str(path) for path in settings.get("inputs", [])]
    return {
        "words": words,
        "files": {word: digests.of(path, field=f"{stage.field}.words") for word, path in files.items()},
        "inputs": [digests.of(path, field=f"{stage.field}.inputs") for path in inputs],
        "output": str(settings.get("output", "output")),
    }
