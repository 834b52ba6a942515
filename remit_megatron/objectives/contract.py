"""What an objective receives and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class ObjectiveResult:
    """The loss of one microbatch, as sums, so that microbatches and ranks add up.

    Attributes:
        loss_sum: [] float32, sum over the counted tokens of weight times loss; differentiable.
        counted: [] int64, tokens in the denominator. The step's loss is the sum over the global batch of ``loss_sum``
            divided by the sum of ``counted`` (design: the denominator counts tokens, it is not the sum of weights).
        statistics: name -> [] float32 sums over the counted tokens, without gradient: ``weight_excess`` (w - 1),
            ``weight_excess_squared``, ``weight_clipped_low``, ``weight_clipped_high`` (counts), ``delta``,
            ``delta_squared``, ``dropped_tokens`` (a count of tokens that are not counted for want of a score).
            A missing name stands for zero.
    """

    loss_sum: Tensor
    counted: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Turns per-token losses into one sum.

    Attributes:
        needs_reference: whether ``reference_loss`` must be given.
    """

    needs_reference: bool

    def __call__(
        self,
        student_loss: Tensor,
        loss_mask: Tensor,
        *,
        reference_loss: Tensor | None = None,
        document_ids: Tensor | None = None,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> ObjectiveResult:
        """Computes the loss of one microbatch.

        Args:
            student_loss: [b, s] float32, negative log-likelihood in nats; carries the gradient.
            loss_mask: [b, s], tokens with a value above 0 count.
            reference_loss: [b, s] float32, the reference's negative log-likelihood of the same tokens.
            document_ids: [b, s] int64, equal within a document of a sequence.
            cp_group: ranks that hold the other parts of these sequences, or None.
        """
        ...
