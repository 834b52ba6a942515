"""Fixtures of the tests of `remit plan`."""

from __future__ import annotations

import pytest


@pytest.fixture
def without_transformer_engine(monkeypatch):
    monkeypatch.setattr("remit_megatron.models.spec.transformer_engine_usable", lambda: False)
