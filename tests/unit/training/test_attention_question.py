"""The engine asks its attention about packed documents once, before the first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from remit_megatron.runtime.errors import DoNotRestart
from remit_megatron.training import engine as module
from remit_megatron.training.engine import Engine


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the attention was asked for; the second rank of two finds a fault in a model of that name."""
    models: list[Any] = []
    monkeypatch.setattr(module, "packed_attention_fault", models.append)
    gathered: list[Any] = []

    def gather(own: Any) -> list[Any]:
        gathered.append(own)
        asking = len(gathered) % 2 == 1  # whether it went well on all ranks; then what they have found
        return [own, None if asking or models[-1] != ["wrong"] else "the other rank's fault"]

    monkeypatch.setattr(module.parallel, "gather_objects", gather)
    return models


def before_step(engine: Any, model: list[str]) -> None:
    schedule = SimpleNamespace(step=lambda increment: None)
    engine.before_step(model, SimpleNamespace(param_groups=[{"lr": 0.5, "default_config": True}]), schedule)


def engine_with(*, known: bool) -> Any:
    engine: Any = Engine.__new__(Engine)
    engine._attention_is_known, engine._spikes = known, None
    return engine


def test_once_in_a_start(asked):
    engine = engine_with(known=False)
    for _ in range(3):
        before_step(engine, ["right"])
    assert asked == [["right"]]


def test_not_without_packed_documents(asked):
    before_step(engine_with(known=True), ["wrong"])
    assert asked == []


def test_a_fault_of_any_rank_ends_the_run_on_all(asked):
    with pytest.raises(DoNotRestart, match="the other rank's fault"):
        before_step(engine_with(known=False), ["wrong"])
