"""Ends that a run was given: by duration, by step. Each is a complete checkpoint and 75, and loses nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from remit_megatron.runtime import checkpoints
from tests.integration.conftest import write
from tests.integration.test_resume import losses, tensors, train_rank

STEPS = 4


def train_long_ago(path: str, overrides: list[str], minutes: float) -> tuple[int, list[str]]:
    """One rank that has begun so many minutes ago, as Megatron's clock of the duration says."""
    from megatron.training import training

    with mock.patch.object(training, "_TRAIN_START_TIME", time.time() - 60 * minutes):
        return train_rank(path, overrides)


@pytest.fixture(scope="module")
def straight(config_for, pool, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exits")
    path = write(root / "run.yaml", config_for(root / "run", train_iters=STEPS, eval_interval=2))
    assert pool.run(train_rank, world_size=2, path=str(path), overrides=[])[0][0] == 0
    return root / "run"


EXITS: dict[str, tuple[dict[str, Any], float, int]] = {
    "by duration": ({"exit_duration_in_mins": 30}, 60, 1),
    "by duration, in a validation": ({"exit_duration_in_mins": 30, "eval_interval": 1}, 60, 1),
    "by duration, saved anyway": ({"exit_duration_in_mins": 30, "save_interval": 1}, 60, 1),
    "by duration, asynchronous": ({"exit_duration_in_mins": 30, "async_save": True}, 60, 1),
    "by step": ({"exit_interval": 3}, 0, 3),
    "by step, asynchronous": ({"exit_interval": 3, "async_save": True, "save_interval": 3}, 0, 3),
    "not yet": ({"exit_duration_in_mins": 600}, 60, STEPS),
}


@pytest.mark.parametrize("name", EXITS)
def test_an_exit(config_for, pool, straight, tmp_path, name):
    megatron, minutes, step = EXITS[name]
    run_dir = tmp_path / "run"
    config = config_for(run_dir, train_iters=STEPS, **({"eval_interval": 2} | megatron))
    path = str(write(tmp_path / "run.yaml", config))
    found = pool.run(train_long_ago, world_size=2, path=path, overrides=[], minutes=minutes)
    assert [code for code, _ in found] == [0 if step == STEPS else 75] * 2
    root = run_dir / "checkpoints"
    assert checkpoints.newest_complete(root) == step
    checkpoints.verify(checkpoints.iteration_directory(root, step))
    ends = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [(end["step"], end["code"]) for end in ends if end["event"] == "end"] == [(step, found[0][0])]
    overrides = ["megatron.exit_duration_in_mins=null", "megatron.exit_interval=null"]
    again = pool.run(train_rank, world_size=2, path=path, overrides=overrides)
    assert [code for code, _ in again] == [0, 0]
    assert losses(run_dir) == losses(straight)
    ours, theirs = tensors(run_dir, STEPS), tensors(straight, STEPS)
    assert set(ours) == set(theirs) and len(ours) > 20
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)
