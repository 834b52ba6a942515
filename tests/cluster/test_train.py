"""``train.sbatch`` on two nodes: to the end, and preempted, killed, hung on the way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.cluster.conftest import SAVE_INTERVAL, STEPS
from tests.cluster.slurm import PATIENCE, REPOSITORY, Cluster, Job, environment_of
from tests.integration.conftest import write
from tests.integration.test_resume import losses, tensors


@pytest.fixture(scope="module")
def straight(config_for, cluster, tmp_path_factory) -> Path:
    """The run that nobody disturbs: four ranks on this machine, without Slurm."""
    root = tmp_path_factory.mktemp("straight")
    path = write(root / "run.yaml", config_for(root / "run"))
    command = [sys.executable, "-m", "remit_megatron", "train", str(path), "--nproc", "4"]
    environment = cluster.environment
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE)
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


def saved(run_dir: Path) -> int:
    """Step of the newest checkpoint that is declared complete; 0 where there is none."""
    latest = run_dir / "checkpoints" / "latest"
    return json.loads(latest.read_text())["iteration"] if latest.exists() else 0


def resumed_at(job: Job) -> list[int]:
    """The step that each start of the job has gone on from."""
    return [int(number) for number in re.findall(r"resuming at step (\d+)", job.said())]


def until_step(job: Job, run_dir: Path, step: int) -> None:
    job.until(lambda: steps_done(run_dir) >= step, name=f"step {step}")


def until_ranks(job: Job, count: int = 4) -> dict[int, int]:
    return job.until(lambda: pids if len(pids := job.pids()) == count else None, name=f"{count} ranks")


@pytest.fixture
def start(cluster: Cluster, config_for, tmp_path: Path):
    """Submits a training run on two nodes with two ranks each; gives the job and its run directory."""

    def submit(
        *, options: tuple[str, ...] = (), variables: dict[str, str] | None = None, **megatron
    ) -> tuple[Job, Path]:
        path = write(tmp_path / "run.yaml", config_for(tmp_path / "run", **megatron))
        job = cluster.submit("train", path, log=tmp_path / "job.out", options=options, variables=variables)
        return job, tmp_path / "run"

    return submit


def test_two_nodes_give_the_numbers_of_one_machine(start, straight) -> None:
    job, run_dir = start()
    assert {environment_of(pid)[b"CUDA_VISIBLE_DEVICES"] for pid in until_ranks(job).values()} == {b"0,1"}
    assert job.end() == ("COMPLETED", 0), job.said()
    assert "start 1: 4 ranks on 2 nodes" in job.said() and "done" in job.said()
    assert_equal(run_dir, straight)


def test_preempted_five_times(start, straight) -> None:
    """Every rank gets SIGTERM at a moment drawn by chance, in the set-up as well, saves if there is something to save,
    and leaves with 75; the script requeues the job."""
    job, run_dir = start(save_interval=10_000)
    draw = random.Random(7)
    log = run_dir / "logs" / "rank_0.log"
    moments = ["start", "imports", "run directory", "steps", "steps"]
    draw.shuffle(moments)
    for number, moment in enumerate(moments, start=1):
        before = log.stat().st_size if log.exists() else 0
        job.wait_for(f"start {number}:")
        pids = until_ranks(job)
        if moment == "imports":
            job.until(lambda pid=pids[0]: "/libtorch" in Path(f"/proc/{pid}/maps").read_text(), name="import of torch")
        elif moment == "run directory":
            job.until(lambda before=before: log.exists() and log.stat().st_size > before, name="line in the log")
        elif moment == "steps":
            until_step(job, run_dir, steps_done(run_dir) + draw.randint(3, 12))
        time.sleep(draw.uniform(0, 0.5) if moment not in ("start", "steps") else 0)  # start: before Python handles it
        with job.held():
            job.signal("TERM")
        job.wait_for("requeued to go on", times=number)
    assert job.end() == ("COMPLETED", 0), job.said()
    said = job.said()
    assert "start 6:" in said and f"step {STEPS}/{STEPS}" in said
    assert said.count("which is saved; start it again to go on") >= 2, "moments in training"
    assert said.count("before the first step, nothing is lost") >= 1, "moments in the set-up"
    assert "crash" not in said
    assert_equal(run_dir, straight)


def test_a_node_that_goes_down(start, straight, cluster: Cluster) -> None:
    """Slurm requeues the job; no rank of its first start is in the way of the second."""
    job, run_dir = start()
    until_step(job, run_dir, SAVE_INTERVAL + 1)
    with job.held() as pids:
        step = saved(run_dir)
        cluster.node("n2", down=True)
        for rank in (2, 3):  # a node takes its ranks with it
            os.kill(pids[rank], signal.SIGKILL)
    job.until(lambda: job.fields()["Restarts"] == "1", name="requeue")
    cluster.node("n2", down=False)
    assert job.end() == ("COMPLETED", 0), job.said()
    assert "start 2:" in job.said() and step >= SAVE_INTERVAL and resumed_at(job)[0] >= step
    assert_equal(run_dir, straight)


def test_a_rank_that_is_killed(start, straight) -> None:
    job, run_dir = start(variables={"REMIT_STACKS_AFTER": "5"})
    until_step(job, run_dir, SAVE_INTERVAL + 1)
    with job.held() as pids:
        step = saved(run_dir)
        os.kill(pids[3], signal.SIGKILL)
    job.wait_for("exit code 137, crash 1 in a row (REMIT_CRASHES allows 3); requeued to go on")
    assert job.end() == ("COMPLETED", 0), job.said()
    assert step >= SAVE_INTERVAL and resumed_at(job)[0] >= step
    assert_equal(run_dir, straight)
    assert not list(REPOSITORY.glob(f".remit-crashes-{job.id}"))


def test_a_rank_that_hangs(start) -> None:
    """The others give up after the time limit of a collective; then every rank says where it is, and the job ends.

    docs/operations/hang.md states when: after ``distributed_timeout_minutes`` and the two minutes of srun's ``--wait``.
    """
    job, run_dir = start(
        variables={"REMIT_CRASHES": "0", "REMIT_STACKS_AFTER": "5"}, distributed_timeout_minutes=1, train_iters=100_000
    )
    until_step(job, run_dir, 5)
    os.kill(job.pids()[2], signal.SIGSTOP)
    state, code = job.end()
    assert state == "FAILED" and code not in (0, 2, 70, 75)
    said = job.said()
    assert "their stacks follow" in said and "crash 1 in a row: not started again by itself" in said
    for rank in range(4):
        own = [line.split(": ", 1)[1] for line in said.splitlines() if line.startswith(f"{rank}: ")]
        text = "\n".join(own)
        assert ("Traceback" in text or "Thread 0x" in text) and "remit_megatron/training/command.py" in text, rank


def test_cancelled_is_not_started_again(start) -> None:
    job, run_dir = start(train_iters=100_000)
    until_step(job, run_dir, 3)
    job.cluster.call("scancel", job.id)
    # Which it says when all of its processes are gone, the script too: there is nobody left to requeue it.
    state, _ = job.end()
    assert state == "CANCELLED" and not job.pids(), job.said()
    assert job.fields()["Restarts"] == "0"


def test_time_limit(start) -> None:
    """The script's own signal before the end of ``--time``; the run goes on where it stopped."""
    job, run_dir = start(options=("--time=120",), train_iters=100_000, save_interval=100_000)
    until_step(job, run_dir, 3)
    hours, minutes, _ = map(int, job.fields()["RunTime"].split(":"))
    # The end is set to where the 300 s before it begin now: a start that takes minutes has no part in it.
    job.update(f"TimeLimit={60 * hours + minutes + 5}")
    job.wait_for("stopped before its end; requeued to go on")
    step = saved(run_dir)
    assert step >= 3 and f"stopped at step {step} of 100000, which is saved" in job.said()
    job.until(lambda: job.state() == "PENDING", name="requeue")
    job.update("TimeLimit=120")
    job.wait_for(f"resuming at step {step}")
    until_step(job, run_dir, step + 1)
    job.cluster.call("scancel", "--full", job.id)
    job.end()


def test_one_visible_gpu_per_task(cluster: Cluster, config_for, tmp_path: Path) -> None:
    """``--gpus-per-task``: each rank sees one GPU, its own (which it takes: tests/unit/runtime/test_parallel.py)."""
    path = write(tmp_path / "run.yaml", config_for(tmp_path / "run", train_iters=2))
    job = cluster.submit("train", path, log=tmp_path / "job.out", nodes=1, gpus="task")
    ranks = {rank: environment_of(pid) for rank, pid in until_ranks(job, 2).items()}
    assert sorted(ranks[rank][b"CUDA_VISIBLE_DEVICES"] for rank in ranks) == [b"0", b"1"]
    assert job.end() == ("COMPLETED", 0), job.said()
    assert len(losses(tmp_path / "run")) == 2
