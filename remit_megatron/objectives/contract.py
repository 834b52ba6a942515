"""What an objective receives and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

# What an objective wants to know of the reference: nothing, its loss of every token, or its final hidden states.
ReferenceSignal = Literal["none", "loss", "hidden"]


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
        reference_signal: what must be had of the reference: "none", "loss" (``reference_loss`` of every call), or
            "hidden" (then the objective is a `DistributionObjective`).
    """

    reference_signal: ClassVar[ReferenceSignal]

    @property
    def needs_global_batch(self) -> bool:
        """Whether the losses of all microbatches must be known before the first backward (then the objective is a
        `SelectingObjective`). It costs one more forward pass of the student."""
        ...

    @property
    def by_sequence(self) -> bool:
        """Whether the result of a microbatch is the sum of those of its sequences, each taken alone (with its other
        parts on ``cp_group``)."""
        ...

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
        """Computes the loss of one microbatch.

        Args:
            student_loss: [b, s] float32, negative log-likelihood in nats, or what ``token_losses`` made; carries the
                gradient.
            loss_mask: [b, s], tokens with a value above 0 count.
            reference_loss: [b, s] float32, the reference's negative log-likelihood of the same tokens.
            document_ids: [b, s] int64, equal within a document of a sequence.
            order: [b, s] int64, where each token stands: growing along a sequence and from one to the next, without
                repetition over the whole microbatch, and the same under every parallel layout.
            selected: [b, s] bool, what ``select`` gave for this microbatch.
            cp_group: ranks that hold the other parts of these sequences, or None.
        """
        ...


@runtime_checkable
class DistributionObjective(Objective, Protocol):
    """An objective that compares whole distributions: it sees the logits, before they are one number per token."""

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
        """Two losses per token: what is minimized, and next-token prediction's for the log.

        Args:
            logits: [s, b, V] the student's, this rank's columns of the vocabulary; backward may overwrite them.
            labels, loss_mask: [s, b].
            reference_hidden: [s, b, h] the reference's final hidden states.
            reference_weight: [V, h] this rank's rows of the reference's output weight.
            vocab_size: true size of the vocabulary, without padding.
            tp_group: ranks that hold the vocabulary, or None.

        Returns:
            [s, b] float32, differentiable, which becomes the ``student_loss`` of the call; and [s, b] float32 negative
            log-likelihood in nats without gradient. Both 0 where the mask is.
        """
        ...


@dataclass
class ScoredTokens:
    """One microbatch of the global batch as ``select`` sees it; the fields are those of the call."""

    student_loss: Tensor
    reference_loss: Tensor
    loss_mask: Tensor
    order: Tensor  # without repetition over the whole global batch


@runtime_checkable
class SelectingObjective(Objective, Protocol):
    """An objective that chooses among all tokens of the global batch."""

    def select(
        self, microbatches: Sequence[ScoredTokens], *, group: torch.distributed.ProcessGroup | None = None
    ) -> list[Tensor]:
        """Which tokens are chosen: a [b, s] bool for each of this rank's microbatches.

        Args:
            microbatches: all of this rank's microbatches of the step.
            group: ranks that hold the rest of the global batch (data and context parallel), or None.
        """
        ...
