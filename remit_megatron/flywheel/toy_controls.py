"""Objectives of the study alone: controls that nobody should train with.

They are registered in the child that trains with them, so that no configuration of a user can name one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from remit_megatron.objectives import REGISTRY
from remit_megatron.objectives.remit import ReMiT

SHUFFLED = "remit_shuffled"


@dataclass(frozen=True)
class Shuffled(ReMiT):
    """``remit`` with the reference's scores dealt out at random among the counted tokens of a microbatch.

    The weights' distribution stays about what it was; which token gets which does not depend on the token.
    """

    def __call__(self, student_loss: torch.Tensor, loss_mask: torch.Tensor, **others: Any):
        reference = others["reference_loss"]
        counted = (loss_mask > 0) & torch.isfinite(reference)
        # The difference of the losses decides a weight, so it is what is dealt out.
        difference = student_loss.detach() - reference
        dealt = difference.clone()
        values = difference[counted]
        # Seeded by the microbatch itself, so that a run that is repeated gives the same weights.
        generator = torch.Generator().manual_seed(int(values.double().sum().abs().item() * 1e6) % 2**31)
        dealt[counted] = values[torch.randperm(len(values), generator=generator)]
        others["reference_loss"] = student_loss.detach() - dealt
        return super().__call__(student_loss, loss_mask, **others)


_CONTROLS: dict[str, type] = {SHUFFLED: Shuffled}


def register(name: str) -> None:
    """Makes a control known to this process as an objective."""
    assert dataclasses.is_dataclass(_CONTROLS[name])
    REGISTRY[name] = _CONTROLS[name]
