"""A chain as jobs: what sbatch is asked for, what the batch script starts, what is known. Slurm is a recorder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remit_megatron.flywheel.plan import Plan
from remit_megatron.flywheel.runner import Runner
from remit_megatron.flywheel.slurm import SCRIPT, submit
from remit_megatron.flywheel.starting import LAUNCHER, start
from remit_megatron.flywheel.state import status, status_text
from remit_megatron.runtime.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
# Numbers jobs from 101, notes how it was called, and refuses what it is told to.
SBATCH = """
echo "$*" >> calls
if [[ -n "${FAKE_REFUSED:-}" && "$*" == *"$FAKE_REFUSED"* ]]; then
  echo "sbatch: error: Batch job submission failed: invalid partition" >&2
  exit 1
fi
echo "$((100 + $(wc -l < calls)));cluster"
"""


def program(folder: Path, name: str, source: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{source}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(elsewhere, monkeypatch) -> Path:
    """A directory with the script and Slurm's programs on the PATH; the queue is what the file `queue` says."""
    (elsewhere / SCRIPT).parent.mkdir(parents=True)
    (elsewhere / SCRIPT).write_text("")
    folder = elsewhere / "bin"
    program(folder, "sbatch", SBATCH)
    program(folder, "squeue", "cat queue 2> /dev/null || true")
    program(folder, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return elsewhere


@pytest.fixture
def chain(worker, flywheel) -> str:
    """c needs a and waits for b; d is one with a, and so is its job."""
    stages = {
        "a": worker(slurm={"nodes": 4, "exclusive": True}),
        "b": worker("x", slurm={"partition": "small"}),
        "c": worker("${stage:a}", after=["b"]),
        "d": worker("${stage:c}"),
    }
    return flywheel(stages, slurm={"time": "01:00:00", "nodes": 1})


def calls() -> list[list[str]]:
    return [line.split() for line in Path("calls").read_text().splitlines()]


def test_the_whole_chain_at_once(cluster, chain, capsys) -> None:
    plan = Plan(chain, ["seed=3"])
    assert submit(plan) == 4
    found = calls()
    dependencies = [next((word for word in call if word.startswith("--dependency")), None) for call in found]
    assert dependencies == [None, None, "--dependency=afterok:101:102", "--dependency=afterok:103"]
    assert ["--kill-on-invalid-dep=yes" in call for call in found] == [False, False, True, True]
    assert {"--nodes=4", "--exclusive", "--time=01:00:00", "--parsable", "--job-name=round1/a"} <= set(found[0])
    assert {"--nodes=1", "--partition=small"} <= set(found[1])
    key = plan.planned["round1/c"].key
    assert found[2][-5:] == [SCRIPT, chain, "round1/c", f"--key={key}", "seed=3"]
    assert json.loads(Path("out/jobs.json").read_text())["round1/d"]["id"] == "104"


def test_submitted_again_only_what_has_no_job(cluster, chain, capsys) -> None:
    submit(Plan(chain))
    Path("queue").write_text("101 RUNNING\n103 PENDING\n")  # 102 is gone, and 104 was cancelled
    assert submit(Plan(chain)) == 2
    again = calls()[4:]
    assert [call[-2] for call in again] == ["round1/b", "round1/d"]
    assert "--dependency=afterok:103" in again[1]
    with pytest.raises(UserError, match=r"job 101 of round1/a: found key .* scancel it"):
        submit(Plan(chain, ["stages.a.output=other"]))


def test_what_is_done_is_not_waited_for(cluster, chain, capsys) -> None:
    plan = Plan(chain)
    assert Runner(plan).step(plan.chain.find("a")) == 0
    submit(plan)
    assert len(calls()) == 3 and "--dependency=afterok:101" in calls()[1]  # c behind b


def test_a_job_that_slurm_refuses(cluster, chain, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_REFUSED", "round1/c")
    with pytest.raises(UserError, match=r"sbatch for round1/c: found sbatch: error: .* invalid partition"):
        submit(Plan(chain))
    assert set(json.loads(Path("out/jobs.json").read_text())) == {"round1/a", "round1/b"}


def test_no_slurm_here(elsewhere, chain, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"--slurm: found no scripts/slurm/flywheel_step\.sbatch"):
        submit(Plan(chain))
    (elsewhere / SCRIPT).parent.mkdir(parents=True)
    (elsewhere / SCRIPT).write_text("")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="--slurm: found no sbatch on the PATH"):
        submit(Plan(chain))


def test_states_of_jobs_are_unknown_where_nobody_says(cluster, chain, capsys) -> None:
    submit(Plan(chain))
    Path("queue").write_text("101 RUNNING\n")
    found = status(Plan(chain))["stages"]
    assert [found[f"round1/{name}"]["job"]["state"] for name in "abcd"] == ["RUNNING", *["unknown"] * 3]
    program(cluster / "bin", "sacct", 'printf "102|COMPLETED\\n103|CANCELLED by 0\\n"')
    states = [line.split()[-1] for line in status_text(Plan(chain)).splitlines()[2:6]]
    assert states == ["RUNNING", "COMPLETED", "CANCELLED", "unknown"]


def test_a_failed_step_says_what_will_not_run(cluster, chain, capsys) -> None:
    plan = Plan(chain)
    plan.planned["round1/a"].directory.mkdir(parents=True)
    (plan.planned["round1/a"].directory / "code").write_text("70")
    assert Runner(plan).step(plan.chain.find("a")) == 70
    assert "round1/a failed with 70: what needs it will not run: round1/c, round1/d" in capsys.readouterr().out
    assert status(plan)["stages"]["round1/d"]["note"] == "needs round1/c, which is blocked"
    with pytest.raises(UserError, match=r"round1/a: found a stage that failed.*--retry"):
        submit(Plan(chain))


# The batch script.


@pytest.fixture
def job(elsewhere, monkeypatch):
    """Runs the script as Slurm would; the step is a recorder."""
    folder = elsewhere / "scripts" / "slurm"
    folder.mkdir(parents=True)
    for name in ("flywheel_step.sbatch", "ranks.sh"):
        shutil.copy(REPOSITORY / "scripts" / "slurm" / name, folder / name)
    program(
        elsewhere / "bin", "scontrol", 'if [[ "$1 $2" == "show hostnames" ]]; then echo n7; echo n8; else echo "$*"; fi'
    )
    (elsewhere / ".venv" / "bin").mkdir(parents=True)
    record = 'echo "$*"; echo "$REMIT_FLYWHEEL_LAUNCHER"; trap "echo told; exit 75" TERM; '
    program(
        elsewhere / ".venv" / "bin",
        "remit",
        record + 'touch begun; sleep "${FAKE_SLEEP:-0}" > /dev/null 2>&1 & wait; exit "$FAKE_CODE"',
    )
    environment = {
        "PATH": f"{elsewhere / 'bin'}:/usr/bin:/bin",
        "SLURM_JOB_ID": "20017",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_SUBMIT_DIR": str(elsewhere),
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_CPUS_PER_TASK": "4",
        "REMIT_CONTAINER": "",
        "FAKE_CODE": "0",
    }

    def begin(*words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(folder / "flywheel_step.sbatch"), *words],
            env=environment | more,
            cwd=elsewhere,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (2, False), (70, False), (137, True)])
