"""Plain next-token prediction (Eq. 2): the mean loss of the tokens that are not masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remit_megatron.objectives.contract import ObjectiveResult, ReferenceSignal


@dataclass(frozen=True)
class NextTokenPrediction:
    """loss = sum over the global batch of L(x_t) / number of counted tokens."""

    reference_signal: ClassVar[ReferenceSignal] = "none"
    needs_global_batch = False
    by_sequence = True

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
        counted = loss_mask > 0
        # where, not a product: a masked token's loss may be anything, and 0 * inf would be nan.
        loss_sum = torch.where(counted, student_loss, 0.0).sum()
        return ObjectiveResult(loss_sum, counted.sum())
