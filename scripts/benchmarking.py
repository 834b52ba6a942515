"""What the bench scripts share: arms that take turns, figures of a run, and dated records.

Importing this module also sets what a run's command sets before the driver of a GPU starts, so it comes before torch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as cli.py: Megatron asks for it where ranks share layers
logging.basicConfig(level=logging.WARNING, format="%(message)s")  # before a library does it, with all it has to say


def interleave(names: Sequence[str], rounds: int, run: Callable[[str], float], *, label: str) -> dict[str, list[float]]:
    """Runs every arm once in each round, in an order that rotates; the first round warms up and is not counted.

    Args:
        names: arms.
        rounds: rounds that count.
        run: runs an arm and returns its seconds.
        label: what the progress line says.

    Returns:
        Seconds of each arm, one for each round.
    """
    from remit_megatron.runtime.progress import Progress

    seconds: dict[str, list[float]] = {name: [] for name in names}
    progress = Progress(label, total=rounds + 1, unit="rounds")
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            taken = run(name)
            if number:
                seconds[name].append(taken)
        progress.update(number + 1)
    progress.finish()
    return seconds


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the sorted values lie below, without interpolation."""
    return sorted(values)[min(len(values) - 1, round(share * (len(values) - 1)))]


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round: what slows a whole round cancels."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def device_name() -> str:
    """The GPU, or the processor and the number of threads."""
    import torch

    from remit_megatron.doctor.probes import cpu_model

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def versions(*distributions: str) -> str:
    """``Python 3.12.1, torch 2.13.0, ...``; packages that are not installed are left out."""
    import torch

    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in distributions:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def heading(subject: str) -> str:
    """Title and command line of a record."""
    command = shlex.join(["python", *sys.argv])
    return f"## {datetime.date.today().isoformat()}: {subject}, {device_name()}\n\n`{command}`\n"


def record(directory: Path, name: str, *, title: str, text: str, raw: dict[str, Any]) -> Path:
    """Appends a section to ``NAME.md``, and writes all single figures to ``NAME-DATE-DEVICE.json``; returns that path.

    A second record of a day gets a number of its own.
    """
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    page = directory / f"{name}.md"
    old = page.read_text() if page.exists() else f"# {title}\n"
    page.write_text(old.rstrip("\n") + "\n\n" + text.rstrip("\n") + "\n")
    stem = f"{name}-{datetime.date.today().isoformat()}-{'gpu' if torch.cuda.is_available() else 'cpu'}"
    path, number = directory / f"{stem}.json", 2
    while path.exists():
        path, number = directory / f"{stem}-{number}.json", number + 1
    path.write_text(json.dumps(raw, indent=1) + "\n")
    return path
