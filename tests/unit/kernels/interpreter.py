"""Kernels in Triton's interpreter: it is for a whole process, so that the file of the tests runs as a script in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def run_interpreted(script: str, folder: Path, *, timeout: float | None = None) -> Any:
    """What ``script`` saves (torch.save) in the file that it is given, which is in ``folder``."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    file = folder / "results.pt"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, script, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(file)
