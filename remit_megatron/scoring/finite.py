"""How many tokens a reference could not score. A few are dropped by a run; many mean that the reference is broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remit_megatron.reference.cache import ReferenceCache

_LOOKED_AT = 4096  # samples that were scored before; all of a small cache


@dataclass(frozen=True)
class Scored:
    """Tokens of samples.

    Attributes:
        tokens: all of them.
        not_finite: those whose score is not finite.
    """

    tokens: int = 0
    not_finite: int = 0

    def __add__(self, other: Scored) -> Scored:
        return Scored(self.tokens + other.tokens, self.not_finite + other.not_finite)

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.not_finite / max(self.tokens, 1)

    def __str__(self) -> str:
        return f"{self.not_finite:,} of {self.tokens:,} tokens ({self.share:.2%}) without a finite score"

    def fault(self, limit: float) -> str | None:
        """What is said where more than ``limit`` of the tokens are not finite."""
        if self.share <= limit:
            return None
        return f"found {self}; expected at most {limit:.2%} (reference.max_dropped); see reference.checkpoint"


def look_at(cache: ReferenceCache, names: Sequence[str], samples: Sequence[np.ndarray]) -> Scored:
    """Counts the scores of samples that a cache has; of more than 4096 of them, of as many drawn at random.

    Args:
        cache: to be read.
        names: identities of its data sets.
        samples: of each, int64.
    """
    places = [(name, sample) for name, members in zip(names, samples, strict=True) for sample in members.tolist()]
    if len(places) > _LOOKED_AT:
        drawn = np.random.default_rng(0).choice(len(places), size=_LOOKED_AT, replace=False)
        places = [places[number] for number in drawn.tolist()]
    tokens = not_finite = 0
    for name, sample in places:
        losses = cache.read_scores(name, sample)
        if losses is not None:
            tokens += len(losses)
            not_finite += int((~np.isfinite(losses)).sum())
    return Scored(tokens, not_finite)
