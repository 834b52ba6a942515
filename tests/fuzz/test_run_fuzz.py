"""Run configurations that somebody edited: a dry run describes the run, or names what is wrong in one line."""

from __future__ import annotations

import argparse
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
from remit_megatron.run.megatron_args import _known_arguments  # noqa: E402
from remit_megatron.run.megatron_keys import ARCHITECTURE, OWNED, UNSUPPORTED  # noqa: E402
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


def plausible(action: argparse.Action) -> st.SearchStrategy[Any]:
    """Values of an argument's own kind, among them some that no run can have."""
    if action.nargs == 0:
        return st.booleans()
    if action.choices:
        one: st.SearchStrategy[Any] = st.sampled_from([getattr(choice, "name", choice) for choice in action.choices])
    elif action.type is int:
        one = st.sampled_from((0, 1, 2, 3, 4, 5, 8, 10, 64, 1000, -1))
    elif action.type is float:
        one = st.sampled_from((0.0, 1e-8, 1e-5, 0.1, 0.5, 0.999, 1.0, 2.0, -1.0, 1e30, 1))
    else:
        one = st.sampled_from(("x", "1", "a,b", "[1, 0]", "auto", ""))
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        return st.lists(one, min_size=1, max_size=3)
    return one


ARGUMENTS = {
    name: action
    for name, action in sorted(_known_arguments()[0].items())
    if name not in ARCHITECTURE | OWNED.keys() | UNSUPPORTED.keys() | {"help"}
}
# Those of optimizer, schedule and batches are drawn as often as all the others: they depend on each other.
RELATED = [
    name
    for name in ARGUMENTS
    if name.startswith(
        ("lr", "min_lr", "adam", "sgd", "muon", "weight_decay", "start_w", "end_w", "loss_scale", "initial_l")
    )
    or name
    in (
        "optimizer",
        "fp16",
        "bf16",
        "train_samples",
        "train_iters",
        "global_batch_size",
        "micro_batch_size",
        "clip_grad",
    )
    or name
    in ("use_distributed_optimizer", "decoupled_lr", "decoupled_min_lr", "hysteresis", "eval_iters", "save_interval")
]


@examples(40)
@given(data=st.data())
def test_arguments_of_their_own_kind(folder, data):
    """Any three of Megatron's arguments, each with a value that its parser takes."""
    names = data.draw(
        st.lists(st.sampled_from(RELATED) | st.sampled_from(sorted(ARGUMENTS)), min_size=1, max_size=3, unique=True)
    )
    values = {name: data.draw(plausible(ARGUMENTS[name])) for name in names}
    shown = use(folder, RUN | {"megatron": RUN["megatron"] | values})
    assert shown is REFUSED or all(name in shown for name in values)


# What people write for a number, and what it is as YAML; None where it is none.
SPELLINGS = {
    "1e-3": 1e-3, "1.0e-3": 1e-3, ".001": 1e-3, "1E-3": 1e-3, "+1e-3": 1e-3, "0.001 # comment": 1e-3, "1_0e-4": 1e-3,
    '"1e-3"': None, "1,0e-3": None, "1e-3s": None, "!!float 1e-3": 1e-3, "!!str 1e-3": None, "~": None, "yes": None,
    "0x10": 16, "1:30": 90, "2001-01-01": None, "[1e-3]": None, "{a: 1e-3}": None, "&lr 1e-3": 1e-3, "*lr": None,
    ".inf": None, "-.nan": None, "1e-3\n  lr: 2e-3": None, "${oc.env:NOWHERE}": None, "${seed}": 7, "|\n  1e-3": None,
    "${missing}": None, "${": None, "'${seed}'": 7,
}  # fmt: skip


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_spellings_of_a_number(folder, spelled):
    """A learning rate is the number that was written, or is refused."""
    text = yaml.safe_dump({key: value for key, value in RUN.items() if key != "megatron"})
    rest = yaml.safe_dump({key: value for key, value in RUN["megatron"].items() if key not in ("lr", "min_lr")})
    text += "megatron:\n" + "".join(f"  {line}\n" for line in rest.splitlines()) + f"  lr: {spelled}\n"
    (folder / "run.yaml").write_text(text)
    shown = use(folder, text.encode())
    if shown is REFUSED:
        assert SPELLINGS[spelled] is None
    else:
        found = yaml.safe_load(shown.split("\n\n")[0])["megatron"]["lr"]
        assert SPELLINGS[spelled] is not None and float(found) == SPELLINGS[spelled]


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
        ({"model": RUN["model"] | {"num_hidden_layers": 10**18}}, "config.json num_hidden_layers"),
    ],
)
def test_found(folder, monkeypatch, change, field):
    monkeypatch.chdir(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN | change))
    with pytest.raises(UserError) as caught:
        dry_run(load_config(folder / "run.yaml"))
    assert caught.value.field == field
