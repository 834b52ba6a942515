"""A part as one PNG, by matplotlib: its charts, bars and heatmap beneath each other."""

from __future__ import annotations

import io
import textwrap
import warnings
from typing import Any

from remit_megatron.analysis.axes import chart_axes, labels
from remit_megatron.analysis.parts import Bars, Chart, Heatmap, Part, Table
from remit_megatron.analysis.report.colours import EDGES, LIGHT, SERIES_LIGHT, level

_WIDTH = 9.0  # inches
_COLUMNS = 104  # characters in a line of the heatmap
_LINES = 56
_LINE_INCHES = 0.155


def picture(part: Part, *, dpi: int = 120) -> bytes:
    """PNG bytes; a part without anything to draw becomes its first table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [block for block in part.blocks if isinstance(block, Chart | Bars | Heatmap)]
    drawn = drawn or [block for block in part.blocks if isinstance(block, Table)][:1]
    heights = [_height(block) for block in drawn] or [1.0]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.9), dpi=dpi, facecolor=LIGHT["surface"], layout="constrained")
    figure.suptitle(part.title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=LIGHT["ink"])
    grid = figure.add_gridspec(max(len(drawn), 1), 1, height_ratios=heights)
    for row, block in enumerate(drawn):
        axes = figure.add_subplot(grid[row, 0])
        axes.set_facecolor(LIGHT["surface"])
        if isinstance(block, Chart):
            _chart(axes, block)
        elif isinstance(block, Bars):
            _bars(axes, block)
        elif isinstance(block, Heatmap):
            _heatmap(axes, block)
        else:
            _table(axes, block)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _height(block: Any) -> float:
    if isinstance(block, Heatmap):
        return 0.6 + _LINE_INCHES * len(_lines(block))
    if isinstance(block, Bars):
        return 0.9 + 0.28 * len(block.values)
    return 3.2 if isinstance(block, Chart) else 0.6 + 0.28 * len(block.rows)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=LIGHT["ink"])


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors=LIGHT["muted"])


def _chart(axes: Any, chart: Chart) -> None:
    _plain(axes)
    _title(axes, chart.title)
    both = chart_axes(chart)
    if both is None:
        axes.text(0.5, 0.5, "no values", ha="center", color=LIGHT["muted"], transform=axes.transAxes)
        return
    if chart.log_y:
        axes.set_yscale("log")
    for axis, ticks, limits in ((axes.xaxis, both[0], axes.set_xlim), (axes.yaxis, both[1], axes.set_ylim)):
        limits(ticks.low, ticks.high)
        axis.set_ticks(ticks.ticks, labels=labels(ticks))
        axis.set_ticks([], minor=True)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.6)
    axes.set_xlabel(chart.x_label, fontsize=8, color=LIGHT["muted"])
    axes.set_ylabel(chart.y_label, fontsize=8, color=LIGHT["muted"])
    for position, series in enumerate(chart.series):
        colour = SERIES_LIGHT[position % len(SERIES_LIGHT)]
        y = [float("nan") if value is None else value for value in series.y]
        few = len(y) < 30 or series.dots
        style = {"marker": "o", "markersize": 4} if few else {}
        axes.plot(series.x, y, color=colour, linewidth=0 if series.dots else 1.5, label=series.name, **style)
        if len(series.low) == len(series.x):
            bounds = [[float("nan") if v is None else v for v in column] for column in (series.low, series.high)]
            axes.fill_between(series.x, *bounds, color=colour, alpha=0.15, linewidth=0)
    if len(chart.series) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=LIGHT["ink"])


def _bars(axes: Any, bars: Bars) -> None:
    _plain(axes)
    _title(axes, bars.title)
    places = list(range(len(bars.values)))[::-1]
    ahead = [value >= bars.baseline for value in bars.values]
    colours = [LIGHT["ahead"] if flag else LIGHT["behind"] for flag in ahead]
    axes.barh(places, [v - bars.baseline for v in bars.values], left=bars.baseline, color=colours, height=0.6)
    for place, low, high in zip(places, bars.low, bars.high, strict=False):
        if low == low and high == high:
            axes.plot([low, high], [place, place], color=LIGHT["ink"], linewidth=1)
    axes.axvline(bars.baseline, color=LIGHT["muted"], linewidth=0.8)
    axes.set_yticks(places, labels=bars.labels)


def _table(axes: Any, table: Table) -> None:
    axes.axis("off")
    drawn = axes.table(cellText=table.rows, colLabels=table.columns, loc="center", edges="horizontal")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)


def _lines(block: Heatmap) -> list[list[tuple[str, float | None]]]:
    """The texts as lines of pieces that fit the width; line breaks of the text are kept."""
    lines: list[list[tuple[str, float | None]]] = []
    for text in block.texts:
        line: list[tuple[str, float | None]] = []
        width = 0
        for piece, delta in zip(text["pieces"], text["delta"], strict=True):
            for number, segment in enumerate(piece.replace("\t", "  ").split("\n")):
                if number:
                    lines.append(line)
                    line, width = [], 0
                for chunk in textwrap.wrap(segment, _COLUMNS, drop_whitespace=False) or [segment]:
                    if width + len(chunk) > _COLUMNS and line:
                        lines.append(line)
                        line, width = [], 0
                    line.append((chunk, delta))
                    width += len(chunk)
        lines += [line, []]
        if len(lines) > _LINES:
            break
    return lines[:_LINES]


def _heatmap(axes: Any, block: Heatmap) -> None:
    axes.axis("off")
    lines = _lines(block)
    edges = ", ".join(f"{edge:g}" for edge in EDGES)
    _title(axes, f"blue: likelier under the reference, red: likelier under the student; shades from {edges} nats")
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(len(lines), 0)
    for row, line in enumerate(lines):
        column = 0
        for piece, delta in line:
            shade = level(delta)
            if shade:
                fill = LIGHT[f"p{shade}" if shade > 0 else f"n{-shade}"]
                axes.barh(row + 0.5, len(piece), left=column, height=0.94, color=fill, linewidth=0)
            ink = LIGHT["surface"] if abs(shade) == 4 else LIGHT["ink"]
            for offset, character in enumerate(piece):  # a cell each: widths then agree with the backgrounds
                if not character.isspace():
                    place = (column + offset + 0.5, row + 0.54)
                    axes.text(*place, character, fontsize=7.4, family="monospace", color=ink, ha="center", va="center")
            column += len(piece)
