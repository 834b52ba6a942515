"""scripts/gpu_day.sh: every part of the first day on GPUs, at a tiny size on a CPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("doctor", "tests", "kernels", "steps", "steps_fp8", "parity", "layouts", "run")


def day(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["scripts/gpu_day.sh", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # eight parts, three of them with processes of their own
def test_every_part_runs_and_leaves_its_record(tmp_path):
    done = day("--small", "--out", str(tmp_path))
    logs = {name: next(tmp_path.glob(f"gpu_day-*-{name}.log")).read_text()[-2000:] for name in PARTS}
    assert done.returncode == 0, done.stdout + done.stderr + str(logs)
    assert [line.split()[1] for line in done.stdout.splitlines()[:-1]] == list(PARTS)
    for name in ("kernels", "step", "parity", "gpu_run", "gpu_day"):
        assert (tmp_path / f"{name}.md").read_text().count("\n") > 5
    steps = (tmp_path / "step.md").read_text()
    assert "| remit, cached |" in steps and "Without FP8: it needs Transformer Engine and a GPU." in steps
    assert re.search(r"\| kd \|.* x remit \|", steps)
    one, many = re.findall(r"operations that are dispatched: (\d+) with 1, (\d+) with 32\.", steps)[0]
    assert 0 < int(many) <= 1.05 * int(one)
    assert "kd's divergence" in (tmp_path / "kernels.md").read_text()
    rows = [line.split(" | ") for line in (tmp_path / "parity.md").read_text().splitlines() if line.endswith("| yes |")]
    found = {(row[0].lstrip("| "), row[1], row[2], row[5]) for row in rows}
    for family in ("olmo2_1b", "smollm3_3b", "youtu_2b", "smollm2_135m"):
        assert {(family, "one", dtype, "pipeline") for dtype in ("float32", "bfloat16")} <= found
    layouts = ("tp2", "tp2_sp", "pp2", "pp2_virtual", "cp2", "tp2_pp2", "tp2_cp2")
    assert {("olmo2_1b", layout, "bfloat16", "pipeline") for layout in layouts} <= found
    assert {("olmo2_1b", layout, "float32", "replicated") for layout in ("pp2", "pp2_virtual", "tp2_pp2")} <= found
    run = (tmp_path / "gpu_run.md").read_text()
    assert "again 0.0e+00, resumed 0.0e+00, cached 0.0e+00, replicated " in run and "of step 6" in run
    day_record = (tmp_path / "gpu_day.md").read_text()
    assert all(f"| {name} | passed |" in day_record for name in PARTS) and "What `remit doctor` said:" in day_record


def test_a_node_without_a_gpu_is_refused(tmp_path):
    done = day("--out", str(tmp_path))
    assert done.returncode == 2 and "no GPU here" in done.stderr
