"""What a spike is: a step whose loss or gradient stands far out from those of the steps before it.

The rule of OLMo-core's skipping optimizer: above the mean of the last steps by so many standard deviations. Spikes are
no part of the mean, so that a second one is measured by what was there before the first.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.run.schema import SpikesConfig


@dataclass(frozen=True)
class Limits:
    """Above what a figure of the coming step is a spike; infinite where too little is known yet."""

    loss: float = math.inf
    grad_norm: float = math.inf


class SpikeRule:
    """The last ordinary steps of a run, and its last spikes. The same on every rank, and kept in checkpoints.

    Args:
        settings: `spikes` of the run.
    """

    def __init__(self, settings: SpikesConfig):
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._norms: deque[float] = deque(maxlen=settings.window)
        self._recent: list[int] = []
        self.count = 0  # spikes of the whole run

    def limits(self) -> Limits:
        """For the coming step."""
        return Limits(self._limit(self._losses), self._limit(self._norms))

    def _limit(self, values: deque[float]) -> float:
        if len(values) < max(2, self._settings.window // 2):
            return math.inf
        return statistics.fmean(values) + self._settings.deviations * statistics.pstdev(values)

    def ordinary(self, loss: float, grad_norm: float | None) -> None:
        """A step that was trained on."""
        if math.isfinite(loss):
            self._losses.append(loss)
        if grad_norm is not None and math.isfinite(grad_norm):
            self._norms.append(grad_norm)

    def spike(self, iteration: int) -> bool:
        """A step that was a spike; whether that is one too many."""
        self.count += 1
        self._recent = [step for step in self._recent if step > iteration - self._settings.window] + [iteration]
        return len(self._recent) > self._settings.give_up

    def state(self) -> dict[str, Any]:
        """As JSON takes it; numbers come back from there as they were."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "recent": list(self._recent),
            "count": self.count,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's :meth:`state`."""
        self._losses = deque(map(float, state["losses"]), maxlen=self._settings.window)
        self._norms = deque(map(float, state["norms"]), maxlen=self._settings.window)
        self._recent = [int(step) for step in state["recent"]]
        self.count = int(state["count"])

    def rolled_back(self, state: Mapping[str, Any]) -> None:
        """The weights are those of an earlier step: so are the steps that are compared with. Spikes stay counted."""
        recent, count = self._recent, self.count
        self.load(state)
        self._recent, self.count = recent, count


@dataclass(frozen=True)
class Spike:
    """One spike, and what was done about it.

    Attributes:
        iteration: counted from 1.
        figure: ``loss`` or ``grad_norm``.
        value, limit: of that figure.
        lm_loss: of the step, nats.
        back_to: step whose checkpoint was gone back to; None where the step was only skipped.
        hopeless: whether the run must give up.
    """

    iteration: int
    figure: str
    value: float
    limit: float
    lm_loss: float
    back_to: int | None
    hopeless: bool

    def text(self, *, window: int) -> str:
        """In one line, without the samples."""
        what = f"{self.figure} {self.value:.4f} is above {self.limit:.4f}, where a spike begins after the last steps"
        done = "no update was made" if self.back_to is None else f"back to the weights of step {self.back_to}"
        if self.hopeless:
            done = f"one spike too many within {window} steps (spikes.give_up)"
        return f"step {self.iteration}: {what}; {done}"


def step_samples(blend: Any, first: int, last: int) -> list[dict[str, Any]]:
    """What numbers ``first`` to ``last - 1`` of a run's samples are, in their order.

    Args:
        blend: the run's training samples, a `BlendedDataset`.

    Returns:
        For each data set among them ``data`` (its prefix), ``identity`` and ``samples`` (numbers within it); the last
        two name samples for ever, whatever run they are in.
    """
    found: dict[int, list[int]] = {}
    for number in range(first, min(last, len(blend))):
        dataset, sample = blend.locate(number)
        found.setdefault(dataset, []).append(sample)
    datasets = blend.datasets
    return [
        {"data": str(datasets[key].prefix), "identity": datasets[key].identity, "samples": samples}
        for key, samples in sorted(found.items())
    ]


def samples_text(samples: list[dict[str, Any]], *, shown: int = 8) -> str:
    """``corpus 12, 5, 7; noise 3``, the first few of each."""
    parts = []
    for part in samples:
        numbers = ", ".join(map(str, part["samples"][:shown]))
        more = len(part["samples"]) - shown
        parts.append(f"{Path(part['data']).name} {numbers}" + (f" and {more} more" if more > 0 else ""))
    return "; ".join(parts)
