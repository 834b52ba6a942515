"""Our divergence beside that of TRL, ModelOpt and DistillKit: divergence.json holds numbers that their code gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from remit_megatron.kernels.kl_divergence import distillation_loss

GOLDEN = json.loads((Path(__file__).parent / "divergence.json").read_text())
TEMPERATURES = ("1.0", "2.0", "0.5")


def ours(temperature: float) -> torch.Tensor:
    """[2, 3] c^2 KL, of a reference whose hidden states are its logits."""
    student, teacher = torch.tensor(GOLDEN["student"]), torch.tensor(GOLDEN["teacher"])
    labels = torch.zeros(student.shape[:2], dtype=torch.int64)
    loss, _ = distillation_loss(student, labels, teacher, torch.eye(student.shape[-1]), temperature=temperature)
    return loss


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_modelopt(temperature):
    expected = torch.tensor(GOLDEN["peers"]["modelopt"]["values"][temperature])
    torch.testing.assert_close(ours(float(temperature)), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_trl(temperature):
    found = ours(float(temperature)).sum().item() / float(temperature) ** 2
    assert found == pytest.approx(GOLDEN["peers"]["trl"]["values"][temperature], rel=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_distillkit(temperature):
    found = ours(float(temperature)).mean().item()
    assert found == pytest.approx(GOLDEN["peers"]["distillkit"]["values"][temperature], rel=2e-6)


def test_the_file_says_where_it_comes_from():
    assert all(peer["source"] and peer["what"] for peer in GOLDEN["peers"].values())
    assert len({peer["source"] for peer in GOLDEN["peers"].values()}) == 3
