#!/usr/bin/env python
"""The record of a day on GPUs as a whole: python scripts/gpu_day_record.py STEM --record DIR

Reads what gpu_day.sh left (STEM-parts.log: name, outcome and seconds of each part; STEM-doctor.log, STEM-tests.log),
and appends a section to gpu_day.md: the parts, what remit doctor said, and how the tests ended.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarking import heading, record, versions


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, or that there is none."""
    return path.read_text(errors="replace").rstrip().splitlines()[-lines:] if path.exists() else ["no log"]


def report(stem: str) -> tuple[str, list[list[str]]]:
    """The section in Markdown, and its rows."""
    rows = [line.split("\t") for line in Path(f"{stem}-parts.log").read_text().splitlines()]
    table = ["| part | outcome | seconds |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    packages = versions("megatron-core", "transformer-engine", "triton", "transformers")
    text = [heading("the parts of gpu_day.sh"), f"{packages}.", "", *table, "", "What `remit doctor` said:", "", "```"]
    text += [*tail(Path(f"{stem}-doctor.log"), 200), "```", "", "How the tests ended:", "", "```"]
    text += [*tail(Path(f"{stem}-tests.log"), 12), "```"]
    return "\n".join(text) + "\n", rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stem", help="what the names of the day's logs begin with")
    parser.add_argument("--record", type=Path, metavar="DIR", required=True, help="where gpu_day.md is")
    args = parser.parse_args()
    text, rows = report(args.stem)
    record(args.record, "gpu_day", title="Days on GPUs", text=text, raw={"parts": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
