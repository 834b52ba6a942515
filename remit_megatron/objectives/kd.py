"""Knowledge distillation (ReMiT, Eq. 12): the student's distribution is drawn to the reference's, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remit_megatron.kernels.kl_divergence import distillation_loss
from remit_megatron.objectives.contract import ObjectiveResult, ReferenceSignal
from remit_megatron.runtime.errors import UserError

# Beyond them T^2 times the divergence is more rounding than divergence: off by 0.002 nats of a token at 100, by 0.1 at
# 1,000, and its gradient is 0 in the end.
TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True)
class Distillation:
    """loss = sum over the global batch of (1 - r) T^2 KL(p_ref || p_student) + r L(x_t) / number of counted tokens.

    The divergence is over the whole vocabulary, of softmax(logits / T) on both sides. With T = 1 and r = 0 it is Eq. 12
    (which leaves out the reference's entropy, a constant: the gradient is the same). T^2 is the usual factor that keeps
    the size of the gradient when T changes, and with it the meaning of r.

    Attributes:
        temperature: T, 0.01 to 100.
        ntp_weight: r, the share of next-token prediction, 0 to 1.
    """

    temperature: float = 1.0
    ntp_weight: float = 0.0

    reference_signal: ClassVar[ReferenceSignal] = "hidden"
    needs_global_batch = False
    by_sequence = False  # it needs the logits, which do not exist there

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        if not low <= self.temperature <= high:
            expected = f"a number above 0: {low:g} to {high:g}, where float32 holds the divergence"
            raise UserError("objective.temperature", self.temperature, expected)
        if not 0 <= self.ntp_weight <= 1:
            raise UserError("objective.ntp_weight", self.ntp_weight, "a number from 0 to 1")

    def token_losses(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        reference_hidden: Tensor,
        reference_weight: Tensor,
        loss_mask: Tensor,
        vocab_size: int,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        return distillation_loss(
            logits,
            labels,
            reference_hidden,
            reference_weight,
            temperature=self.temperature,
            ntp_weight=self.ntp_weight,
            loss_mask=loss_mask,
            vocab_size=vocab_size,
            tp_group=tp_group,
        )

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
        return ObjectiveResult(torch.where(counted, student_loss, 0.0).sum(), counted.sum())
