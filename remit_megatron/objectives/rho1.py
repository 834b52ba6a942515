"""RHO-1 (arXiv 2404.07965): next-token prediction on those tokens only where the student is furthest behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from remit_megatron.objectives.contract import ObjectiveResult, ReferenceSignal, ScoredTokens
from remit_megatron.objectives.selection import select_global, select_rows, selection_keys
from remit_megatron.runtime.errors import UserError

SCOPES = ("micro_batch", "sequence", "global_batch")


@dataclass(frozen=True)
class Rho1:
    """loss = sum of L_student over the kept tokens / number of kept tokens.

    Kept is the share ``keep`` of the counted tokens with the largest excess loss L_student - L_ref, computed anew in
    every step. Of n counted tokens keep * n are kept, rounded half up, and at least one of any; of equal excess losses
    the earlier tokens'. Tokens without a finite reference loss are dropped first.

    Attributes:
        keep: share of the tokens that is kept, above 0 and at most 1.
        scope: what tokens are ranked with. "sequence": with those of their sequence; "micro_batch": with those of their
            microbatch; both over all context-parallel ranks, at no cost. "global_batch": with all tokens of the step,
            exactly, over all microbatches and ranks. The threshold must then be known before the first backward, so
            that every step runs the student forward twice. Both passes see the same losses, as nothing is dropped out.
    """

    keep: float = 0.8
    scope: str = "sequence"

    reference_signal: ClassVar[ReferenceSignal] = "loss"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError("objective.keep", self.keep, "a number above 0 and at most 1")
        if self.scope not in SCOPES:
            raise UserError("objective.scope", self.scope, f"one of {', '.join(SCOPES)}")

    @property
    def needs_global_batch(self) -> bool:
        return self.scope == "global_batch"

    @property
    def by_sequence(self) -> bool:
        return self.scope != "micro_batch"  # a selection from the global batch is made before

    @torch.no_grad()
    def select(
        self, microbatches: Sequence[ScoredTokens], *, group: torch.distributed.ProcessGroup | None = None
    ) -> list[Tensor]:
        """The kept tokens of each microbatch, [b, s] bool, among all of ``group``."""
        return select_global([_keys(m) for m in microbatches], self.keep, group=group)

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
        assert reference_loss is not None and order is not None, "the schedule attaches scores to every microbatch"
        with torch.no_grad():
            if self.scope == "global_batch":
                assert selected is not None, "the schedule attaches the selection to every microbatch"
                kept = selected
            else:
                keys = _keys(ScoredTokens(student_loss, reference_loss, loss_mask, order))
                rows = keys if self.scope == "sequence" else keys.view(1, -1)
                kept = select_rows(rows, self.keep, group=cp_group).view_as(keys)
            delta = torch.where(kept, student_loss.double() - reference_loss.double(), 0.0)
            dropped = (loss_mask > 0) & ~reference_loss.isfinite()
        return ObjectiveResult(
            loss_sum=torch.where(kept, student_loss, 0.0).sum(),
            counted=kept.sum(),
            statistics={
                "delta": delta.sum().float(),
                "delta_squared": delta.square().sum().float(),
                "dropped_tokens": dropped.sum().float(),
            },
        )


def _keys(tokens: ScoredTokens) -> Tensor:
    counted = (tokens.loss_mask > 0) & tokens.reference_loss.isfinite()
    return selection_keys(tokens.student_loss.float() - tokens.reference_loss.float(), tokens.order, counted)
