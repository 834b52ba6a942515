"""A dry run refuses Hugging Face weights that the run would refuse when it loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from remit_megatron.data.build import build_dataset
from remit_megatron.run.configuration import load_config
from remit_megatron.run.dry_run import dry_run
from remit_megatron.runtime.errors import UserError
from tests.tiny import make_llama, make_tokenizer, write_documents

HEAD, EMBEDDING, WEIGHT = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    tokenizer = make_tokenizer(root / "tokenizer")
    make_llama(root / "model", seed=1, tokenizer=tokenizer, num_hidden_layers=2)
    build_dataset([write_documents(root / "c.jsonl", count=100, seed=1)], tokenizer, root / "c")
    return root


Change = Callable[[dict[str, torch.Tensor]], object]
CASES: dict[str, tuple[Change, str]] = {
    "missing": (lambda held: held.pop(WEIGHT), f"found no tensor {WEIGHT}"),
    "head": (lambda held: held.update({HEAD: held[EMBEDDING].flip(0).contiguous()}), "config.json tie_word_embeddings"),
    "rows": (lambda held: held.update({EMBEDDING: held[EMBEDDING][:45].clone()}), "found shape (45, 48); expected 51"),
    "unknown": (lambda held: held.update({"other": torch.ones(2)}), "other (1 unknown)"),
    "dtype": (lambda held: held.update({WEIGHT: held[WEIGHT].double()}), "found dtype float64"),
}


@pytest.mark.parametrize("key", ["init", "reference.checkpoint"])
@pytest.mark.parametrize("name", CASES)
def test_weights_that_the_run_would_refuse(root, tmp_path, key, name):
    change, says = CASES[name]
    shutil.copytree(root / "model", tmp_path / "model")
    held = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    values = {
        "init": str(root / "model"),
        "reference": {"checkpoint": str(root / "model")},
        "data": {"train": [[1.0, str(root / "c")]]},
        "megatron": {"seq_length": 64, "global_batch_size": 2, "train_iters": 2, "lr": 1e-3},
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    config = load_config(tmp_path / "run.yaml", [f"{key}={tmp_path / 'model'}"])
    assert "parameters" in dry_run(config)
    change(held)
    save_file(held, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as refused:
        dry_run(config)
    assert says in str(refused.value)
