"""scripts/gpu_day.sh: every part of the first day on GPUs, at a tiny size on a CPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("doctor", "tests", "kernels", "steps", "steps_fp8", "parity", "run")


def day(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["scripts/gpu_day.sh", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.timeout(1800)  # seven parts, two of them with processes of their own
def test_every_part_runs_and_leaves_its_record(tmp_path):
    done = day("--small", "--out", str(tmp_path))
    logs = {name: (tmp_path / f"{name}.log").read_text()[-2000:] for name in PARTS}
    assert done.returncode == 0, done.stdout + done.stderr + str(logs)
    assert [line.split()[1] for line in done.stdout.splitlines()[:-1]] == list(PARTS)
    for name in ("kernels", "step", "parity", "gpu_run"):
        assert (tmp_path / f"{name}.md").read_text().count("\n") > 5
    steps = (tmp_path / "step.md").read_text()
    assert "| remit, cached |" in steps and "Without FP8: it needs Transformer Engine and a GPU." in steps
    assert "| olmo2_1b | bfloat16 |" in (tmp_path / "parity.md").read_text()


def test_a_node_without_a_gpu_is_refused(tmp_path):
    done = day("--out", str(tmp_path))
    assert done.returncode == 2 and "no GPU here" in done.stderr
