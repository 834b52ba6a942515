"""What a run's first steps say of its reference, in one line: the short form of ``remit check reference``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from remit_megatron.scoring.guidance import FLAT

STEPS = 10
# Nats a token. Two models apart are 1e-4 and more; of one model in float32 rounding leaves 1e-7.
_EQUAL = 1e-5
# Two-sided 95% quantiles of Student's t with 1 to STEPS - 1 degrees of freedom.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class FirstLook:
    """Gathers the first steps of a start of a run; says one thing, once.

    Args:
        steps: of the whole run; a run of fewer than :data:`STEPS` is looked at for as long as it is.
        selects: whether the objective keeps some tokens and leaves others out. It has no weights, and of kept tokens
            the reference is always ahead: nothing but a difference that is the same everywhere is said then.
    """

    def __init__(self, *, steps: int = STEPS, selects: bool = False):
        self._steps = max(2, min(STEPS, steps))
        self._selects = selects
        self._records: list[tuple[float, float]] = []

    def add(self, record: Mapping[str, Any]) -> str | None:
        """Takes a line of metrics.jsonl; the sentence when there are enough of them, else None."""
        if len(self._records) >= self._steps or record.get("delta_mean") is None:
            return None
        # A difference moves a weight by half of it.
        spread = record["delta_std"] / 2 if self._selects else record["weight_std"]
        self._records.append((record["delta_mean"], spread))
        return self._sentence() if len(self._records) == self._steps else None

    def _sentence(self) -> str | None:
        count = len(self._records)
        deltas = [delta for delta, _ in self._records]
        spread = sum(std for _, std in self._records) / count
        if self._selects:
            if spread >= FLAT:
                return None
            found = f"spread of the loss difference {2 * spread:.3f} nats in {count} steps"
            return f"warning: student and reference hardly differ ({found}): which tokens are kept is next to chance"
        mean = sum(deltas) / count
        error = math.sqrt(sum((delta - mean) ** 2 for delta in deltas) / (count - 1) / count)
        clear = _QUANTILES[count - 2] * error
        what = f"{abs(mean):.3f} nats a token of the training text in {count} steps, spread of the weights {spread:.3f}"
        if spread < FLAT:
            return f"warning: the weights hardly differ from 1 ({what}): this run is next-token prediction"
        if mean > clear:
            return f"the reference is ahead of the student by {what}"
        if mean < -clear:
            return (
                f"warning: the reference is behind the student by {what}; unless this text is what the reference has "
                "learnt to do better than, it teaches what it knows less of: see remit check reference"
            )
        return f"warning: the reference is neither ahead of the student nor behind ({what}): see remit check reference"


def nothing_to_distill(record: Mapping[str, Any], *, ntp_weight: float) -> str | None:
    """A warning where the first step of `kd` finds the two models' distributions equal, else None.

    Args:
        record: a line of metrics.jsonl.
        ntp_weight: share of next-token prediction in the objective's loss.
    """
    divergence = record["objective_loss"] - ntp_weight * record["lm_loss"]
    if ntp_weight == 1 or not abs(divergence) < (1 - ntp_weight) * _EQUAL:
        return None
    return (
        f"warning: the student's distributions are the reference's (divergence {divergence:.1g} nats a token): there "
        "is nothing to distill; is reference.checkpoint the model of init?"
    )
