"""Curves of a run that was stopped: what tensorboard itself reads of them, and the identity in Weights & Biases."""

from __future__ import annotations

from pathlib import Path

import pytest

from remit_megatron.run.configuration import load_config
from remit_megatron.training.curves import resume_logs, wandb_id


@pytest.fixture
def config(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: tiny_llama\nobjective: {{name: ntp}}\ndata: {{train: x, tokenizer: y}}\nrun_dir: {tmp_path}/run\n"
        "megatron: {train_iters: 9}\nlogging: {wandb: {mode: offline}}\n"
    )
    return load_config(path)


def test_tensorboard_shows_one_curve(config, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setenv("WANDB_RUN_ID", "set")
    folder = tmp_path / "run" / "tensorboard"
    # Killed after step 9; the newest checkpoint is of step 6.
    for resumed_at, steps, value in ((0, range(1, 10), 1.0), (6, range(7, 13), 2.0)):
        resume_logs(config, resumed_at=resumed_at)
        writer = SummaryWriter(str(folder))
        for step in steps:
            writer.add_scalar("lm_loss", value, step)
        writer.close()
    read = EventAccumulator(str(folder))
    read.Reload()
    points = [(event.step, event.value) for event in read.Scalars("lm_loss")]
    assert points == [(step, 1.0 if step <= 6 else 2.0) for step in range(1, 13)]


def test_wandb_keeps_its_identity(config, tmp_path, monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    import os

    first = wandb_id(tmp_path / "run" / "wandb")
    assert first == wandb_id(tmp_path / "run" / "wandb") != wandb_id(tmp_path / "other" / "wandb")
    resume_logs(config, resumed_at=0)
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == (first, "allow")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    resume_logs(config, resumed_at=3)
    assert os.environ["WANDB_RUN_ID"] == "mine", "what the user has set wins"
