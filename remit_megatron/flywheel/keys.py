"""What a stage's result depends on, as one digest: its key.

A key holds what decides the result: the resolved configuration, what it reads (by content, whatever its path), the
version of the code, the seed. It does not hold where results go, how much is logged, how often is saved or measured,
or on which layout and how many devices a run computes: it may go on on others, and docs/flywheel.md lists these.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from remit_megatron import __version__
from remit_megatron.data.inputs import expand_inputs
from remit_megatron.posttrain.results import FREE
from remit_megatron.run.configuration import RunConfig, load_model_description
from remit_megatron.runtime.checkpoints import read_manifest
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.exported import checkpoint_digest, checkpoint_of, model_files
from remit_megatron.runtime.files import sha256_file, write_atomic
from remit_megatron.runtime.installed import PACKAGE

# In place of the result of another stage.
STAGE = "stage "
ABSENT = "nothing at "
# Of a run's configuration: sections and keys without which the same comes out.
_RUN_WITHOUT = (
    *("run_dir", "logging", "checkpoint", "data.cache_dir", "data.num_workers", "evaluation.every"),
    *("evaluation.at_start", "reference.cache_dir", "reference.placement", "reference.micro_batch_size"),
    *("reference.on_missing", "reference.write_cache"),
)
# Arguments of Megatron that say where and how it computes, saves and prints. Beginnings end with an underscore.
_MEGATRON_WITHOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank", "context_parallel_size"),
    *("sequence_parallel", "micro_batch_size", "use_distributed_optimizer_instances", "num_workers", "data_parallel_"),
    *("overlap_", "recompute_", "tp_comm_", "ddp_", "align_", "delay_wgrad_compute", "manual_gc", "manual_gc_"),
    *("save_interval", "save_retain_interval", "eval_interval", "async_save", "ckpt_", "dist_ckpt_", "use_dist_ckpt"),
    *("log_", "timing_log_", "tensorboard_", "wandb_", "profile", "profile_", "exit_", "distributed_timeout_"),
)
# Of a post-training's.
_POSTTRAIN_WITHOUT = ("run_dir", *(f"trl.{name}" for name in FREE))


def key_of(content: dict[str, Any]) -> str:
    """Hex SHA-256 of what :func:`flattened` makes of a stage's content."""
    return hashlib.sha256(json.dumps(flattened(content), sort_keys=True).encode()).hexdigest()


