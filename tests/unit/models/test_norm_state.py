"""Norms of Transformer Engine keep their weights in checkpoints and nothing else, as the local ones do."""

from __future__ import annotations

from typing import Any

import torch

import patches

patches.apply()

from remit_megatron.models.norm import weights_only  # noqa: E402


class Norm(torch.nn.RMSNorm):
    """As Transformer Engine's: with state of quantizers, which it demands when it is loaded."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None or not state.numel()


def test_only_the_weight_is_written_and_asked_for():
    assert "0._extra_state" in torch.nn.Sequential(Norm(4)).state_dict()
    model = torch.nn.Sequential(weights_only(Norm)(4, eps=1e-6))
    assert model[0].eps == 1e-6 and list(model.state_dict()) == ["0.weight"]
    model.load_state_dict({"0.weight": torch.full((4,), 3.0)})
    assert model[0].weight.tolist() == [3.0] * 4
    model.load_state_dict({"0.weight": torch.ones(4), "0._extra_state": torch.empty(0, dtype=torch.uint8)})
    assert model[0].weight.tolist() == [1.0] * 4
