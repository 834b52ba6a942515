"""One Slurm for all tests of this folder, and runs that are small enough for it.

Collected only where REMIT_CLUSTER is set, as scripts/test_cluster.sh does: these tests need Slurm's programs.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Cluster
from tests.tiny import make_llama, make_tokenizer, write_documents

if not os.environ.get("REMIT_CLUSTER"):
    collect_ignore_glob = ["test_*.py"]

STEPS = 60
SAVE_INTERVAL = 20


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, up."""
    # Not pytest's own folder: the path of a socket has at most 107 characters. test_cluster.sh names one, and ends
    # its daemons where pytest was killed.
    folder = Path(os.environ.get("REMIT_CLUSTER_FOLDER") or tempfile.mkdtemp(prefix="remit-slurm-"))
    cluster = Cluster(folder)
    # Also for a pytest that is told to end: daemons must not stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_job_is_left(cluster: Cluster) -> Iterator[None]:
    """A test that failed must not hold the nodes."""
    yield
    cluster.clear()


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> dict[str, Path]:
    """Directories and prefixes: tokenizer, student, reference, corpus; two layers each, made in a second."""
    from remit_megatron.data.build import build_dataset

    root = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer(root / "tokenizer")
    documents = write_documents(root / "corpus.jsonl", count=2000, seed=3)
    build_dataset([str(documents)], tokenizer=str(tokenizer), output=str(root / "corpus"))
    small = {"num_hidden_layers": 2, "tokenizer": tokenizer}
    return {
        "tokenizer": tokenizer,
        "student": make_llama(root / "student", seed=1, **small),
        "reference": make_llama(root / "reference", seed=2, **small),
        "corpus": root / "corpus",
    }


@pytest.fixture(scope="session")
def config_for(material) -> Callable[..., dict[str, Any]]:
    """Configuration of a run on TP2 x DP2; keywords replace values of its ``megatron`` section."""

    def build(run_dir: Path, **megatron: Any) -> dict[str, Any]:
        return {
            "init": str(material["student"]),
            "objective": {"name": "remit"},
            "reference": {"checkpoint": str(material["reference"])},
            "data": {
                "train": [[1.0, str(material["corpus"])]],
                "tokenizer": str(material["tokenizer"]),
                # A data worker beside each of four ranks is too much for two cores.
                "num_workers": 0,
            },
            "megatron": {
                "tensor_model_parallel_size": 2,
                "seq_length": 64,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "train_iters": STEPS,
                "lr": 1e-3,
                "min_lr": 1e-5,
                "save_interval": SAVE_INTERVAL,
                "eval_iters": 0,
            }
            | megatron,
            "run_dir": str(run_dir),
            "logging": {"interval": 10},
        }

    return build
