"""``train.sbatch`` on two nodes: to the end, and preempted, killed, hung on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.cluster.conftest import STEPS
from tests.cluster.slurm import REPOSITORY, Cluster, Job
from tests.integration.conftest import write
from tests.integration.test_resume import losses, tensors


@pytest.fixture(scope="module")
def straight(config_for, cluster, tmp_path_factory) -> Path:
    """The run that nobody disturbs: four ranks on this machine, without Slurm."""
    root = tmp_path_factory.mktemp("straight")
    path = write(root / "run.yaml", config_for(root / "run"))
    command = [sys.executable, "-m", "remit_megatron", "train", str(path), "--nproc", "4"]
    done = subprocess.run(command, cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return root / "run"


def assert_equal(run_dir: Path, straight: Path) -> None:
    """Losses of every step, and all weights and moments at the end, bit for bit."""
    assert losses(run_dir) == losses(straight)
    found, expected = tensors(run_dir, STEPS), tensors(straight, STEPS)
    assert set(found) == set(expected) and len(found) > 10
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def steps_done(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.fixture
def start(cluster: Cluster, config_for, tmp_path: Path):
    """Submits a training run on two nodes with two ranks each; gives the job and its run directory."""

    def submit(
        *, options: tuple[str, ...] = (), variables: dict[str, str] | None = None, **megatron
    ) -> tuple[Job, Path]:
        path = write(tmp_path / "run.yaml", config_for(tmp_path / "run", **megatron))
        job = cluster.submit("train", path, log=tmp_path / "job.out", options=options, **(variables or {}))
        return job, tmp_path / "run"

    return submit


def test_two_nodes_give_the_numbers_of_one_machine(start, straight) -> None:
    job, run_dir = start()
    assert job.end() == ("COMPLETED", 0), job.said()
    assert "start 1: 4 ranks on 2 nodes" in job.said() and "done" in job.said()
    assert_equal(run_dir, straight)


def test_preempted_five_times(start, straight) -> None:
    """Every rank gets SIGTERM at a moment drawn by chance, in the set-up as well, saves if there is something to save,
    and leaves with 75; the script requeues the job."""
    job, run_dir = start(save_interval=10_000)
    moments = random.Random(7)
    for number in range(5):
        job.wait_for(f"start {number + 1}:", seconds=180)
        job.until(lambda: len(job.pids()) == 4, seconds=120, name="four ranks")
        if number % 2:
            goal = steps_done(run_dir) + moments.randint(5, 25)
            job.until(lambda goal=goal: steps_done(run_dir) >= goal, seconds=180, name=f"step {goal}", every=0.05)
        else:
            time.sleep(moments.uniform(0.5, 8))
        job.signal("TERM")
        job.wait_for("requeued to go on", times=number + 1, seconds=120)
    assert job.end() == ("COMPLETED", 0), job.said()
    said = job.said()
    assert "start 6:" in said and f"step {STEPS}/{STEPS}" in said
    assert said.count("which is saved; start it again to go on") >= 2, "moments in training"
    assert said.count("before the first step, nothing is lost") >= 1, "moments in the set-up"
    assert_equal(run_dir, straight)


def test_a_node_that_goes_down(start, straight, cluster: Cluster) -> None:
    """Slurm requeues the job; no rank of its first start is in the way of the second."""
    job, run_dir = start()
    job.until(lambda: steps_done(run_dir) > 50, seconds=180, name="step 51")
    try:
        cluster.node("n2", down=True)
        job.until(lambda: job.state() == "PENDING", seconds=120, name="requeue")
    finally:
        cluster.node("n2", down=False)
    assert job.end() == ("COMPLETED", 0), job.said()
    assert "start 2:" in job.said() and "resuming at step 40" in job.said()
    assert_equal(run_dir, straight)


def test_a_rank_that_is_killed(start, straight) -> None:
    job, run_dir = start()
    job.until(lambda: steps_done(run_dir) > 50, seconds=180, name="step 51")
    os.kill(job.pids()[3], signal.SIGKILL)
    job.wait_for("exit code 137, crash 1 in a row (REMIT_CRASHES allows 3); requeued to go on")
    assert job.end() == ("COMPLETED", 0), job.said()
    assert "resuming at step 40" in job.said()
    assert_equal(run_dir, straight)
    assert not list(REPOSITORY.glob(f".remit-crashes-{job.id}"))


def test_a_rank_that_hangs(start) -> None:
    """The others give up after the time limit of a collective; then every rank says where it is."""
    job, run_dir = start(
        variables={"REMIT_CRASHES": "0", "REMIT_STACKS_AFTER": "5"}, distributed_timeout_minutes=1, train_iters=100_000
    )
    job.until(lambda: steps_done(run_dir) > 20, seconds=180, name="step 21")
    stopped, before = job.pids()[2], time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    state, code = job.end(seconds=300)
    took = time.monotonic() - before
    assert state == "FAILED" and code not in (0, 2, 70, 75)
    said = job.said()
    assert took < 60 + 120 + 30, f"took {took:.0f} s"
    assert "their stacks follow" in said and "crash 1 in a row: not started again by itself" in said
    for rank in range(4):
        own = [line.split(": ", 1)[1] for line in said.splitlines() if line.startswith(f"{rank}: ")]
        text = "\n".join(own)
        assert ("Traceback" in text or "Thread 0x" in text) and "remit_megatron/training/command.py" in text, rank


def test_cancelled_is_not_started_again(start) -> None:
    job, run_dir = start(train_iters=100_000)
    job.until(lambda: steps_done(run_dir) > 5, seconds=180, name="step 6")
    job.cluster.call("scancel", job.id)
    state, _ = job.end()
    assert state == "CANCELLED"
    time.sleep(3)
    assert job.state() == "CANCELLED", job.said()


def test_time_limit(start) -> None:
    """A signal before the end of ``--time``, as sbatch was told; the run goes on where it stopped."""
    job, run_dir = start(options=("--time=3", "--signal=TERM@60"), train_iters=100_000, save_interval=100_000)
    job.wait_for("start 2:", seconds=360)
    saved = json.loads((run_dir / "checkpoints" / "latest").read_text())["iteration"]
    assert f"stopped at step {saved} of 100000, which is saved" in job.said()
    job.wait_for(f"resuming at step {saved}")
    job.cluster.call("scancel", "--full", job.id)
    job.end()
