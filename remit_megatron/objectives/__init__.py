"""Objectives: per-token losses (and reference scores) to one loss sum. Plain torch.

    from remit_megatron.objectives import token_weights
    w = token_weights(student_loss, reference_loss, loss_mask, epsilon=0.2)

To add one: a file with a class that has the members of :class:`Objective`, and a line in ``REGISTRY``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from remit_megatron.errors import UserError
from remit_megatron.objectives.contract import Objective, ObjectiveResult
from remit_megatron.objectives.ntp import NextTokenPrediction
from remit_megatron.objectives.remit import ReMiT
from remit_megatron.objectives.weights import token_weights

__all__ = ["REGISTRY", "Objective", "ObjectiveResult", "build_objective", "token_weights"]

REGISTRY: dict[str, Callable[..., Objective]] = {
    "ntp": NextTokenPrediction,
    "remit": ReMiT,
}


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective ``name`` with the settings of the configuration's ``objective`` section that it knows.

    Raises:
        UserError: the name is not registered.
    """
    if name not in REGISTRY:
        raise UserError("objective.name", name, f"one of {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name](**settings)
