"""The terminal for what matters: what the libraries say goes into ``logs/rank_N.log``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def logs_in(run_dir: Path, rank: int) -> Iterator[None]:
    """Sends all that is logged, and Python's warnings, to the rank's file; the terminal gets remit's warnings.

    Everything is as it was afterwards.
    """
    import datasets.utils.logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    file = logging.FileHandler(run_dir / "logs" / f"rank_{rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def ours(record: logging.LogRecord) -> bool:
        return record.name.startswith("remit_megatron") and rank == 0

    terminals = list(root.handlers)
    library = logging.getLogger("transformers")
    before = (root.level, library.propagate, list(library.handlers), warnings.showwarning)
    bars = datasets_logging.is_progress_bar_enabled()
    for terminal in terminals:
        terminal.addFilter(ours)
    root.addHandler(file)
    root.setLevel(logging.INFO)
    library.handlers, library.propagate = [], True
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        transformers_logging.enable_progress_bar()
        if bars:
            datasets_logging.enable_progress_bar()
        root.removeHandler(file)
        file.close()
        for terminal in terminals:
            terminal.removeFilter(ours)
        root.setLevel(before[0])
        library.propagate, library.handlers = before[1], before[2]
