"""Killed at any step and started again: the same losses and the same weights, bit for bit on a CPU."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import REPOSITORY, write

STEPS = 8


def train_rank(path: str, overrides: list[str]) -> tuple[int, list[str]]:
    """One rank of ``remit train`` in a warm process: its exit code, and what it warned of."""
    import patches

    patches.apply()
    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train

    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("remit_megatron").addHandler(handler)
    try:
        return train(load_config(path, overrides)), warned
    finally:
        logging.getLogger("remit_megatron").removeHandler(handler)


def train(pool, path: Path, *overrides: str, nproc: int = 1, code: int = 0) -> list[str]:
    """Trains to the end, or with ``code=75`` to an exit interval; returns what rank 0 warned of."""
    results = pool.run(train_rank, world_size=nproc, path=str(path), overrides=list(overrides))
    assert [found for found, _ in results] == [code] * nproc
    return results[0][1]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["iteration"], r["lm_loss"], r["objective_loss"]) for r in records]


def tensors(run_dir: Path, iteration: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, master weights and moments, whatever layout wrote them."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(run_dir / "checkpoints" / f"iter_{iteration:07d}")
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.fixture(scope="module")
def straight(config_for, pool, tmp_path_factory) -> Path:
    """The run that nobody kills."""
    root = tmp_path_factory.mktemp("straight")
    train(pool, write(root / "run.yaml", config_for(root / "run", train_iters=STEPS)))
    return root / "run"


def kill_at(path: Path, run_dir: Path, step: int, *, during_save: bool = False) -> None:
    """Starts the run and kills it with SIGKILL after ``step``, or while the checkpoint of ``step`` is written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "remit_megatron", "train", str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    saving = run_dir / "checkpoints" / f"iter_{step:07d}"
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        if during_save and saving.exists():
            break
        if not during_save and metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            break
        time.sleep(0.002)
    process.kill()  # this process only: what it forked must not stand in the way of the next start
    process.wait()
    if during_save:
        assert not (saving / "manifest.json").exists(), "killed too late for what this test is about"


def test_sigkill_then_resume_is_bit_exact(straight, config_for, pool, tmp_path):
    run_dir = tmp_path / "run"
    path = write(tmp_path / "run.yaml", config_for(run_dir, train_iters=STEPS))
    kill_at(path, run_dir, 1)  # before the first checkpoint
    kill_at(path, run_dir, 3)  # between two
    kill_at(path, run_dir, 4, during_save=True)
    warned = train(pool, path)
    assert any("skipping checkpoint 4" in text and "manifest.json" in text for text in warned)
    assert losses(run_dir) == losses(straight)
    found, expected = tensors(run_dir), tensors(straight)
    assert set(found) == set(expected) and len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sigkill_in_an_asynchronous_save(straight, config_for, pool, tmp_path):
    """What wrote it is gone with the rank, and holds nothing: the next start finds directory and lock free."""
    run_dir = tmp_path / "run"
    path = write(tmp_path / "run.yaml", config_for(run_dir, train_iters=STEPS, async_save=True))
    kill_at(path, run_dir, 4, during_save=True)
    warned = train(pool, path)
    assert any("skipping checkpoint 4" in text and "manifest.json" in text for text in warned)
    assert losses(run_dir) == losses(straight)
    found, expected = tensors(run_dir), tensors(straight)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_damaged_checkpoint_is_skipped(straight, config_for, pool, tmp_path):
    run_dir = tmp_path / "run"
    path = write(tmp_path / "run.yaml", config_for(run_dir, train_iters=STEPS))
    train(pool, path, "megatron.exit_interval=6", code=75)
    victim = next((run_dir / "checkpoints" / "iter_0000006").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    warned = train(pool, path)
    assert any("skipping checkpoint 6" in text and victim.name in text for text in warned)
    assert (run_dir / "checkpoints" / "iter_0000006.damaged").is_dir(), "kept for its owner"
    assert losses(run_dir) == losses(straight)
    found, expected = tensors(run_dir), tensors(straight)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "layout,nproc",
    [
        ({"tensor_model_parallel_size": 2}, 2),
        ({"pipeline_model_parallel_size": 2}, 2),
        ({}, 2),
    ],
    ids=["tp2", "pp2", "dp2"],
)
def test_resume_on_another_layout(straight, config_for, pool, tmp_path, layout, nproc):
    run_dir = tmp_path / "run"
    train(
        pool,
        write(tmp_path / "first.yaml", config_for(run_dir, train_iters=STEPS)),
        "megatron.exit_interval=4",
        code=75,
    )
    train(pool, write(tmp_path / "second.yaml", config_for(run_dir, train_iters=STEPS, **layout)), nproc=nproc)
    assert losses(run_dir)[:4] == losses(straight)[:4]
    for found_step, expected_step in zip(losses(run_dir), losses(straight), strict=True):
        assert found_step == pytest.approx(expected_step, rel=1e-4)
    found = {name: tensor for name, tensor in tensors(run_dir).items() if name.startswith(("decoder", "embedding"))}
    assert len(found) >= 7
    for name, expected in tensors(straight).items():
        if name in found:
            rows = min(expected.shape[0], found[name].shape[0])  # a layout may pad the vocabulary
            torch.testing.assert_close(found[name][:rows], expected[:rows], rtol=1e-3, atol=1e-4)


def test_distributed_optimizer_resumes_on_another_layout(straight, config_for, pool, tmp_path):
    run_dir = tmp_path / "run"
    first = config_for(run_dir, train_iters=STEPS, use_distributed_optimizer=True)
    train(pool, write(tmp_path / "first.yaml", first), "megatron.exit_interval=4", nproc=2, code=75)
    second = config_for(
        run_dir, train_iters=STEPS, use_distributed_optimizer=True, tensor_model_parallel_size=2, sequence_parallel=True
    )
    train(pool, write(tmp_path / "second.yaml", second), nproc=2)
    for found_step, expected_step in zip(losses(run_dir), losses(straight), strict=True):
        assert found_step == pytest.approx(expected_step, rel=1e-4)


def test_what_a_checkpoint_was_made_with_stays(straight, remit, tmp_path):
    """Another schedule is refused in one line, and no command changes what the run says of itself."""
    config = (straight / "config.yaml").read_text()
    path = tmp_path / "run.yaml"
    path.write_text(config)
    refused = remit("train", path, f"megatron.train_iters={STEPS + 4}")
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert f"megatron.train_iters: found {STEPS + 4}; expected {STEPS}, as the checkpoints in" in refused.stderr
    done = remit("train", path, "objective.epsilon=0.3")
    assert done.returncode == 0 and "nothing to do" in done.stdout and "was not used" in done.stdout
    assert (straight / "config.yaml").read_text() == config and not (straight / "config.yaml.previous").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_asks_to_be_started_again(config_for, tmp_path, number):
    run_dir = tmp_path / "run"
    config = config_for(run_dir, train_iters=100_000, save_interval=100_000, eval_interval=100_000)
    path = write(tmp_path / "run.yaml", config)
    process = subprocess.Popen(
        [sys.executable, "-m", "remit_megatron", "train", str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does: the data loader's processes get it, too
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    saved = json.loads((run_dir / "checkpoints" / "latest").read_text())["iteration"]
    assert saved == losses(run_dir)[-1][0]
    assert f"stopped at step {saved} of 100000, which is saved" in said
