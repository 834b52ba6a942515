"""Killed at any step and started again: the same losses and the same weights, bit for bit on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import REPOSITORY, write

STEPS = 8


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["iteration"], r["lm_loss"], r["objective_loss"]) for r in records]


def exported(remit, run_dir: Path, output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    result = remit("export", "--checkpoint", run_dir, "--output", output)
    assert result.returncode == 0, result.stderr
    return {name: tensor for file in sorted(output.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def straight(config_for, remit, tmp_path_factory):
    """The run that nobody kills."""
    root = tmp_path_factory.mktemp("straight")
    path = write(root / "run.yaml", config_for(root / "run", train_iters=STEPS))
    result = remit("train", path)
    assert result.returncode == 0, result.stderr[-3000:]
    return root / "run", exported(remit, root / "run", root / "exported")


def kill_at(path: Path, run_dir: Path, step: int, *, during_save: bool = False) -> None:
    """Starts the run and kills it with SIGKILL after ``step``, or while the checkpoint of ``step`` is being written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "remit_megatron", "train", str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    saving = run_dir / "checkpoints" / f"iter_{step:07d}"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        metrics = run_dir / "metrics.jsonl"
        if during_save and saving.exists():
            break
        if not during_save and metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if during_save:
        assert not (saving / "manifest.json").exists(), "killed too late for what this test is about"


@pytest.mark.parametrize("step,during_save", [(1, False), (3, False), (5, False), (4, True)])
def test_sigkill_then_resume_is_bit_exact(straight, config_for, remit, tmp_path, step, during_save):
    expected_dir, expected = straight
    run_dir = tmp_path / "run"
    path = write(tmp_path / "run.yaml", config_for(run_dir, train_iters=STEPS))
    kill_at(path, run_dir, step, during_save=during_save)
    result = remit("train", path)
    assert result.returncode == 0, result.stderr[-3000:]
    if during_save:
        assert "resuming at step 2" in result.stdout
        assert "skipping checkpoint 4" in result.stderr
    assert losses(run_dir) == losses(expected_dir)
    found = exported(remit, run_dir, tmp_path / "exported")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_damaged_checkpoint_is_skipped(straight, config_for, remit, tmp_path):
    expected_dir, expected = straight
    run_dir = tmp_path / "run"
    path = write(tmp_path / "run.yaml", config_for(run_dir, train_iters=STEPS))
    assert remit("train", path, "megatron.exit_interval=6").returncode == 0
    victim = next((run_dir / "checkpoints" / "iter_0000006").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    result = remit("train", path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "skipping checkpoint 6" in result.stderr and victim.name in result.stderr
    assert "resuming at step 4" in result.stdout
    assert losses(run_dir) == losses(expected_dir)
    found = exported(remit, run_dir, tmp_path / "exported")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "layout,nproc",
    [
        ({"tensor_model_parallel_size": 2}, 2),
        ({"pipeline_model_parallel_size": 2}, 2),
        ({"use_distributed_optimizer": True}, 2),
    ],
    ids=["tp2", "pp2", "dp2_distributed_optimizer"],
)
def test_resume_on_another_layout(straight, config_for, remit, tmp_path, layout, nproc):
    expected_dir, expected = straight
    run_dir = tmp_path / "run"
    first = write(tmp_path / "first.yaml", config_for(run_dir, train_iters=STEPS))
    assert remit("train", first, "megatron.exit_interval=4").returncode == 0
    second = write(tmp_path / "second.yaml", config_for(run_dir, train_iters=STEPS, **layout))
    result = remit("train", second, "--nproc", nproc)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resuming at step 4" in result.stdout
    for found_step, expected_step in zip(losses(run_dir), losses(expected_dir), strict=True):
        assert found_step == pytest.approx(expected_step, rel=1e-4)
    found = exported(remit, run_dir, tmp_path / "exported")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_sigterm_saves_and_asks_to_be_started_again(config_for, remit, tmp_path):
    run_dir = tmp_path / "run"
    path = write(
        tmp_path / "run.yaml", config_for(run_dir, train_iters=100_000, save_interval=100_000, eval_interval=100_000)
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "remit_megatron", "train", str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    saved = json.loads((run_dir / "checkpoints" / "latest").read_text())["iteration"]
    assert saved == losses(run_dir)[-1][0]
