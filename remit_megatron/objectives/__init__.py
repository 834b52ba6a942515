"""Objectives: per-token losses (and reference scores) to one loss sum. Plain torch.

    from remit_megatron.objectives import token_weights
    w = token_weights(student_loss, reference_loss, loss_mask, epsilon=0.2)

To add one: a file with a dataclass that has the members of :class:`Objective`, and a line in ``REGISTRY``. Its fields
are keys of the configuration's ``objective`` section.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from remit_megatron.objectives.chunks import ChunkedObjective
from remit_megatron.objectives.contract import (
    DistributionObjective,
    Objective,
    ObjectiveResult,
    ScoredTokens,
    SelectingObjective,
)
from remit_megatron.objectives.kd import Distillation
from remit_megatron.objectives.ntp import NextTokenPrediction
from remit_megatron.objectives.remit import ReMiT
from remit_megatron.objectives.rho1 import Rho1
from remit_megatron.objectives.weights import token_weights, weight_error_bound
from remit_megatron.runtime.errors import UserError

__all__ = [
    "REGISTRY",
    "ChunkedObjective",
    "DistributionObjective",
    "Objective",
    "ObjectiveResult",
    "ScoredTokens",
    "SelectingObjective",
    "build_objective",
    "settings_of",
    "token_weights",
    "weight_error_bound",
]

REGISTRY: dict[str, type[Objective]] = {
    "kd": Distillation,
    "ntp": NextTokenPrediction,
    "remit": ReMiT,
    "rho1": Rho1,
}


def settings_of(name: str) -> tuple[str, ...]:
    """Names of the settings that the objective ``name`` takes.

    Raises:
        UserError: the name is not registered.
    """
    return tuple(item.name for item in dataclasses.fields(_registered(name)))  # type: ignore[arg-type]


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective ``name`` with the settings of the configuration's ``objective`` section that it knows.

    Raises:
        UserError: the name is not registered, or a setting is out of range.
    """
    return _registered(name)(**settings)


def _registered(name: str) -> type[Objective]:
    if name not in REGISTRY:
        raise UserError("objective.name", name, f"one of {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name]
