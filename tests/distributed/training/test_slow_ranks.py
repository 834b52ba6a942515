"""A rank that sleeps in its forward passes is named while the run goes on."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from remit_megatron.cluster.run_status import run_status, status_text
from tests.distributed.training.test_training import REMIT, configuration
from tests.distributed.training.test_training import material as material  # a fixture

LAYOUTS: dict[str, tuple[int, dict[str, Any], tuple[int, ...]]] = {
    "dp2": (2, {}, (1,)),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2}, (2, 3)),
}


def train_rank(path: str, sleeper: int, until: int) -> int:
    """One rank of ``remit train``; ``sleeper`` takes its time up to step ``until``."""
    import patches

    patches.apply()
    from megatron.training import get_args

    from remit_megatron.models.forward import ModelForward
    from remit_megatron.run.configuration import load_config
    from remit_megatron.training import slow_ranks
    from remit_megatron.training.command import train

    run = ModelForward.run

    def slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        if int(os.environ["RANK"]) == sleeper and get_args().curr_iteration < until:
            time.sleep(0.25)
        return run(self, *args, **kwargs)

    with mock.patch.object(ModelForward, "run", slowly), mock.patch.object(slow_ranks, "STEPS", 1):
        return train(load_config(path))


def start(pool: Any, config: dict[str, Any], *, world_size: int, until: int) -> str:
    """Trains with rank 1 or the one after the first replica as sleeper; what the log of rank 0 says."""
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "input.yaml").write_text(json.dumps(config))
    settings = {"path": str(run_dir / "input.yaml"), "sleeper": world_size // 2, "until": until}
    assert pool.run(train_rank, world_size=world_size, **settings) == [0] * world_size
    return (run_dir / "logs" / "rank_0.log").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_sleeps_is_named(pool, material, tmp_path, layout):
    world_size, megatron, expected = LAYOUTS[layout]
    config = configuration(material, tmp_path / "run", REMIT, train_iters=8, **megatron)
    log = start(pool, config, world_size=world_size, until=8)
    named = "rank 1" if len(expected) == 1 else "ranks 2, 3"
    assert re.search(rf"step [4-8]: {named} on {re.escape(socket.gethostname())}", log)
    status = run_status(tmp_path / "run")
    (slow,) = status.slow_ranks
    assert tuple(slow["ranks"]) == expected and slow["ratio"] > 1.5
    assert f"slow       rank {named.split(' ', 1)[1]} on {socket.gethostname()}" in status_text(status)


def test_it_is_forgotten_when_it_is_quick_again(pool, material, tmp_path):
    config = configuration(material, tmp_path / "run", REMIT, train_iters=12)
    config["logging"] |= {"slow_rank": 3.0}  # what two ranks on a busy machine do not reach by themselves
    start(pool, config, world_size=2, until=5)
    records = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    changes = [[entry["ranks"] for entry in record["ranks"]] for record in records if record["event"] == "slow"]
    assert changes == [[[1]], []]
    assert run_status(tmp_path / "run").slow_ranks == []
