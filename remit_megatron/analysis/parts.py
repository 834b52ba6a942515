"""What an analysis leaves behind: its data, a PNG, and a part that a report shows. One description serves all three.

A part is a title, a sentence and blocks (text, table, chart, bars, heatmap) without any styling: the report makes HTML
or Markdown of them, :mod:`remit_megatron.analysis.png` a picture. It is kept as ``NAME.part.json``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.extras import require
from remit_megatron.runtime.files import write_atomic

FORMAT = "remit_megatron report part"
VERSION = 1
PART_SUFFIX = ".part.json"


@dataclass
class Text:
    """A paragraph."""

    text: str


@dataclass
class Table:
    """Rows of ready-made cells.

    Attributes:
        bold: (row, column) of the cells to stress.
    """

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    note: str = ""
    bold: list[list[int]] = field(default_factory=list)


@dataclass
class Series:
    """One curve; ``low`` and ``high`` bound a band around it where they are given.

    Attributes:
        y: as long as ``x``; None where there is no value.
        dots: draw points rather than a line.
    """

    name: str
    x: list[float]
    y: list[float | None]
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    dots: bool = False


@dataclass
class Chart:
    """Curves over one axis.

    Attributes:
        settled: the axis holds what curves do after their first tenth; one that begins far outside enters it later.
    """

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    note: str = ""
    log_y: bool = False
    settled: bool = False


@dataclass
class Bars:
    """Named values beside a baseline (1 for weights, 0 for differences), with intervals where they are given."""

    title: str
    labels: list[str]
    values: list[float]
    baseline: float = 0.0
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    note: str = ""


@dataclass
class Heatmap:
    """Texts as tokens with a number each.

    Attributes:
        texts: per text ``pieces`` (the text cut at its tokens), ``delta``, ``student``, ``reference`` (natural logs;
            None for the first token, which nothing precedes) and ``weight``.
        note: what is shown of what there is.
    """

    texts: list[dict[str, list[Any]]]
    note: str = ""


Block = Text | Table | Chart | Bars | Heatmap
_KINDS: dict[str, type[Block]] = {"text": Text, "table": Table, "chart": Chart, "bars": Bars, "heatmap": Heatmap}


@dataclass
class Part:
    """A section of a report.

    Attributes:
        name: short, of letters; also the anchor in the page.
        summary: what is to be seen, in a sentence or two.
    """

    name: str
    title: str
    summary: str
    blocks: list[Block]


def to_json(part: Part) -> str:
    """The part as text of one ``.part.json`` file."""
    kinds = {kind: name for name, kind in _KINDS.items()}
    blocks = [{"kind": kinds[type(block)], **dataclasses.asdict(block)} for block in part.blocks]
    content = {"format": FORMAT, "version": VERSION, "name": part.name, "title": part.title, "summary": part.summary}
    return json.dumps(finite({**content, "blocks": blocks}), ensure_ascii=False) + "\n"


def read_part(path: Path) -> Part:
    """Reads what :func:`to_json` made.

    Raises:
        UserError: it is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"format {content['format']!r} version {content['version']}")
        blocks: list[Block] = []
        for block in content["blocks"]:
            kind = _KINDS[block.pop("kind")]
            if kind is Chart:
                block["series"] = [Series(**series) for series in block["series"]]
            if kind is Bars:  # an interval over one text is NaN, which a file holds as null
                for name in ("values", "low", "high"):
                    block[name] = [math.nan if value is None else value for value in block[name]]
            blocks.append(kind(**block))
        return Part(content["name"], content["title"], content["summary"], blocks)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(str(path), f"no part of a report ({error})", f"{FORMAT}, version {VERSION}") from None


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which are not JSON; numbers cut to 7 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_analysis(output: Path, part: Part, data: Any) -> None:
    """Writes ``NAME.json`` (the data), ``NAME.png`` and ``NAME.part.json`` into ``output``.

    Args:
        data: what JSON can hold; NaN becomes null.
    """
    from remit_megatron.analysis.png import picture

    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / f"{part.name}.json", json.dumps(finite(data), indent=1, ensure_ascii=False) + "\n")
    write_atomic(output / f"{part.name}.png", picture(part))
    write_atomic(output / f"{part.name}{PART_SUFFIX}", to_json(part))


def output_directory(path: str) -> Path:
    """A directory that can be made and written, and matplotlib found, before any long work starts.

    Raises:
        UserError: neither.
    """
    output = Path(path)
    if output.exists() and not output.is_dir():
        raise UserError("--output", f"{path} (a file)", "a directory")
    require("matplotlib", field="remit analyze")
    output.mkdir(parents=True, exist_ok=True)
    return output


def number(value: float | None, digits: int = 4) -> str:
    """A cell: significant digits, thousands plain, nothing for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 10**6:
        decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
        return f"{value:.{min(decimals, digits)}f}"
    return f"{value:.{digits - 1}e}"


def thinned(series: Series, points: int) -> Series:
    """At most ``points`` points: means of equal stretches, with their lowest and highest as a band."""
    length = len(series.x)
    if length <= points or series.dots:
        return series
    edges = [length * i // points for i in range(points + 1)]
    result = Series(series.name, [], [])
    for first, last in pairwise(edges):
        values = [v for v in series.y[first:last] if v is not None and math.isfinite(v)]
        result.x.append(sum(series.x[first:last]) / (last - first))
        result.y.append(sum(values) / len(values) if values else None)
        result.low.append(min([*values, *_numbers(series.low[first:last])], default=None))
        result.high.append(max([*values, *_numbers(series.high[first:last])], default=None))
    return result


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
