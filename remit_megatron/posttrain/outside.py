"""What the engines that run elsewhere have in common: what they are given, and what is taken from them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from remit_megatron.posttrain.configuration import PosttrainSettings, dump
from remit_megatron.posttrain.examples import Example, digest_of, read_examples
from remit_megatron.posttrain.results import COMPLETE, compare_identity
from remit_megatron.runtime.errors import DoNotRestart, UserError, show
from remit_megatron.runtime.exported import HuggingFaceModel, huggingface_model
from remit_megatron.runtime.files import fsync_directory, fsync_file, write_atomic
from remit_megatron.runtime.whole_model import check_whole

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Given:
    """What an engine works from.

    Attributes:
        source: the model.
        train, valid: the lines.
        identity: what a run that goes on must have in common with the one that was begun.
    """

    source: HuggingFaceModel
    train: list[Example]
    valid: list[Example]
    identity: dict[str, Any]


def prepare(settings: PosttrainSettings) -> Given:
    """Reads model and data.

    Raises:
        UserError: they are not there, or wrong.
    """
    train = read_examples(settings.data.train, stage=settings.stage, field="data.train")
    valid: list[Example] = []
    if settings.data.valid:
        valid = read_examples(settings.data.valid, stage=settings.stage, field="data.valid")
    source = huggingface_model(settings.model, field="model")
    check_whole(source.path, field="model")
    plain = settings.to_plain()
    identity = {name: plain[name] for name in ("stage", "engine", "chat_template", "verifier", "seed", "trl")}
    identity |= {"model": source.digest, "data": digest_of(train)}
    identity[settings.engine] = plain[settings.engine]
    return Given(source, train, valid, identity)


def already_done(run_dir: Path, identity: dict[str, Any]) -> bool:
    """Whether the run is complete, which is said.

    Raises:
        UserError: it is, of another configuration.
    """
    if not (run_dir / COMPLETE).exists():
        return False
    compare_identity(json.loads((run_dir / COMPLETE).read_text())["identity"], identity, run_dir)
    sys.stdout.write(f"nothing to do: {run_dir / 'model'} is written\n")
    return True


def write_settings(run_dir: Path, settings: PosttrainSettings) -> None:
    """config.yaml of the run directory."""
    plain = settings.to_plain()
    write_atomic(run_dir / "config.yaml", dump({"stage": plain.pop("stage"), **plain}))


def is_model(directory: Path) -> bool:
    """Whether there is a Hugging Face model."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def take_model(output: Path, run_dir: Path, given: Given) -> None:
    """Makes what an engine has written the result of the run; the tokenizer comes from the source where it has none.

    Raises:
        DoNotRestart: it has written no model, one that is not whole, another one, or has learnt nothing.
    """
    _check_model(output, given)
    if not _changed(output, given.source.path):
        raise DoNotRestart(f"{output}: found the weights that it started from; expected a model that learnt something")
    _take(output, run_dir / "model", given)
    write_atomic(run_dir / COMPLETE, json.dumps({"step": None, "identity": given.identity}) + "\n")
    sys.stdout.write(f"{run_dir / 'model'}: the model\n")


def take_kept(kept: Path, run_dir: Path, given: Given) -> None:
    """Makes what an engine has written of intermediate models ``models/step-N`` of the run, as those of TRL.

    Raises:
        DoNotRestart: one is not whole, or another model.
    """
    for directory in sorted(kept.glob("step-*[0-9]")):
        _check_model(directory, given)
        (run_dir / "models").mkdir(exist_ok=True)
        _take(directory, run_dir / "models" / directory.name, given)


def _take(output: Path, place: Path, given: Given) -> None:
    """Moves a directory that was checked; what is there is on disk when it is there."""
    _add_tokenizer(output, given)
    for file in output.iterdir():
        if file.is_file():
            fsync_file(file)
    fsync_directory(output)
    if place.exists():
        shutil.rmtree(place)
    output.rename(place)
    fsync_directory(place.parent)


def _check_model(directory: Path, given: Given) -> None:
    """Refuses what no later stage could go on from, while it is known who wrote it."""
    if not is_model(directory):
        raise DoNotRestart(f"{directory}: found no config.json and *.safetensors; expected a Hugging Face directory")
    try:
        check_whole(directory, field="the model that was written")
    except UserError as error:
        raise DoNotRestart(str(error)) from None
    made, source = (json.loads((path / "config.json").read_text()) for path in (directory, given.source.path))
    for name in ("model_type", "vocab_size"):
        if made.get(name) != source.get(name):
            found, expected = show(made.get(name)), show(source.get(name))
            raise DoNotRestart(f"{directory}: found {name} {found}; expected {expected}, as in {given.source.path}")


def _changed(directory: Path, source: Path) -> bool:
    """Whether a weight has another value than in ``source``; nearly always told by the first."""
    before, after = _tensor_files(source), _tensor_files(directory)
    for name in sorted(before.keys() & after.keys()):
        with safe_open(before[name], "pt") as was, safe_open(after[name], "pt") as now:
            old, new = was.get_tensor(name), now.get_tensor(name)
            # An engine may write another dtype: what it was given, rounded to it, is not learnt.
            narrow = min(old.dtype, new.dtype, key=lambda dtype: torch.finfo(dtype).bits)
            if not torch.equal(old.to(narrow), new.to(narrow)):
                return True
    return False


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Name of every tensor -> a file that holds it."""
    found: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            found |= dict.fromkeys(held.keys(), file)
    return found


def _add_tokenizer(output: Path, given: Given) -> None:
    if any((output / name).exists() for name in _TOKENIZER):
        return
    for pattern in ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "*.jinja"):
        for file in given.source.path.glob(pattern):
            shutil.copyfile(file, output / file.name)
