"""Parts as one HTML page: no address in it, nothing to load, whole without a script, light and dark, narrow or wide."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files

from remit_megatron.analysis.axes import chart_axes
from remit_megatron.analysis.parts import Bars, Block, Chart, Heatmap, Part, Table, Text, number, thinned
from remit_megatron.analysis.report.colours import DARK, EDGES, LIGHT, SERIES_DARK, SERIES_LIGHT, level
from remit_megatron.analysis.report.svg import bars_svg, chart_svg


@dataclass
class Page:
    """A report.

    Attributes:
        runs: names of the runs, in the order of their colours; shown as a legend that stays in sight.
        parts: sections, in order.
        extra: section name -> ready HTML behind its blocks (what only a page can show).
    """

    title: str
    subtitle: str
    parts: list[Part]
    runs: list[str] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)


def render(page: Page, *, points: int = 240) -> str:
    """The whole page.

    Args:
        points: a curve has at most so many; longer ones become means of equal stretches with a band of their extremes.
    """
    colours = {name: number for number, name in enumerate(page.runs)}
    links = "".join(f'<a href="#{part.name}">{escape(part.title)}</a>' for part in page.parts)
    legend = f'<div class="runs">{_legend(page.runs, colours)}</div>' if len(page.runs) > 1 else ""
    sections = "".join(
        f'<section id="{part.name}">{_heading(page, part)}<p>{escape(part.summary)}</p>'
        f"{_blocks(part.blocks, colours, points)}{page.extra.get(part.name, '')}</section>"
        for part in page.parts
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(page.title)}</title>'
        f"<style>{_style()}</style></head>"
        f'<body><main><header><p class="sub">{escape(page.subtitle)}</p><h1>{escape(page.title)}</h1>'
        f"<nav>{links if len(page.parts) > 1 else ''}</nav></header>{legend}{sections}</main>"
        f"<script>{_resource('page.js')}</script></body></html>\n"
    )


def _heading(page: Page, part: Part) -> str:
    return "" if part.title == page.title else f"<h2>{escape(part.title)}</h2>"


def standalone(part: Part) -> str:
    """A page of one part."""
    return render(Page(part.title, "remit analyze", [part]))


@cache
def _resource(name: str) -> str:
    return (files("remit_megatron.analysis.report") / name).read_text(encoding="utf-8")


def _style() -> str:
    def variables(colours: dict[str, str], series: Sequence[str]) -> str:
        named = {**colours, **{f"s{i}": colour for i, colour in enumerate(series)}}
        return "".join(f"--{name}:{colour};" for name, colour in named.items())

    rules = [f":root{{color-scheme:light dark;{variables(LIGHT, SERIES_LIGHT)}}}"]
    rules.append(f"@media(prefers-color-scheme:dark){{:root{{{variables(DARK, SERIES_DARK)}}}}}")
    for i in range(len(SERIES_LIGHT)):
        rules.append(f".s{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}.c{i}{{color:var(--s{i})}}")
        rules.append(f".b{i}{{background:var(--s{i})}}")
    for sign in "pn":
        for shade in range(1, len(EDGES) + 1):
            ink = ";color:var(--surface)" if shade == len(EDGES) else ""
            rules.append(f".{sign}{shade}{{background:var(--{sign}{shade}){ink}}}")
            # Filters work without a script: the page's own radio buttons take the colour from what is not asked for.
            hidden = "{background:none;color:var(--muted)}"
            other = "neg" if sign == "p" else "pos"
            selectors = [f".hm:has(.f-{other}:checked) i.{sign}{shade}"]
            selectors += [f".hm:has(.f-{edge}:checked) i.{sign}{shade}" for edge in range(shade + 1, len(EDGES) + 1)]
            rules.append(",".join(selectors) + hidden)
    return "".join(rules) + _minified(_resource("style.css"))


def _minified(css: str) -> str:
    return re.sub(r"\n\s*", "", css)


def _legend(names: list[str], colours: dict[str, int]) -> str:
    items = "".join(f'<li><span class="chip c{_number(name, colours)}"></span>{escape(name)}</li>' for name in names)
    return f'<ul class="legend">{items}</ul>'


def _number(name: str, colours: dict[str, int]) -> int:
    return colours.get(name, 0) % len(SERIES_LIGHT)


def _blocks(blocks: list[Block], colours: dict[str, int], points: int) -> str:
    """Charts and bars that follow each other stand side by side where there is room."""
    html, row = [], []
    for position, block in enumerate(blocks):
        if isinstance(block, Chart | Bars):
            row.append(_chart(block, colours, points) if isinstance(block, Chart) else _bars(block))
        if row and (not isinstance(block, Chart | Bars) or position == len(blocks) - 1):
            html.append(f'<div class="grid-of">{"".join(row)}</div>')
            row = []
        if isinstance(block, Text):
            html.append(f"<p>{escape(block.text)}</p>")
        elif isinstance(block, Table):
            html.append(_table(block))
        elif isinstance(block, Heatmap):
            html.append(_heatmap(block))
    return "".join(html)


def _chart(chart: Chart, colours: dict[str, int], points: int) -> str:
    names = [series.name for series in chart.series]
    known = all(name in colours for name in names)
    own = colours if known else {name: number for number, name in enumerate(names)}
    own = {name: number % len(SERIES_LIGHT) for name, number in own.items()}
    short = dataclasses.replace(chart, series=[thinned(series, points) for series in chart.series])
    legend = "" if known or len(names) < 2 else _legend(names, own)
    unit = f' <span class="note">{escape(chart.y_label)}</span>'
    said = " ".join(text for text in (chart.note, _outside(short)) if text)
    note = f'<figcaption class="note">{escape(said)}</figcaption>' if said else ""
    return f'<figure class="chart"><h3>{escape(chart.title)}{unit}</h3>{legend}{chart_svg(short, own)}{note}</figure>'


def _outside(chart: Chart) -> str:
    """What is said of curves that begin outside the axis."""
    axes = chart_axes(chart)
    if not chart.settled or axes is None:
        return ""
    outside = [v for series in chart.series for v in series.y if v is not None and not axes[1].holds(v)]
    return f"The beginning, up to {number(max(outside), 3)}, is outside the axis." if outside else ""


def _bars(bars: Bars) -> str:
    note = f'<figcaption class="note">{escape(bars.note)}</figcaption>' if bars.note else ""
    return f"<figure><h3>{escape(bars.title)}</h3>{bars_svg(bars)}{note}</figure>"


_NUMERIC = re.compile(r"^[≥<]?\s*[-+−]?[\d.,]+(e[-+]?\d+)?\s*(%|[KMBT]|×|s)?( ± .*)?$|^–$|^$|^not reached$")


def _table(table: Table) -> str:
    numeric = [
        bool(table.rows) and all(_NUMERIC.match(row[column]) for row in table.rows)
        for column in range(len(table.columns))
    ]
    head = "".join(
        f"<th{' class=num' if flag else ''}>{escape(name)}</th>"
        for name, flag in zip(table.columns, numeric, strict=True)
    )
    bold = {tuple(place) for place in table.bold}
    body = []
    for r, row in enumerate(table.rows):
        cells = []
        for c, cell in enumerate(row):
            kind = " class=num" if numeric[c] else " class=wrap" if len(cell) > 40 else ""
            text = _breakable(cell) if c == 0 else escape(cell)
            text = f"<b>{text}</b>" if (r, c) in bold else text
            cells.append(f"<td{kind}>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    content = f"{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table>{content}</table></div>{note}'


def _breakable(key: str) -> str:
    """A dotted key may break at its joints, so that it leaves room on a phone."""
    return re.sub(r"(?<=\w)([._/])(?=\w)", r"\1<wbr>", escape(key)) if " " not in key else escape(key)


_MAPS = iter(range(1 << 30))  # radio buttons of one page need names of their own


def _heatmap(block: Heatmap) -> str:
    serial = next(_MAPS)

    def radio(name: str, kind: str, label: str, checked: bool) -> str:
        mark = " checked" if checked else ""
        return f'<label><input type="radio" name="{name}{serial}" class="f-{kind}"{mark}>{label}</label>'

    signs = [("all", "all"), ("pos", "reference ahead"), ("neg", "student ahead")]
    edges = [("1", f"≥ {EDGES[0]:g}"), *((str(i + 1), f"≥ {edge:g}") for i, edge in enumerate(EDGES) if i)]
    controls = "".join(radio("s", kind, label, kind == "all") for kind, label in signs)
    limits = "".join(radio("e", kind, label, kind == "1") for kind, label in edges)
    names = [f"n{i}" for i in range(len(EDGES), 0, -1)] + [""] + [f"p{i}" for i in range(1, len(EDGES) + 1)]
    texts = [f"−{edge:g}" for edge in reversed(EDGES)] + ["0"] + [f"+{edge:g}" for edge in EDGES]
    scale = "".join(f'<span class="{name}">{text}</span>' for name, text in zip(names, texts, strict=True))
    note = f'<p class="note">{escape(block.note)}</p>' if block.note else ""
    return (
        f'<div class="hm"><div class="controls"><span class="scale" aria-label="legend, nats">{scale}</span>'
        f'<fieldset aria-label="which tokens">{controls}</fieldset>'
        f'<fieldset aria-label="least difference, nats">|Δ| {limits}</fieldset>'
        '<label class="js">texts with <input type="search" aria-label="texts with"> <span class="count"></span></label>'
        "</div>" + "".join(f'<div class="text">{_tokens(text)}</div>' for text in block.texts) + f"</div>{note}"
    )


def _tokens(text: dict[str, list]) -> str:
    columns = [text[name] for name in ("pieces", "delta", "reference", "student", "weight")]
    parts = []
    for piece, delta, reference, student, weight in zip(*columns, strict=True):
        if not piece:
            continue
        if delta is None:
            parts.append(escape(piece, quote=False))
            continue
        shade = level(delta)
        kind = f" class={'p' if shade > 0 else 'n'}{abs(shade)}" if shade else ""
        numbers = f"Δ{delta:+.3f} ref {_probability(reference)} student {_probability(student)} w {weight:.2f}"
        parts.append(f'<i{kind} title="{numbers}">{escape(piece, quote=False)}</i>')
    return "".join(parts)


def _probability(logprob: float) -> str:
    return f"{math.exp(logprob):.3g}"
