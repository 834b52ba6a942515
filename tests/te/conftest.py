"""Tests against the real Transformer Engine, on a CPU: ./scripts/te_on_cpu.sh makes the environment and runs them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest


def _installed() -> bool:
    """Whether the library is here; it is not imported, which takes seconds."""
    try:
        importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="session", autouse=True)
def transformer_engine() -> None:
    """Skips every test of this folder, by name, where the library is not installed."""
    if not _installed():
        pytest.skip("Transformer Engine is not installed (./scripts/te_on_cpu.sh DIR brings it)")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """A random model of every case, on disk."""
    from tests.families import CASES, make_case

    root = tmp_path_factory.mktemp("models")
    return {case: make_case(root / case, case, seed=seed) for seed, case in enumerate(CASES)}