def flattened(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values; an empty mapping is left out, as its keys are."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= flattened(value, f"{key}.")
        elif value is not None:
            flat[key] = value
    return flat


def difference(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys that two contents have different values of, with both; None where one has not the key."""
    first, second = flattened(before), flattened(now)
    return [
        (key, first.get(key), second.get(key)) for key in sorted({*first, *second}) if first.get(key) != second.get(key)
    ]


def without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A nested mapping without dotted names."""
    result = {
        key: without(value, tuple(name.removeprefix(f"{key}.") for name in names if name.startswith(f"{key}.")))
        if isinstance(value, dict)
        else value
        for key, value in values.items()
        if key not in names
    }
    return result


class Digests:
    """Digests of files and models from outside, kept in a file: what has the same size and time is not read again."""

    def __init__(self, file: Path):
        self._file = file
        try:
            self._known: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):
            self._known = {}
        self._before = dict(self._known)

    def of(self, path: str, *, field: str) -> str:
        """What is at a path, by content: a model, a file, or a directory. What another stage gives stays as it is."""
        if path.startswith(STAGE):
            return path
        place = Path(path)
        if place.is_file():
            return self._of_file(place)
        if not place.is_dir():
            return ABSENT + path
        try:
            checkpoint = checkpoint_of(place, field=field)
        except UserError:
            return self._of_files(place, [file for file in place.rglob("*") if file.is_file()])
        if checkpoint is not None:
            return checkpoint_digest(read_manifest(checkpoint))
        return self._of_files(place, model_files(place))

    def of_data(self, prefix: str) -> str:
        """A tokenized data set, by its own manifest."""
        if prefix.startswith(STAGE):
            return prefix
        try:
            content = json.loads(Path(f"{prefix}.json").read_text())
            return hashlib.sha256(json.dumps([content["bin"], content["idx"]], sort_keys=True).encode()).hexdigest()
        except (OSError, ValueError, KeyError, TypeError):
            return ABSENT + prefix

    def of_texts(self, inputs: Sequence[str]) -> list[str]:
        """Files of text, patterns and folders of them, in the order in which they are read."""
        found = []
        for name in inputs:
            try:
                files = [name] if name.startswith(STAGE) else expand_inputs([name])
            except UserError:
                files = [name]
            found += [self.of(file, field="data") for file in files]
        return found

    def of_scores(self, directory: str) -> str:
        """A score cache, by its manifest: scores carry checksums of their own."""
        return directory if directory.startswith(STAGE) else self.of(str(Path(directory) / "manifest.json"), field="")

    def save(self) -> None:
        """Keeps what has been read for the next time; called where the directory may be written."""
        if self._known != self._before:
            write_atomic(self._file, json.dumps(self._known, indent=1) + "\n")
            self._before = dict(self._known)

    def _of_files(self, root: Path, files: list[Path]) -> str:
        visible = [
            file for file in sorted(files) if not any(part.startswith(".") for part in file.relative_to(root).parts)
        ]
        found = [[str(file.relative_to(root)), self._of_file(file)] for file in visible]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def _of_file(self, file: Path) -> str:
        stat = file.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        name = str(file.resolve())
        if (known := self._known.get(name)) and known[:2] == mark:
            return known[2]
        digest = sha256_file(file)
        self._known[name] = [*mark, digest]
        return digest


def run_content(config: RunConfig, digests: Digests, *, nproc: int) -> dict[str, Any]:
    """What decides the result of a run: its resolved configuration, with digests in place of paths."""
    values = without(dataclasses.asdict(config), _RUN_WITHOUT)
    values["megatron"] = _megatron(config.megatron, nproc)
    if config.spikes is not None and config.spikes.action == "rollback":
        # Where the run goes back to is where it has saved.
        names = ("save_interval", "async_save")
        values["megatron"] |= {name: config.megatron[name] for name in names if name in config.megatron}
    if config.model is not None:
        values["model"] = load_model_description(config.model)
    if config.init:
        values["init"] = digests.of(config.init, field="init")
    if config.data.tokenizer:
        values["data"]["tokenizer"] = digests.of(config.data.tokenizer, field="data.tokenizer")
    for name in ("train", "valid"):
        values["data"][name] = _blend(getattr(config.data, name), digests)
    if config.reference is not None and config.reference.checkpoint:
        values["reference"]["checkpoint"] = digests.of(config.reference.checkpoint, field="reference.checkpoint")
    if config.evaluation is not None:
        suite = config.evaluation.suite
        values["evaluation"]["suite"] = suite_content(suite, digests)
        if config.evaluation.data:
            values["evaluation"]["data"] = digests.of(config.evaluation.data, field="evaluation.data")
    return values


def posttrain_content(kind: str, path: str, overrides: list[str], digests: Digests, *, nproc: int) -> dict[str, Any]:
    """What decides the result of a post-training: its resolved configuration, with digests in place of paths.

    The number of ranks is part of it: TRL's batch is so many times the one of a device.
    """
    from remit_megatron.posttrain.command_engine import words_of
    from remit_megatron.posttrain.configuration import load_settings
    from remit_megatron.posttrain.verifiers import verifier_source

    settings = load_settings(path, overrides, stage=kind)
    values = without(settings.to_plain(), _POSTTRAIN_WITHOUT)
    values["model"] = digests.of(settings.model, field="model")
    for name in ("train", "valid"):
        values["data"][name] = digests.of_texts(getattr(settings.data, name))
    if settings.chat_template and settings.chat_template.lower() != "none":
        values["chat_template"] = digests.of(settings.chat_template, field="chat_template")
    file = (settings.verifier or "").rpartition(":")[0]
    if file.endswith(".py"):
        values["verifier_file"] = digests.of(file, field="verifier")
    named: set[str] = set()
    for name in (*settings.data.train, *settings.data.valid) if kind == "rlvr" else ():
        named |= _verifiers_of_lines(name, tuple(digests.of_texts([name])))
    if settings.verifier and not file.endswith(".py"):
        named.add(settings.verifier)
    sources = {name: verifier_source(name) for name in sorted(named)}
    values["verifiers"] = {name: digests.of(path, field="verifier") for name, path in sources.items() if path}
    if settings.engine == "command":
        with suppress(UserError):  # which the stage itself refuses
            files = [word for word in words_of(settings) if Path(word).is_file()]
            values["command_files"] = {word: digests.of(word, field="command.run") for word in files}
    return {**values, "ranks": nproc}


@functools.cache
def _verifiers_of_lines(name: str, contents: tuple[str, ...]) -> frozenset[str]:
    """Names of the verifiers that lines ask for; of no file that is not there yet, or that the stage itself refuses.

    Args:
        name: a file, folder or pattern; ``contents`` are its digests, so that each is read once for all stages.
    """
    from remit_megatron.posttrain.examples import read_examples

    if name.startswith(STAGE):
        return frozenset()
    try:
        examples = read_examples([name], stage="rlvr", field="data")
    except (UserError, OSError):
        return frozenset()
    return frozenset(example.fields["verifier"] for example in examples if "verifier" in example.fields)


def suite_content(name: str, digests: Digests) -> Any:
    """A suite by what its file asks for, and by the task files that it names."""
    from remit_megatron.evaluation.suites import load_suite

    suite = load_suite(name)
    files = {
        task: digests.of(str(suite.folder / task), field="suite")
        for entry in suite.entries
        for task in entry.tasks
        if (suite.folder / task).is_file()
    }
    return {"digest": suite.digest(), "chat_template": suite.chat_template, "files": files}


def _blend(blend: list[Any], digests: Digests) -> list[Any]:
    return [
        digests.of_data(entry) if isinstance(entry, str) else [entry[0], digests.of_data(entry[1])] for entry in blend
    ]


def _megatron(chosen: dict[str, Any], nproc: int) -> dict[str, Any]:
    def matters(name: str) -> bool:
        return not any(name.startswith(one) if one.endswith("_") else name == one for one in _MEGATRON_WITHOUT)

    values = {name: value for name, value in chosen.items() if matters(name.replace("-", "_"))}
    if not chosen.get("global_batch_size"):
        # Megatron then takes one micro-batch a replica, so that the layout is part of the recipe.
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        values |= {name: chosen[name] for name in (*names, "micro_batch_size") if name in chosen}
        values["ranks"] = nproc
    return values


@functools.cache
def source_digest() -> str:
    """Hex SHA-256 of this package's Python sources, the patches' too."""
    files = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "patches").glob("*.py")])
    found = [[str(file.relative_to(PACKAGE.parent)), sha256_file(file)] for file in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def code_content(code: str) -> dict[str, str]:
    """What of the code belongs to a key: the version, and the sources where the flywheel asks for them."""
    return {"version": __version__, **({"source": source_digest()} if code == "source" else {})}
