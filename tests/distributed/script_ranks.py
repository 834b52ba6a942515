"""Runs a test module as a script on several ranks, for tests of code that knows nothing of Megatron."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_script(script: str, folder: Path, world: int) -> list[Any]:
    """Runs ``script RANK FOLDER`` as ``world`` processes; returns what each saved as ``FOLDER/RANK.pt``."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = []
    for rank in range(world):
        log = (folder / f"{rank}.log").open("w")
        command = [sys.executable, script, str(rank), str(folder)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
