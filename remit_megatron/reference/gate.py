"""A cheaper reference behind a gate: it scores for the run once its scores have been measured beside the true ones.

    step 1 .. batches   both score; the run gets the trusted scores; the error of the weights adds up
    afterwards          the candidate alone where the mean error is within the tolerance, else the trusted one

The loser is let go at that moment: both are in memory during the first steps only. Nothing here knows what makes the
candidate cheaper; FP8 weights do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch import distributed as dist

from remit_megatron.models.forward import Item, ModelForward
from remit_megatron.reference.source import Schedule, ScoreSource
from remit_megatron.runtime.parallel import gather_objects


class WeightError(Protocol):
    """Error of the weights of a microbatch: :func:`remit_megatron.objectives.weight_error_bound` with its settings."""

    def __call__(
        self,
        reference_loss: Tensor,
        other_loss: Tensor,
        loss_mask: Tensor,
        /,
        *,
        document_ids: Tensor | None,
        cp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """[b, s] scores of both references to the sum over the counted tokens, and their number."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What was measured.

    Attributes:
        accepted: whether the candidate scores from now on.
        weight_error: mean over the counted tokens of all measured steps and ranks.
        tokens: how many tokens that were.
        batches: how many steps.
        tolerance: the largest mean that is accepted.
    """

    accepted: bool
    weight_error: float
    tokens: int
    batches: int
    tolerance: float


def verdict_line(verdict: Verdict, precision: str) -> str:
    """One line about a verdict, for people."""
    steps = f"{verdict.tokens:,} tokens of {verdict.batches} step{'s' * (verdict.batches != 1)}"
    measured = f"{verdict.weight_error:.2g} on average ({steps}; limit {verdict.tolerance:g})"
    if verdict.accepted:
        return f"reference: {precision} from here on: token weights differ by at most {measured}"
    return f"reference: {precision} is not used: token weights might differ by {measured}"


class PrecisionGate:
    """A score source that starts as ``trusted`` and becomes ``candidate`` if that one's scores are good enough.

    Args:
        candidate: the cheaper source.
        trusted: the one it is measured by. Both give losses, not hidden states.
        forward: turns items into batches, for masks and documents.
        error: gives the error of the weights of one microbatch.
        batches: steps to measure; 1 or more.
        tolerance: the largest mean error of the weights that is accepted.
        report: receives the verdict, once, on every rank.
    """

    def __init__(
        self,
        candidate: ScoreSource,
        trusted: ScoreSource,
        *,
        forward: ModelForward,
        error: WeightError,
        batches: int = 4,
        tolerance: float = 0.005,
        report: Callable[[Verdict], None] | None = None,
    ):
        if batches < 1:
            raise ValueError(f"batches: found {batches}; expected 1 or more")
        if not tolerance >= 0:
            raise ValueError(f"tolerance: found {tolerance}; expected 0 or more")
        self._candidate: ScoreSource | None = candidate
        self._trusted: ScoreSource | None = trusted
        self._forward = forward
        self._error = error
        self._batches = batches
        self._tolerance = tolerance
        self._report = report
        self._measured = 0
        self._sum, self._tokens = 0.0, 0
        self.verdict: Verdict | None = None

    def score(self, schedule: Schedule, buffers: list[list[Item]], **settings: Any) -> list[Tensor]:
        """See :meth:`ScoreSource.score`."""
        if self._candidate is None or self._trusted is None:
            source = self._trusted or self._candidate
            assert source is not None
            return source.score(schedule, buffers, **settings)
        scores = self._trusted.score(schedule, buffers, **settings)
        others = self._candidate.score(schedule, buffers, **settings)
        self._measure(buffers[-1], scores, others)
        if self._measured == self._batches:
            self._decide()
        return scores

    def figures(self) -> dict[str, Any]:
        """For the log: ``reference_fp8``, how things stand after the step (``measuring``, ``accepted``, ``rejected``),
        and ``reference_weight_error``, the mean over the measured steps."""
        state = "measuring" if self.verdict is None else "accepted" if self.verdict.accepted else "rejected"
        return {"reference_fp8": state, "reference_weight_error": self._error_so_far()}

    def _error_so_far(self) -> float | None:
        return self._sum / self._tokens if self._tokens else None

    def _measure(self, items: list[Item], scores: list[Tensor], others: list[Tensor]) -> None:
        groups = self._forward.groups
        cp_group = groups.cp if groups.cp.size() > 1 else None
        total, tokens = 0.0, 0
        for item, score, other in zip(items, scores, others, strict=True) if scores else ():
            batch = self._forward.batch(item)
            error, counted = self._error(
                score, other, batch.loss_mask, document_ids=batch.document_ids, cp_group=cp_group
            )
            total, tokens = total + error.double(), tokens + counted
        # Every rank adds the same numbers in the same order: all come to the same verdict, or they would wait for each
        # other in different models. Tensor-parallel ranks have the same scores, which leaves the mean as it is.
        for part, count in gather_objects((float(total), int(tokens))):
            self._sum, self._tokens = self._sum + part, self._tokens + count
        self._measured += 1

    def _decide(self) -> None:
        so_far = self._error_so_far()
        error = math.inf if so_far is None else so_far
        accepted = error <= self._tolerance
        tokens = self._tokens // self._forward.groups.tp.size()
        self.verdict = Verdict(accepted, error, tokens, self._measured, self._tolerance)
        if accepted:
            self._trusted = None
        else:
            self._candidate = None
        if self._report is not None:
            self._report(self.verdict)
