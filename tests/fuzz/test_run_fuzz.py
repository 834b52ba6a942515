"""Run configurations that somebody edited: a dry run describes the run, or names what is wrong in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import patches

patches.apply()

from remit_megatron.run.configuration import RunConfig, load_config  # noqa: E402
from remit_megatron.run.dry_run import dry_run  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.fuzz.damage import REFUSED, altered, damaged, examples, handled, odd_values  # noqa: E402
from tests.tiny import make_tokenizer  # noqa: E402

RUN: dict[str, Any] = {
    "model": {"base": "tiny_llama", "vocab_size": 51},
    "objective": {"name": "remit", "epsilon": 0.2, "centering": "sequence", "keep": 0.5},
    "loss": {"linear": True},
    "reference": {"checkpoint": "nowhere/reference", "source": "live", "placement": "pipeline", "micro_batch_size": 2},
    "data": {
        "train": [[0.7, "a"], [0.3, "b"]],
        "valid": ["c"],
        "tokenizer": "tokenizer",
        "mask_eod_loss": True,
        "num_workers": 0,
    },
    "megatron": {
        "seq_length": 64,
        "train_iters": 10,
        "lr": 1e-3,
        "min_lr": 1e-5,
        "lr_decay_style": "cosine",
        "lr_warmup_fraction": 0.1,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "adam_beta2": 0.95,
        "clip_grad": 1.0,
        "weight_decay": 0.1,
        "tensor_model_parallel_size": 1,
    },
    "optimizer": {"decay_norms": True, "decay_embeddings": None},
    "run_dir": "runs/x",
    "seed": 7,
    "checkpoint": {"keep": 2, "resume": "auto"},
    "logging": {"interval": 1, "wandb": {"mode": "disabled"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    make_tokenizer(root / "tokenizer")
    return root


def use(folder: Path, content: Any, overrides: tuple[str, ...] = ()) -> Any:
    """What `remit train CONFIG --dry-run` prints, or REFUSED."""
    file = folder / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content, allow_unicode=True).encode())
    before = os.getcwd()
    os.chdir(folder)
    try:
        return handled(lambda: dry_run(load_config(file, overrides)))
    finally:
        os.chdir(before)


def test_whole(folder):
    assert "nowhere/reference" in use(folder, RUN)


@examples(25)
@given(data=st.data())
def test_altered_run(folder, data):
    content = {name: value for name, value in RUN.items() if name not in ("megatron", "model")}
    content = data.draw(altered(content))
    if isinstance(content, dict):
        content = content | {"model": RUN["model"], "megatron": RUN["megatron"]}
    use(folder, content)


@examples(25)
@given(data=st.data())
def test_altered_megatron_arguments(folder, data):
    use(folder, RUN | {"megatron": data.draw(altered(RUN["megatron"], edits=1))})


@examples(20)
@given(data=st.data())
def test_altered_model(folder, data):
    use(folder, RUN | {"model": data.draw(altered(RUN["model"] | {"head_dim": 12, "rope_theta": 1e4}))})


@examples(60)
@given(data=st.data())
def test_damaged_run(folder, data):
    text = data.draw(damaged(yaml.safe_dump(RUN).encode()))
    file = folder / "run.yaml"
    file.write_bytes(text)
    config = handled(lambda: load_config(file))
    assert config is REFUSED or isinstance(config, RunConfig)


@examples(100)
@given(
    key=st.sampled_from(("seed", "data.train", "megatron.lr", "objective", "model.vocab_size", "a.b", "")),
    data=st.data(),
)
def test_overrides(folder, key, data):
    value = data.draw(odd_values | st.text(max_size=12))
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(RUN))
    config = handled(lambda: load_config(file, (f"{key}={value}",)))
    assert config is REFUSED or isinstance(config, RunConfig)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"megatron": [[]]}, "megatron"),
        ({"model": RUN["model"] | {"vocab_size": None}}, "config.json vocab_size"),
        ({"model": RUN["model"] | {"vocab_size": "51"}}, "config.json vocab_size"),
        ({"model": RUN["model"] | {"num_hidden_layers": 10**30}}, "config.json num_hidden_layers"),
    ],
)
def test_found(folder, monkeypatch, change, field):
    monkeypatch.chdir(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN | change))
    with pytest.raises(UserError) as caught:
        dry_run(load_config(folder / "run.yaml"))
    assert caught.value.field == field
