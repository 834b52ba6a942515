"""A tiny model for post-training, and TRL imported once for the children of a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.posttrain_runs import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trl_once() -> None:
    """What the children of this process have then, without importing it each."""
    import remit_megatron.posttrain.trl_trainers  # noqa: F401
