"""Is a reference worth following? Figures of two models' losses on the same text, and one sentence.

A reference that is not ahead of the student teaches what it knows less of: weighted training then ends below plain
training (measured at toy size, with a reference at chance). What can be known before a run is how far ahead it is, and
how much of what the weights say is more than noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remit_megatron.runtime.errors import UserError
from remit_megatron.scoring.verdicts import AS_PLAIN, GAIN, HARM, NOTHING

_SPLITS = 20
_RESAMPLES = 2000
# Below this spread the weights are 1 for all that matters: next-token prediction at the price of a reference.
FLAT = 0.005


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, reference less student in what is better, with its 95% interval.

    Attributes:
        value: in nats a token, or in the units of a suite's score; positive where the reference is ahead.
        low, high: bounds of the interval; equal to ``value`` where there is one document or item only.
        units: documents or items that were resampled.
    """

    value: float
    low: float
    high: float
    units: int

    @property
    def ahead(self) -> bool | None:
        """True or False where the interval is on one side of 0, None where it is not."""
        if self.units < 2 or self.low <= 0 <= self.high:
            return None
        return self.low > 0


@dataclass(frozen=True)
class TextGuidance:
    """Two models on the same text.

    Attributes:
        tokens, documents: that were compared.
        student_loss, reference_loss: mean, nats a token.
        loss_difference: student less reference; the interval resamples documents.
        tokens_ahead: share of the tokens that the reference finds more likely.
        weight_std: spread of the weights.
        clipped: share of the tokens whose weight the clip bounds.
        signal: share of the weights' variance that the kind of token (the token and the one before it) explains in one
            half of the documents as in the other; near 0 for weights that are noise.
    """

    tokens: int
    documents: int
    student_loss: float
    reference_loss: float
    loss_difference: Difference
    tokens_ahead: float
    weight_std: float
    clipped: float
    signal: float

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)


def compare_text(
    student: NDArray[np.floating],
    reference: NDArray[np.floating],
    weights: NDArray[np.floating],
    mask: NDArray[np.bool_],
    documents: NDArray[np.integer],
    tokens: NDArray[np.integer],
    *,
    epsilon: float | None,
    seed: int = 0,
) -> TextGuidance:
    """The figures of a text.

    Args:
        student, reference: [n, s] losses of the labels in nats.
        weights: [n, s] the weights that the run's objective gives.
        mask: [n, s] labels that count.
        documents: [n, s] document of each label within its sequence.
        tokens: [n, s + 1] the sequences: what stands before each label, and the label.
        epsilon: of the weights' clip; None for none.
        seed: of resampling and splitting.

    Raises:
        UserError: no label counts.
    """
    counted = mask & np.isfinite(reference) & np.isfinite(student)
    if not counted.any():
        raise UserError("data", "no token that both models score", "held-out text")
    delta = (student.astype(np.float64) - reference)[counted]
    rows = np.broadcast_to(np.arange(len(mask))[:, None], mask.shape)
    places = np.stack((rows, documents), axis=-1)[counted]
    _, unit = np.unique(places, axis=0, return_inverse=True)
    unit = unit.reshape(-1)
    chosen = weights[counted].astype(np.float64)
    kinds = tokens[:, :-1].astype(np.int64) << 32 | tokens[:, 1:]
    bounds = (0.0, 2.0) if epsilon is None else (1.0 - epsilon, 1.0 + epsilon)
    at_bound = (chosen <= bounds[0] + 1e-6) | (chosen >= bounds[1] - 1e-6)
    return TextGuidance(
        tokens=int(counted.sum()),
        documents=int(unit.max()) + 1,
        student_loss=float(student[counted].mean(dtype=np.float64)),
        reference_loss=float(reference[counted].mean(dtype=np.float64)),
        loss_difference=mean_difference(delta, unit, seed=seed),
        tokens_ahead=float((delta > 0).mean()),
        weight_std=float(chosen.std()),
        clipped=float(at_bound.mean()),
        signal=reproducible_share(chosen, kinds[counted], unit, seed=seed),
    )


def mean_difference(values: NDArray[np.floating], units: NDArray[np.integer], *, seed: int = 0) -> Difference:
    """Mean of ``values`` [n] with a 95% interval: the percentile bootstrap of scipy over ``units`` [n], whose values
    come and go together; scipy comes with the extra `evaluate`."""
    from scipy import stats

    mean = float(values.mean())
    sums = np.bincount(units, weights=values)
    counts = np.bincount(units).astype(np.float64)
    if len(sums) < 2:
        return Difference(mean, mean, mean, len(sums))
    interval = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis=-1: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Difference(mean, float(interval.low), float(interval.high), len(sums))


def reproducible_share(
    values: NDArray[np.floating],
    kinds: NDArray[np.integer],
    units: NDArray[np.integer],
    *,
    seed: int = 0,
) -> float:
    """Share of the variance of ``values`` that their ``kinds`` explain alike in two halves of the ``units``.

    The covariance of the kinds' means over the two halves has the variance between kinds as its expectation, and no
    noise in it, since the halves share no document; a mean of one half alone would count its own noise. Kinds that one
    half lacks explain nothing. Mean over random halves; 0 where there are fewer than two units or no variance.
    """
    variance = float(values.var())
    count = int(units.max()) + 1 if len(units) else 0
    if count < 2 or variance == 0:
        return 0.0
    _, kind = np.unique(kinds, return_inverse=True)
    kind = kind.reshape(-1)
    centered, number = values - values.mean(), int(kind.max()) + 1
    rng = np.random.default_rng(seed)
    shares = []
    for _ in range(_SPLITS):
        half = np.zeros(count, dtype=bool)
        half[rng.permutation(count)[: count // 2]] = True
        first = half[units]
        counts = [np.bincount(kind[side], minlength=number) for side in (first, ~first)]
        sums = [np.bincount(kind[side], weights=centered[side], minlength=number) for side in (first, ~first)]
        both = (counts[0] > 0) & (counts[1] > 0)
        products = (sums[0][both] / counts[0][both]) * (sums[1][both] / counts[1][both])
        shares.append(float((products * (counts[0] + counts[1])[both]).sum() / len(values) / variance))
    return float(np.clip(np.mean(shares), 0.0, 1.0))


def verdict(text: TextGuidance, suite: Sequence[Difference] = (), *, held_out: bool = True) -> str:
    """One sentence: whether to expect a gain from following the reference.

    Args:
        text: on held-out text, or where ``held_out`` is not so on the corpus's own.
        suite: differences of a suite's tasks, positive where the reference is ahead; they decide where they are clear.
    """
    if text.weight_std < FLAT:
        return f"{AS_PLAIN}: the weights hardly differ from 1 (spread {text.weight_std:.4f})."
    ahead = sum(difference.ahead is True for difference in suite)
    behind = sum(difference.ahead is False for difference in suite)
    if ahead != behind:
        clear = f"on {max(ahead, behind)} of {len(suite)} tasks the difference is clear"
        if ahead > behind:
            return f"{GAIN}: the reference is ahead on the suite ({clear})."
        return f"{HARM}: the reference is behind on the suite ({clear})."
    what = "held-out text" if held_out else "the corpus"
    if text.loss_difference.ahead is True:
        return f"{GAIN}: the reference is ahead on {what} by {text.loss_difference.value:.3f} nats a token."
    if text.loss_difference.ahead is False:
        return (
            f"{HARM} where this text is what you want to learn: the reference is behind on it by "
            f"{-text.loss_difference.value:.3f} nats a token. Where it is not (a corpus with mistakes), ask a suite."
        )
    return f"{NOTHING}: the reference is neither ahead nor behind on {what}."
