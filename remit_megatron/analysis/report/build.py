"""``remit report``: from run directories, results and parts to one page."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from html import escape
from pathlib import Path

from remit_megatron import __version__
from remit_megatron.analysis.parts import PART_SUFFIX, Heatmap, Part, read_part
from remit_megatron.analysis.report import sections
from remit_megatron.analysis.report.markdown import render_markdown
from remit_megatron.analysis.report.page import Page, render
from remit_megatron.analysis.results import Score, evaluation_commands, read_results
from remit_megatron.analysis.runs import Run, read_runs
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import write_atomic

logger = logging.getLogger(__name__)

MAXIMUM_BYTES = 1_000_000
# Places beside or in a run where `remit evaluate` and `remit analyze` are expected to have written.
_RESULTS = ("results.json", "*/results.json")
_PARTS = (f"*{PART_SUFFIX}", f"*/*{PART_SUFFIX}", f"*/*/*{PART_SUFFIX}")


def report(
    *, runs: list[str], outputs: list[str], results: list[str], parts: list[str], title: str | None = None
) -> list[Path]:
    """Writes the report; returns the files.

    Args:
        outputs: names that end in .html or .md.
        results: result files; empty looks in and beside the runs.
        parts: folders or files of parts; empty looks in and beside the runs.

    Raises:
        UserError: a run, a file or a name is wrong.
    """
    wrong = [name for name in outputs if Path(name).suffix not in {".html", ".md"}]
    if wrong:
        raise UserError("--output", wrong[0], "a name that ends in .html or .md")
    found = read_runs(runs)
    files = list(results or _beside(found, _RESULTS))
    scores = read_results(files)
    extra = [read_part(Path(path)) for path in _part_files(parts) or _beside(found, _PARTS)]
    page = build(found, scores, extra, title=title, evaluations=evaluation_commands(files))
    written = []
    for name in outputs or [str(_default_output(found))]:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, render_markdown(page) if path.suffix == ".md" else fitted(page))
        written.append(path)
    return written


def build(
    runs: list[Run],
    scores: list[Score],
    extra: list[Part],
    *,
    title: str | None = None,
    evaluations: Sequence[str] = (),
) -> Page:
    """The page of runs: sections in the order in which one asks."""
    if title is None:
        names = [run.name for run in runs]
        title = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    parts = [
        sections.overview(runs),
        sections.configuration(runs),
        sections.benchmarks(scores),
        sections.curves(runs),
        sections.evaluations(runs),
        sections.weights(runs),
        *extra,
        sections.throughput(runs),
        sections.effective_time(runs),
        sections.reproduce(runs, evaluations),
    ]
    present = _unique([part for part in parts if part is not None])
    configs = "".join(
        f"<details><summary>config.yaml of {escape(run.name)}</summary>"
        f"<pre>{escape((run.path / 'config.yaml').read_text())}</pre></details>"
        for run in runs
    )
    subtitle = f"remit report {__version__}"
    return Page(
        title, subtitle, present, [run.name for run in runs], {"reproduce": configs, "time": sections.time_bars(runs)}
    )


def _unique(parts: list[Part]) -> list[Part]:
    """Names are anchors: the second of a name gets a number."""
    seen: dict[str, int] = {}
    for part in parts:
        seen[part.name] = seen.get(part.name, 0) + 1
        if seen[part.name] > 1:
            part.name = f"{part.name}-{seen[part.name]}"
    return parts


def fitted(page: Page) -> str:
    """The page as HTML under one megabyte: with coarser curves and shorter heatmaps where it must be.

    Raises:
        UserError: it does not fit even so.
    """
    points, share = 240, 1.0
    for _ in range(8):
        html = render(_shortened(page, share) if share < 1 else page, points=points)
        if len(html.encode()) < MAXIMUM_BYTES:
            if share < 1:
                logger.warning("the page was over 1 MB: curves have %d points, heatmaps %.0f%%", points, 100 * share)
            return html
        points, share = max(40, points * 2 // 3), share / 2
    raise UserError("--output", f"{len(html.encode())} bytes of report", f"under {MAXIMUM_BYTES}: fewer runs or parts")


def _shortened(page: Page, share: float) -> Page:
    parts = []
    for part in page.parts:
        blocks = []
        for block in part.blocks:
            if isinstance(block, Heatmap):
                kept = block.texts[: max(1, round(share * len(block.texts)))]
                note = f"{len(kept)} of {len(block.texts)} texts, so that the page stays small. {block.note}"
                block = Heatmap(kept, note)
            blocks.append(block)
        parts.append(dataclasses.replace(part, blocks=blocks))
    return dataclasses.replace(page, parts=parts)


def _default_output(runs: list[Run]) -> Path:
    return runs[0].path / "report.html" if len(runs) == 1 else Path("report.html")


def _beside(runs: list[Run], patterns: tuple[str, ...]) -> list[str]:
    """Files in the runs; and beside them, but not in other runs."""
    found: dict[Path, None] = {}
    for run in runs:
        found |= dict.fromkeys(path for pattern in patterns for path in sorted(run.path.glob(pattern)))
    homes = {run.path.absolute().parent for run in runs}
    if len(runs) > 1 and len(homes) == 1:
        (home,) = homes
        for pattern in patterns:
            for path in sorted(home.glob(pattern)):
                top = home / path.relative_to(home).parts[0]
                if not (top / "metrics.jsonl").exists():
                    found[path] = None
    return [str(path) for path in found]


def _part_files(names: list[str]) -> list[str]:
    files = []
    for name in names:
        path = Path(name)
        inside = sorted(path.rglob(f"*{PART_SUFFIX}")) if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise UserError(
                "--parts", f"no part in {name}", f"a folder that remit analyze wrote, or a *{PART_SUFFIX} file"
            )
        files += [str(file) for file in inside]
    return files
