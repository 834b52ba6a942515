"""Axes that charts share, drawn as SVG or by matplotlib: ranges, round ticks, short labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from remit_megatron.analysis.parts import Chart
from remit_megatron.runtime.progress import format_count

# The beginning of curves is left out of the axis where the rest takes less than this share of the whole height.
_SETTLED = 0.6


@dataclass(frozen=True)
class Axis:
    """A range and its ticks, in data units."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value lies on it, give or take rounding."""
        slack = 1e-6 * (self.high - self.low)
        return self.low - slack <= value <= self.high + slack

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def linear(low: float, high: float, *, wanted: int = 5, round_ends: bool = True) -> Axis:
    """An axis with ticks at 1, 2 or 5 times a power of ten."""
    if not high > low:
        spread = abs(low) * 0.05 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    if round_ends:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return Axis(low, high, [i * step for i in range(first, last + 1)])


def logarithmic(low: float, high: float) -> Axis:
    """An axis of decades, with 2 and 5 between them where few decades are shown."""
    low, high = low * 0.95, high * 1.05
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    reach = math.log10(high) - math.log10(low)
    factors = (1, 2, 3, 5, 7) if reach < 1 else (1, 2, 5) if reach < 2.5 else (1,)
    ticks = [factor * 10.0**d for d in decades for factor in factors]
    return Axis(low, high, [tick for tick in ticks if low <= tick <= high], log=True)


def chart_axes(chart: Chart) -> tuple[Axis, Axis] | None:
    """Axes of x and y that hold every point and band; None for a chart without a point."""
    xs = [x for series in chart.series for x in series.x]
    ys = _values(chart, 0)
    if chart.settled and (later := _values(chart, 10)) and _SETTLED * (max(ys) - min(ys)) > max(later) - min(later):
        ys = later
    if chart.log_y:
        ys = [y for y in ys if y > 0]
    if not xs or not ys:
        return None
    y_axis = logarithmic(min(ys), max(ys)) if chart.log_y else linear(min(ys), max(ys))
    if all(x == int(x) for x in xs) and max(xs) - min(xs) <= 12:  # checkpoints or models, counted
        whole = range(int(min(xs)), int(max(xs)) + 1)
        margin = 0.0 if len(whole) > 1 else 0.5
        return Axis(min(xs) - margin, max(xs) + margin, [float(x) for x in whole]), y_axis
    low = 0.0 if 0 <= min(xs) < 0.1 * max(xs) else min(xs)
    return linear(low, max(xs), wanted=4, round_ends=False), y_axis


def _values(chart: Chart, part: int) -> list[float]:
    """All values of curves and bands; without the first of ``part`` equal parts of each, where it is not 0."""
    return [
        value
        for series in chart.series
        for column in (series.y, series.low, series.high)
        for value in column[len(column) // part if part else 0 :]
        if value is not None
    ]


def labels(axis: Axis) -> list[str]:
    """Ticks as short text, all with the same number of decimals."""
    return short(axis.ticks)


def short(values: Sequence[float]) -> list[str]:
    """Numbers that stand together: K, M, B for large ones; as many decimals as tell them apart."""
    if any(abs(value) >= 10_000 for value in values):
        return [format_count(value) for value in values]
    if any(0 < abs(value) < 1e-3 for value in values) and max(map(abs, values), default=0) < 1e-2:
        return [f"{value:.1e}".replace("e-0", "e-") if value else "0" for value in values]
    for decimals in range(6):
        texts = [f"{value:.{decimals}f}" for value in values]
        if all(abs(float(t) - v) <= 1e-9 + 1e-6 * abs(v) for t, v in zip(texts, values, strict=True)):
            return [text if float(text) else "0" for text in texts]
    return [f"{value:.3g}" for value in values]
