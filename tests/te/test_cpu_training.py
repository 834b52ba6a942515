"""Training on the CPU where Transformer Engine is installed, as in NVIDIA's image without a GPU: the local layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families import make_case
from tests.te.machine import activate
from tests.tiny import make_tokenizer, write_documents


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, Path]:
    from remit_megatron.data.build import build_dataset

    root = tmp_path_factory.mktemp("training")
    tokenizer = make_tokenizer(root / "tokenizer")
    documents = write_documents(root / "documents.jsonl", count=50, seed=3)
    build_dataset([str(documents)], tokenizer=str(tokenizer), output=str(root / "corpus"))
    return {"root": root, "model": make_case(root / "model", "olmo2-mha_untied", tokenizer=tokenizer)}


def train(path: str) -> None:
    """A run from its configuration."""
    activate()
    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train

    assert train(load_config(path)) == 0


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["adam", "distributed_adam"])
def test_a_run_on_the_cpu_beside_transformer_engine(pool, material, tmp_path, distributed_optimizer):
    config: dict[str, Any] = {
        "init": str(material["model"]),
        "objective": {"name": "ntp"},
        "data": {"train": str(material["root"] / "corpus"), "num_workers": 0},
        "megatron": {
            "seq_length": 32,
            "global_batch_size": 2,
            "train_iters": 3,
            "lr": 1e-2,
            "use_distributed_optimizer": distributed_optimizer,
            "log_params_norm": True,
        },
        "run_dir": str(tmp_path / "run"),
        "logging": {"tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    pool.run(train, world_size=1, path=str(tmp_path / "run.yaml"))
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["lm_loss"] for step in steps if "lm_loss" in step]
    assert len(losses) == 3 and losses[2] < losses[0]
