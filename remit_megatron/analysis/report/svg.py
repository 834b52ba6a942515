"""Charts and bars as SVG inside the page: readable without a script; a script adds the values under the pointer."""

from __future__ import annotations

import json
import math
from html import escape

from remit_megatron.analysis.axes import Axis, chart_axes, labels, linear, short
from remit_megatron.analysis.parts import Bars, Chart, Series, finite

# Units of the drawing; about a CSS pixel on a phone, so that its text is readable there.
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36


def chart_svg(chart: Chart, colours: dict[str, int]) -> str:
    """The drawing of a chart, with its data as JSON for the script.

    Args:
        colours: name of a series -> number of its colour, the same over the whole page.
    """
    axes = chart_axes(chart)
    if axes is None:
        return '<p class="note">no values</p>'
    x_axis, y_axis = axes
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_spoken(chart))}">']
    parts += _frame(chart, x_axis, y_axis)
    for series in chart.series:
        colour = colours.get(series.name, 0)
        if len(series.low) == len(series.x):
            parts.append(f'<path class="band f{colour}" d="{_band(series, x_axis, y_axis)}"/>')
        if not series.dots:
            parts.append(f'<path class="curve s{colour}" d="{_path(series, x_axis, y_axis)}"/>')
        if series.dots or len(series.x) <= 24:
            parts += [
                f'<circle class="f{colour}" cx="{x}" cy="{y}" r="3"/>' for x, y in _points(series, x_axis, y_axis) if y
            ]
    parts.append('<line class="cross" y1="10" y2="194"/></svg>')
    return "".join(parts) + _data(chart, colours, x_axis, y_axis)


def _spoken(chart: Chart) -> str:
    ends = []
    for series in chart.series:
        values = [value for value in series.y if value is not None]
        if values:
            ends.append(f"{series.name} from {short([values[0]])[0]} to {short([values[-1]])[0]}")
    return f"{chart.title}: {'; '.join(ends)}"


def _frame(chart: Chart, x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for value, label in zip(y_axis.ticks, labels(y_axis), strict=True):
        y = _y(value, y_axis)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{label}</text>')
    base = HEIGHT - BOTTOM
    for value, label in zip(x_axis.ticks, labels(x_axis), strict=True):
        parts.append(f'<text class="tick mid" x="{_x(value, x_axis)}" y="{base + 15}">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick mid" x="{middle}" y="{HEIGHT - 5}">{escape(chart.x_label)}</text>')
    return parts


def _x(value: float, axis: Axis) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * axis.place(value), 1)


def _y(value: float, axis: Axis) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.place(value), 1)


def _points(series: Series, x_axis: Axis, y_axis: Axis) -> list[tuple[float, float | None]]:
    return [(_x(x, x_axis), _height(y, y_axis)) for x, y in zip(series.x, series.y, strict=True)]


def _height(value: float | None, axis: Axis) -> float | None:
    if value is None or (axis.log and value <= 0) or not axis.holds(value):
        return None
    return _y(value, axis)


def _path(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    words, pen = [], False
    for x, y in _points(series, x_axis, y_axis):
        if y is not None:
            words.append(f"{'L' if pen else 'M'}{x:g} {y:g}")
        pen = y is not None
    return "".join(words)


def _band(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    low = [(_x(x, x_axis), _height(v, y_axis)) for x, v in zip(series.x, series.low, strict=True)]
    high = [(_x(x, x_axis), _height(v, y_axis)) for x, v in zip(series.x, series.high, strict=True)]
    top, bottom = _y(y_axis.high, y_axis), _y(y_axis.low, y_axis)
    # Where the axis ends before the band does, the band ends with the axis.
    high = [(x, top if y is None and v is not None else y) for (x, y), v in zip(high, series.high, strict=True)]
    low = [(x, bottom if y is None and v is not None else y) for (x, y), v in zip(low, series.low, strict=True)]
    outline = [(x, y) for x, y in [*high, *low[::-1]] if y is not None]
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in outline) + "Z" if outline else ""


def _data(chart: Chart, colours: dict[str, int], x_axis: Axis, y_axis: Axis) -> str:
    series = []
    for item in chart.series:
        x = [float(f"{value:.7g}") for value in item.x]
        y = [None if v is None or not math.isfinite(v) else float(f"{v:.5g}") for v in item.y]
        entry = {"n": item.name, "c": colours.get(item.name, 0), "x": _compact(x), "y": y}
        series.append(entry)
    shape = [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM]
    data = {"x": [x_axis.low, x_axis.high], "box": shape, "u": chart.x_label, "s": series}
    data["y"] = [y_axis.low, y_axis.high, y_axis.log]
    text = json.dumps(finite(data), separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    return f'<script type="application/json">{text}</script>'


def _compact(x: list[float]) -> list[float] | dict[str, float]:
    """Evenly spaced values as start, step and number."""
    if len(x) > 3:
        step = (x[-1] - x[0]) / (len(x) - 1)
        if all(abs(x[0] + i * step - value) <= 1e-6 * abs(x[-1]) for i, value in enumerate(x)):
            return {"a": x[0], "d": step, "n": len(x)}
    return x


def bars_svg(bars: Bars) -> str:
    """Horizontal bars from the baseline, each with its value."""
    ends = [v for column in (bars.values, bars.low, bars.high) for v in column if math.isfinite(v)]
    axis = linear(min([bars.baseline, *ends]), max([bars.baseline, *ends]))
    left, right, row = 150, 46, 24
    height = row * len(bars.values) + 8

    def place(value: float) -> float:
        return round(left + (WIDTH - left - right) * axis.place(value), 1)

    zero = place(bars.baseline)
    shown = [f"{value:.3f}" for value in bars.values]
    spoken = ", ".join(f"{label} {value}" for label, value in zip(bars.labels, shown, strict=True))
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{bars.title}: {spoken}")}">']
    for position, (label, value) in enumerate(zip(bars.labels, bars.values, strict=True)):
        y = 4 + row * position
        first, last = sorted((zero, place(value)))
        kind = "ahead" if value >= bars.baseline else "behind"
        parts.append(f'<text class="tick ink end" x="{left - 8}" y="{y + 15}">{escape(label)}</text>')
        parts.append(
            f'<rect class="{kind}" x="{first}" y="{y + 4}" width="{last - first:.1f}" height="{row - 8}" rx="2"/>'
        )
        if position < len(bars.low) and math.isfinite(bars.low[position]):
            ends = [place(bars.low[position]), place(bars.high[position])]
            parts.append(f'<line class="whisker" x1="{ends[0]}" x2="{ends[1]}" y1="{y + 12}" y2="{y + 12}"/>')
        parts.append(f'<text class="tick" x="{WIDTH - right + 6}" y="{y + 15}">{shown[position]}</text>')
    parts.append(f'<line class="axis" x1="{zero}" x2="{zero}" y1="2" y2="{height - 2}"/></svg>')
    return "".join(parts)
