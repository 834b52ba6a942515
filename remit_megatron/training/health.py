"""What ends a run whose steps teach nothing: no token counts, nothing is finite, no update is ever made.

Such a run looks like one that trains: its steps are quick, its weights do not change or are lost, its exit code is 0. A
restart reads the same reference, data and weights, so that the exit code is 70.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Steps in a row that are skipped and that no smaller loss scale can mend, or that have no gradient. One batch may
# overflow, ten do not.
_HOPELESS_STEPS = 10


@dataclass(frozen=True)
class StepOutcome:
    """One step, over the whole global batch.

    Attributes:
        iteration: counted from 1.
        tokens: that are not masked.
        counted: tokens in the loss's denominator.
        dropped: tokens that are not masked and have no finite score.
        lm_loss, objective_loss: in nats; NaN where the denominator is 0.
        grad_norm: None where the step was skipped.
        skipped: whether Megatron made no update, because of a gradient that is not finite or too large.
        loss_scale: that the gradients had been multiplied by; None without one.
    """

    iteration: int
    tokens: int
    counted: int
    dropped: int
    lm_loss: float
    objective_loss: float
    grad_norm: float | None
    skipped: bool
    loss_scale: float | None


class StepWatch:
    """Judges the steps of a run, one after the other, on a rank that knows them.

    Args:
        max_dropped: largest share of a step's tokens that may be dropped, 0 to 1 (`reference.max_dropped`).
        smallest_loss_scale: that a dynamic loss scale falls to; None where the scale is constant or there is none.
    """

    def __init__(self, *, max_dropped: float, smallest_loss_scale: float | None = None):
        self._max_dropped = max_dropped
        self._smallest = smallest_loss_scale
        self._hopeless = self._without_gradient = 0

    def fault(self, step: StepOutcome) -> str | None:
        """Why the run must not go on after this step, in one line, or None."""
        found = self._uncounted(step) or self._dropped(step) or self._not_finite(step) or self._never_mended(step)
        found = found or self._nothing_learnt(step)
        return None if found is None else f"step {step.iteration}: {found}"

    def _uncounted(self, step: StepOutcome) -> str | None:
        if step.counted:
            return None
        if not step.tokens:
            return (
                "found no token that counts, all are masked; expected some (data.mask_eod_loss masks what follows an "
                "end-of-document token)"
            )
        if step.dropped:
            return (
                f"found no token that counts, none of {step.dropped:,} has a finite score; expected finite scores: the "
                "weights of reference.checkpoint, or the scores in its cache, are not"
            )
        return f"found no token that counts of {step.tokens:,}; expected some (see objective)"

    def _dropped(self, step: StepOutcome) -> str | None:
        share = step.dropped / max(step.tokens, 1)
        if share <= self._max_dropped:
            return None
        return (
            f"found {dropped_share(step.dropped, step.tokens)} without a finite score of the reference; expected at "
            f"most {self._max_dropped:.2%} (reference.max_dropped)"
        )

    def _not_finite(self, step: StepOutcome) -> str | None:
        if step.skipped:
            return None
        if not math.isfinite(step.lm_loss):
            return f"found lm_loss {step.lm_loss}, the student's own loss; expected a finite one (init, megatron.lr)"
        if not math.isfinite(step.objective_loss):
            return (
                f"found objective_loss {step.objective_loss} with lm_loss {step.lm_loss:.4f}; expected a finite one: "
                "what the reference gives (reference.checkpoint) is not"
            )
        if step.grad_norm is not None and not math.isfinite(step.grad_norm):
            return f"found a gradient of norm {step.grad_norm}; expected a finite one (megatron.lr, megatron.bf16)"
        return None

    def _never_mended(self, step: StepOutcome) -> str | None:
        lowest = step.loss_scale is not None and (self._smallest is None or step.loss_scale <= self._smallest)
        hopeless = step.skipped and (lowest or not math.isfinite(step.lm_loss))
        self._hopeless = self._hopeless + 1 if hopeless else 0
        if self._hopeless < _HOPELESS_STEPS:
            return None
        return (
            f"found {self._hopeless} skipped steps in a row that no smaller loss scale mends (lm_loss "
            f"{step.lm_loss:.4f}, loss scale {step.loss_scale:g}); expected updates: megatron.bf16, or another init"
            if step.loss_scale is not None
            else f"found {self._hopeless} skipped steps in a row with lm_loss {step.lm_loss}; expected updates"
        )

    def _nothing_learnt(self, step: StepOutcome) -> str | None:
        self._without_gradient = self._without_gradient + 1 if step.grad_norm == 0 else 0
        if self._without_gradient < _HOPELESS_STEPS:
            return None
        return (
            f"found {self._without_gradient} steps in a row with a gradient of 0 (objective_loss "
            f"{step.objective_loss:.4g}); expected one (see objective, and whether reference.checkpoint is init)"
        )


def not_finite(chunks: Sequence[torch.nn.Module]) -> dict[str, int]:
    """How many numbers of this rank's weights are not finite, by the names of the parameters that have some."""
    found = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
                count = int((~torch.isfinite(parameter.detach())).sum())
                found |= {name: count} if count else {}
    return found


def dropped_share(dropped: int, tokens: int) -> str:
    """``12 of 256 tokens (4.69%)``."""
    return f"{dropped:,} of {tokens:,} tokens ({dropped / max(tokens, 1):.2%})"


def no_update(steps: int) -> str:
    """What is said of a run that is at its end and has never changed a weight."""
    return (
        f"found no update in {steps} steps, all were skipped or had a gradient or a learning rate of 0; expected at "
        "least one: a smaller megatron.initial_loss_scale, another objective or reference, or more steps, in another "
        "run_dir"
    )
