"""The scripts of a day on GPUs: what they call wrong, and what they refuse."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
DAY = REPOSITORY / "scripts" / "gpu_day.sh"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts' folder on the path, as when one of them runs."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))


# gpu_day.sh.


def full_parts() -> list[tuple[str, int]]:
    """Name and time limit of each part on GPUs, in order."""
    return [(name, int(limit)) for name, limit in re.findall(r"^ +part (\w+) (\d+) ", on_gpus(), re.MULTILINE)]


def on_gpus() -> str:
    return DAY.read_text().partition("\nelse\n")[2]


def test_the_limits_add_up_to_an_hour_in_the_order_of_the_day():
    names, limits = zip(*full_parts(), strict=True)
    assert names == ("doctor", "tests", "kernels", "steps", "steps_fp8", "parity", "layouts", "run")
    assert 3000 <= sum(limits) <= 3600
    small = re.findall(r"^ +part (\w+) \d+ ", DAY.read_text().partition("\nelse\n")[0], re.MULTILINE)
    assert tuple(small) == names, "the tests run every part"


@pytest.mark.parametrize("python", ["exit 1", "echo nothing", None])
def test_a_python_without_torch_is_refused_before_any_part(tmp_path, python):
    script = tmp_path / "scripts" / "gpu_day.sh"
    script.parent.mkdir()
    shutil.copy(DAY, script)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "mkdir", "date"):
        (tools / name).symlink_to(str(shutil.which(name)))
    if python is not None:
        (tools / "python").write_text(f"#!/bin/sh\n{python}\n")
        (tools / "python").chmod(0o755)
    environment = {"PATH": str(tools)}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "python: found none that imports torch; expected that of ./scripts/setup.sh, or of the image\n"
    )
    assert not (tmp_path / "docs").exists()


def test_logs_of_a_day_are_no_part_of_the_repository():
    """gpu_day.sh leaves them beside the records."""
    ignored = subprocess.run(["git", "check-ignore", "docs/benchmarks/gpu_day-x.log"], cwd=REPOSITORY, check=False)
    if ignored.returncode == 128:
        pytest.skip("no repository of git here")
    assert ignored.returncode == 0


def test_tests_that_were_all_left_out_have_not_passed():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "scripts/gpu_tests.py", "-p", "no:cacheprovider"]
    settings: Any = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, **settings)
    assert done.returncode == 1
    assert re.fullmatch(r"0 tests ran, [1-9]\d+ were left out; expected at most 2.*", done.stdout.splitlines()[-1])


def test_what_ranks_that_share_layers_need_is_set_before_torch_is_asked():
    code = "import os, benchmarking; print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'])"
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    for value, expected in ((None, "1"), ("8", "8")):
        own = environment if value is None else environment | {"CUDA_DEVICE_MAX_CONNECTIONS": value}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=REPOSITORY / "scripts", env=own, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected]
    assert re.search(r"^export CUDA_DEVICE_MAX_CONNECTIONS=", DAY.read_text(), re.MULTILINE)


def test_every_script_that_takes_a_runs_arguments_sets_it():
    for path in (REPOSITORY / "scripts").glob("*.py"):
        text = path.read_text()
        if "build_arguments" in text or "training.command" in text:
            assert re.search(r"^(import|from) benchmarking", text, re.MULTILINE), path.name


# gpu_run.py.

LOSSES = [5.0 - 0.1 * step for step in range(7)]
CODES = {"straight": 0, "again": 0, "stopped": 75, "resumed": 0, "scored": 0, "cached": 0}


def moved(by: float) -> list[float]:
    return [*LOSSES[:4], *(loss + by for loss in LOSSES[4:])]


def faults(again: list[float] = LOSSES, resumed: list[float] = LOSSES, **others: Any) -> list[str]:
    from gpu_run import faults as judge  # type: ignore[import-not-found]

    found = {"straight": LOSSES, "again": again, "resumed": resumed, "cached": LOSSES} | others.pop("found", {})
    return judge(others.pop("codes", CODES), found, 1000, others.pop("peaks", [None]))[0]


def test_a_resumed_run_is_judged_by_how_far_two_whole_ones_are_apart(scripts):
    assert faults() == []
    assert faults(resumed=moved(2e-5)) == ["resumed: 2.0e-05 apart, more than 1.0e-05"]
    assert faults(again=moved(1e-5), resumed=moved(2e-5)) == []
    assert faults(again=moved(1e-5), resumed=moved(8e-5)) == ["resumed: 8.0e-05 apart, more than 5.0e-05"]
    (one,) = faults(again=moved(0.01), resumed=moved(0.02))
    assert one == "two runs of the same are 1.0e-02 apart, more than 0.001"
    assert faults(resumed=moved(float("nan"))) == ["resumed: inf apart, more than 1.0e-05"]


def test_runs_that_are_short_or_end_otherwise_are_wrong(scripts):
    assert faults(codes=CODES | {"stopped": 0}) == ["stopped: exit code 0"]
    assert faults(resumed=LOSSES[:5])[0] == "resumed: 5 steps of 7"
    both = {"pipeline": LOSSES, "replicated": moved(1e-3)}
    assert faults(found=both) == ["replicated: 1.0e-03 apart, more than 1.0e-05"]
    assert faults(found=both | {"replicated": LOSSES}) == []
    assert faults(found={"cached": moved(2e-5)}) == ["cached: 2.0e-05 apart, more than 1.0e-05"]


@pytest.mark.parametrize(("peak", "good"), [(None, True), (1080, True), (1081, False), (715, True), (714, False)])
def test_memory_is_judged_beside_the_plan(scripts, peak, good):
    assert (faults(peaks=[1000, peak]) == []) is good


# gpu_parity.py.

THEIRS = {"mean": 1e-2, "largest": 5e-2, "gradients": {"a": 0.01, "b": 0.02}}


def result(dtype: str, **changes: Any) -> dict[str, Any]:
    losses = {"mean": 1e-5, "largest": 1e-4} | changes.pop("losses", {})
    small = {"a": 1e-5, "b c": 1e-5}
    own = {"dtype": dtype, "mean_loss_error": 0.0, "losses": {"pipeline": losses}}
    return own | {"gradients": {"ntp": small, "kd": changes.pop("gradients", small)}} | changes


@pytest.mark.parametrize(
    ("dtype", "changes", "good"),
    [
        ("float32", {}, True),
        ("float32", {"losses": {"largest": 2e-3}}, False),
        ("float32", {"gradients": {"a": 2e-3, "b": 0.0}}, False),
        ("float32", {"mean_loss_error": 2e-3}, False),
        ("float32", {"gradients": {}}, False),
        ("bfloat16", {"losses": {"mean": 1.4e-2, "largest": 1.0}, "gradients": {"a": 0.004, "b c": 0.039}}, True),
        ("bfloat16", {"losses": {"mean": 1.6e-2}}, False),
        ("bfloat16", {"gradients": {"a": 0.001, "b c": 0.041}}, False),
        ("bfloat16", {"gradients": {"a": 0.025, "b c": 0.025}}, False),
        ("bfloat16", {"gradients": {"a": float("nan"), "b c": 0.0}}, False),
        ("bfloat16", {"gradients": {"a": 0.0, "b c": float("nan")}}, False),
        ("bfloat16", {"losses": {"mean": float("nan")}}, False),
    ],
)
def test_parity_is_judged_by_losses_and_gradients(scripts, dtype, changes, good):
    from gpu_parity import judge  # type: ignore[import-not-found]

    assert judge(result(dtype, **changes), THEIRS) is good


def test_ranks_that_fail_are_a_case_that_failed_and_the_others_go_on(scripts, tmp_path, monkeypatch):
    import gpu_parity  # type: ignore[import-not-found]

    from remit_megatron.runtime import launch

    def broken(nproc: int, argv: list[str], *, module: str) -> int:
        folder = Path(argv[0])
        jobs = gpu_parity.json.loads((folder / "jobs.json").read_text())
        with (folder / "results.jsonl").open("a") as file:
            for job in jobs:
                if job["layout"] == "cp2":
                    return 1
                file.write(gpu_parity.json.dumps(job | result("float32") | {"layers": "local"}) + "\n")
        return 0

    monkeypatch.setattr(launch, "launch", broken)
    jobs = [{"case": "f/x-1", "layout": layout, "dtype": "float32"} for layout in ("tp2", "cp2", "pp2")]
    results = gpu_parity.run_jobs(tmp_path, 2, jobs)
    assert [found["layout"] for found in results] == ["tp2", "cp2", "pp2"]
    assert ["failed" in found for found in results] == [False, True, False]
    rows, good = gpu_parity.rows_of(results, {"f/x-1": THEIRS})
    assert not good and [row[-1] for row in rows] == ["yes", "NO", "yes"] and len({len(row) for row in rows}) == 1


def test_what_there_was_when_the_time_was_up_is_reported(scripts, tmp_path, monkeypatch):
    import gpu_parity  # type: ignore[import-not-found]

    from remit_megatron.runtime import launch

    starts = []
    monkeypatch.setattr(launch, "launch", lambda *args, **settings: starts.append(args) or 143)
    jobs = [{"case": "f/x-1", "layout": layout, "dtype": "float32"} for layout in ("tp2", "pp2")]
    results = gpu_parity.run_jobs(tmp_path, 2, jobs)
    assert len(starts) == 1 and [found["failed"] for found in results] == [143, 143]
    assert gpu_parity.rows_of(results, {"f/x-1": THEIRS})[1] is False


def test_every_layout_that_fits_is_taken_and_none_that_a_run_would_refuse(scripts):
    from gpu_parity_ranks import LAYOUTS, ranks_of  # type: ignore[import-not-found]

    assert {name: ranks_of(name) for name in LAYOUTS} == {
        "one": 1, "tp2": 2, "tp2_sp": 2, "pp2": 2, "pp2_virtual": 2, "cp2": 2, "tp2_pp2": 4, "tp2_cp2": 4,
    }  # fmt: skip
