"""ReMiT (Eq. 3-6): tokens that the reference finds more likely than the student does weigh more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remit_megatron.objectives.contract import ObjectiveResult, ReferenceSignal
from remit_megatron.objectives.weights import CENTERINGS, weighted_loss
from remit_megatron.runtime.errors import UserError


@dataclass(frozen=True)
class ReMiT:
    """loss = sum over the global batch of w_t L(x_t) / number of counted tokens, w_t from :func:`token_weights`.

    Attributes:
        epsilon: weights lie in [1 - epsilon, 1 + epsilon]; None does not clip; 0 is next-token prediction.
        centering: what the difference of the losses is centered over: "sequence", "document" or "none".
    """

    epsilon: float | None = 0.2
    centering: str = "sequence"

    reference_signal: ClassVar[ReferenceSignal] = "loss"
    needs_global_batch = False
    by_sequence = True

    def __post_init__(self) -> None:
        if self.epsilon is not None and not 0 <= self.epsilon <= 1:
            raise UserError("objective.epsilon", self.epsilon, "a number from 0 to 1, or null for no clip")
        if self.centering not in CENTERINGS:
            raise UserError("objective.centering", self.centering, f"one of {', '.join(CENTERINGS)}")

    def __call__(
        self,
        student_loss: Tensor,
        loss_mask: Tensor,
        *,
        reference_loss: Tensor | None = None,
        document_ids: Tensor | None = None,
        order: Tensor | None = None,
        selected: Tensor | None = None,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> ObjectiveResult:
        assert reference_loss is not None, "the schedule attaches scores to every microbatch"
        return weighted_loss(
            student_loss,
            reference_loss,
            loss_mask,
            epsilon=self.epsilon,
            centering=self.centering,
            document_ids=document_ids,
            cp_group=cp_group,
        )
