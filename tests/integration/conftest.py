"""A tiny model, a reference and token files, as the commands of a user would find them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_llama, make_tokenizer, write_documents

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> dict[str, Path]:
    """Directories and prefixes: tokenizer, student, reference; corpus and second to train on, heldout to validate."""
    from remit_megatron.data.build import build_dataset

    root = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer(root / "tokenizer")
    for name, seed in (("corpus", 3), ("second", 4), ("heldout", 5)):
        documents = write_documents(root / f"{name}.jsonl", count=300, seed=seed)
        build_dataset([str(documents)], tokenizer=str(tokenizer), output=str(root / name))
    return {
        "root": root,
        "tokenizer": tokenizer,
        "student": make_llama(root / "student", seed=1, tokenizer=tokenizer),
        "reference": make_llama(root / "reference", seed=2, tokenizer=tokenizer),
        "corpus": root / "corpus",
        "second": root / "second",
        "heldout": root / "heldout",
    }


@pytest.fixture(scope="session")
def config_for(material) -> Callable[..., dict[str, Any]]:
    """Builds the configuration of a small run; keywords replace values of its ``megatron`` section."""

    def build(run_dir: Path, *, objective: dict[str, Any] | None = None, **megatron: Any) -> dict[str, Any]:
        return {
            "init": str(material["student"]),
            "objective": objective or {"name": "remit"},
            "reference": {"checkpoint": str(material["reference"])},
            "data": {
                "train": [[3.0, str(material["corpus"])], [1.0, str(material["second"])]],
                "valid": [[1.0, str(material["heldout"])]],
                "tokenizer": str(material["tokenizer"]),
                "document_mask": True,
            },
            "megatron": {
                "seq_length": 64,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "train_iters": 6,
                "lr": 1e-3,
                "min_lr": 1e-5,
                "save_interval": 2,
                "eval_interval": 3,
                "eval_iters": 2,
            }
            | megatron,
            "run_dir": str(run_dir),
        }

    return build


@pytest.fixture(scope="session")
def remit() -> Callable[..., subprocess.CompletedProcess]:
    """Runs ``remit …`` as a user does; gives exit code and what it printed."""

    def run(*words: object, timeout: float = 240, **kwargs: Any) -> subprocess.CompletedProcess:
        environment = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        }
        environment["PYTHONPATH"] = str(REPOSITORY)
        command = [sys.executable, "-m", "remit_megatron", *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=REPOSITORY, **kwargs
        )

    return run


def write(path: Path, config: dict[str, Any]) -> Path:
    """Writes a configuration file (JSON is YAML)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path
