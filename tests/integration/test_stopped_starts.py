"""A stop signal at every moment of ``remit train --nproc 2``: each start of one run is stopped at a later one.

Each ends with 75 and one line, leaves no process and no half-written file, and ``remit status`` says what happened. The
start that nobody stops ends as a run that nobody has stopped.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from remit_megatron.cluster.run_status import run_status
from tests.integration.conftest import write
from tests.integration.test_resume import losses, tensors, train
from tests.moments import left_behind, moment

STEPS = 4
BEFORE = "stopped by {} before the first step, nothing is lost; start it again to go on"
SAVED = "stopped at step {} of 4, which is saved; start it again to go on"
TERM, USR2 = signal.SIGTERM, signal.SIGUSR2
# Who meets it, where, the signal, the step that is saved (0: none yet), and what `remit status` says afterwards.
MOMENTS: list[tuple[str, str, signal.Signals, int, str]] = [
    ("launcher", "torch", TERM, 0, ""),
    ("launcher", "remit_megatron.run.prepare:prepare", USR2, 0, ""),
    # One rank may be at any place when the other is here; both leave.
    ("1", "torch", TERM, 0, ""),
    ("0", "torch.distributed:init_process_group", USR2, 0, ""),
    # Only the last rank does this, while the other waits for it: it is after this that Megatron handles the signal.
    # The other may be where nothing has been written of this start yet.
    ("1", "remit_megatron.training.curves:resume_logs", TERM, 0, "stopped or not started"),
    ("0", "megatron.training.training:setup_model_and_optimizer", TERM, 1, "stopped"),
    ("1", "remit_megatron.run.directory:newest_verified", USR2, 1, "stopped"),
    # In the save of step 2: the step after it is made and saved as well.
    ("0", "remit_megatron.runtime.checkpoints:describe_files", TERM, 3, "stopped"),
]


def state(run_dir: Path) -> str:
    return run_status(run_dir).state if (run_dir / "config.yaml").exists() else ""


@pytest.mark.slow
def test_each_start_is_stopped_at_a_later_moment(config_for, pool, tmp_path):
    settings = {"train_iters": STEPS, "save_interval": 2, "eval_interval": 100}
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    train(pool, write(tmp_path / "straight.yaml", config_for(straight, **settings)), nproc=2)
    path = write(tmp_path / "run.yaml", config_for(run_dir, **settings))
    command = [sys.executable, "-m", "remit_megatron", "train", str(path), "--nproc", "2"]
    nobody = ("nobody", "never", TERM, STEPS, "done")
    for number, (who, what, signal_number, step, says) in enumerate([*MOMENTS, nobody]):
        folder = tmp_path / f"start{number}"
        variables = moment(folder, who, what, signal_number)
        found = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        what = f"{who} {what}: {found.returncode}\n{found.stdout}\n{found.stderr}"
        assert found.returncode == (75 if who != "nobody" else 0), what
        said = found.stdout.splitlines() + found.stderr.splitlines()
        if who == "nobody":
            assert not found.stderr, what
        elif says and step > _saved_before(number):
            assert said[-1] == SAVED.format(step) and not found.stderr, what
        else:
            assert found.stderr == BEFORE.format(signal_number.name) + "\n", what
        assert left_behind(folder) == [], what
        assert [path for path in tmp_path.rglob("*.tmp") if folder not in path.parents] == [], what
        latest = run_dir / "checkpoints" / "latest"
        assert (json.loads(latest.read_text())["iteration"] if latest.exists() else 0) == step, what
        assert state(run_dir) in says.split(" or "), what
    status = run_status(run_dir)
    assert (status.crashes, status.faults) == (0, []), status.faults
    assert losses(run_dir) == losses(straight)
    ours, theirs = tensors(run_dir, STEPS), tensors(straight, STEPS)
    assert set(ours) == set(theirs) and len(ours) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _saved_before(number: int) -> int:
    return MOMENTS[number - 1][3] if number else 0
