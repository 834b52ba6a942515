"""Models that transformers would complete, change or read as noise: `remit evaluate` names them and writes no score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from remit_megatron import cli
from tests.unit.evaluation.test_evaluate import options, write_suite


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def work(directory: Path) -> None:
        held = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
        change(held)
        save_file(held, directory / "model.safetensors", metadata={"format": "pt"})

    return work


def adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")


def rows(directory: Path) -> None:
    """The model has no row for the last character of its tokenizer, ``?``."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 44}))
    weights(lambda held: held.update({EMBEDDING: held[EMBEDDING][:44].clone()}))(directory)


def configured(**changes: object) -> Callable[[Path], None]:
    def work(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return work


EMBEDDING, MISSING = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
CASES = {
    "missing": ("arc_easy", weights(lambda held: held.pop(MISSING)), f"found no {MISSING} in "),
    "adapter": ("arc_easy", adapter, "adapter_config.json beside the model"),
    "shape": ("arc_easy", weights(lambda held: held.update({MISSING: held[MISSING][:-1].clone()})), "of shape ("),
    # What transformers raises for these: AttributeError twice, two of its own kinds, KeyError.
    "auto dtype": ("arc_easy", configured(dtype="auto"), "expected a directory that transformers loads"),
    "text_config": ("arc_easy", configured(text_config={"a": 1}), "expected a directory that transformers loads"),
    "text for a number": ("arc_easy", configured(hidden_size="48"), "expected a directory that transformers loads"),
    "layer_types": ("arc_easy", configured(layer_types=["x"]), "expected a directory that transformers loads"),
    "activation": ("arc_easy", configured(hidden_act="nothing"), "expected a directory that transformers loads"),
    "a row": ("arc_easy", rows, "found ids up to 44; expected below 44"),
    "generation": (
        "gsm8k",
        weights(lambda held: held["model.norm.weight"].__setitem__(3, torch.nan)),
        "from logits that are not finite",
    ),
    "infinite": (
        "gsm8k",
        weights(lambda held: held["model.norm.weight"].__setitem__(3, torch.inf)),
        "from logits that are not finite",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_is_none_gets_no_score(models, data, tmp_path, capsys, name):
    task, change, says = CASES[name]
    shutil.copytree(models["first"], tmp_path / "model")
    change(tmp_path / "model")
    suite = write_suite(tmp_path / "suite.yaml", {task: 0})
    assert cli.main(["evaluate", str(tmp_path / "model"), *options(data, suite, tmp_path / "output")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert not (tmp_path / "output" / "results.json").exists()
