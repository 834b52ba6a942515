"""The same report as Markdown: tables as they are, curves as figures and small lines of blocks, heatmaps by their
strongest tokens."""

from __future__ import annotations

from remit_megatron.analysis.parts import Bars, Block, Chart, Heatmap, Table, Text, number, thinned
from remit_megatron.analysis.report.page import Page

_LEVELS = "▁▂▃▄▅▆▇█"
_WIDTH = 32
_STRONGEST = 12


def render_markdown(page: Page) -> str:
    """The whole report."""
    lines = [f"# {page.title}", "", page.subtitle, ""]
    for part in page.parts:
        lines += [f"## {part.title}", "", part.summary, ""]
        for block in part.blocks:
            lines += [*_block(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def _block(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [block.text]
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Bars):
        rows = [[label, number(value)] for label, value in zip(block.labels, block.values, strict=True)]
        return _table(Table(["", "value"], rows, title=block.title, note=block.note))
    if isinstance(block, Chart):
        return _chart(block)
    return _heatmap(block)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "⏎").replace("`", "\\`").replace("<", "&lt;")


def _table(table: Table) -> list[str]:
    bold = {tuple(place) for place in table.bold}
    lines = [f"**{table.title}**", ""] if table.title else []
    lines += ["| " + " | ".join(_cell(name) for name in table.columns) + " |", "|" + " --- |" * len(table.columns)]
    for r, row in enumerate(table.rows):
        cells = [f"**{_cell(cell)}**" if (r, c) in bold else _cell(cell) for c, cell in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", table.note] if table.note else lines


def _chart(chart: Chart) -> list[str]:
    rows = []
    for series in chart.series:
        values = [value for value in series.y if value is not None]
        if values:
            line = sparkline([value for value in thinned(series, _WIDTH).y if value is not None])
            rows.append([series.name, line, *(number(v) for v in (values[0], min(values), max(values), values[-1]))])
    columns = ["", f"over {chart.x_label}", "first", "lowest", "highest", "last"]
    title = ", ".join(filter(None, (chart.title, chart.y_label)))
    return _table(Table(columns, rows, title=title, note=chart.note))


def sparkline(values: list[float]) -> str:
    """A curve in one line of blocks."""
    if not values:
        return ""
    low, spread = min(values), (max(values) - min(values)) or 1.0
    return "".join(_LEVELS[min(7, int(8 * (value - low) / spread))] for value in values)


def _heatmap(block: Heatmap) -> list[str]:
    rows = []
    for text in block.texts:
        for position, delta in enumerate(text["delta"]):
            if delta is not None:
                before = "".join(text["pieces"][max(0, position - 6) : position])
                rows.append((delta, before, text["pieces"][position]))
    rows.sort(key=lambda row: -abs(row[0]))
    cells = [
        [f"{delta:+.3f}", f"…{before}", piece.strip() or repr(piece)] for delta, before, piece in rows[:_STRONGEST]
    ]
    return _table(Table(["Δ, nats", "after", "token"], cells, title="Largest differences", note=block.note))