def test_the_script_runs_one_step(job, elsewhere, code, requeued) -> None:
    process = job("f.yaml", "round1/a", "seed=3", FAKE_CODE=str(code))
    said, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    words, launcher, *rest = said.splitlines()
    assert words == "flywheel step f.yaml round1/a seed=3"
    remit = elsewhere / ".venv" / "bin" / "remit"
    expected = ["srun", "--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=4", "--ntasks=16", str(remit)]
    assert launcher.split() == expected
    assert ("requeue 20017" in " ".join(rest)) is requeued


def test_the_script_passes_a_signal_on_and_takes_the_code_of_the_step(job, elsewhere) -> None:
    process = job("f.yaml", "round1/a", FAKE_SLEEP="30")
    deadline = time.monotonic() + 60
    while not (elsewhere / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "told" in said and "requeue 20017" in said


def test_the_script_says_what_is_missing(job, elsewhere) -> None:
    for words, missing in ((("f.yaml",), "found no stage"), (("f.yaml", "a"), ".venv/bin/remit: not there")):
        if missing.startswith(".venv"):
            (elsewhere / ".venv" / "bin" / "remit").unlink()
        process = job(*words)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2 and missing in errors and len(errors.splitlines()) == 1


def test_ranks_are_started_by_the_launcher_of_a_job(elsewhere, monkeypatch) -> None:
    program(elsewhere / "bin", "fake_srun", 'echo "srun got $*"')
    monkeypatch.setenv(LAUNCHER, f"{elsewhere}/bin/fake_srun --ntasks=16 remit")
    (elsewhere / "stage").mkdir()
    log = elsewhere / "stage" / "log.txt"
    assert start(["train", "run.yaml"], 1, log) == 0
    assert "srun got --ntasks=16 remit train run.yaml" in log.read_text()
    # Some start their ranks on one node by themselves.
    assert start(["posttrain", "sft", "sft.yaml"], 8, log) == 0
    expected = "srun got --ntasks=16 --nodes=1 --ntasks=1 remit posttrain sft sft.yaml --nproc 8"
    assert expected in log.read_text()
    # What has no ranks runs beside the step.
    assert start(["doctor", "--nothing"], None, log) == 2
    assert f"$ {sys.executable} -m remit_megatron doctor --nothing" in log.read_text()
    assert os.environ[LAUNCHER]
