"""The figures of a step: summed over microbatches and replicas in one reduction, and what Megatron makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.training.test_training import REMIT, configuration
from tests.distributed.training.test_training import material as material  # a fixture

NAMES = ("lm_loss", "tokens", "share")


def reports_of(rank: int) -> list[dict[str, torch.Tensor]]:
    """Of three microbatches; uneven counts."""
    generator = torch.Generator().manual_seed(rank)
    return [{name: torch.rand(2, generator=generator) * (1 + rank) + 0.1 for name in NAMES} for _ in range(3)]


def reduced() -> dict[str, float]:
    """Of this rank's microbatches with the others'."""
    import patches

    patches.apply()
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.training.step import TrainingStep

    with process_groups() as groups:
        step: Any = SimpleNamespace(groups=groups)
        (report,) = TrainingStep._of_the_step(step, reports_of(groups.dp_cp.rank()))
    assert all(value.numel() == 1 for value in report.values()), "of which Megatron makes no reduction of its own"
    assert TrainingStep._of_the_step(step, []) == []
    return {name: value.item() for name, value in report.items()}


@pytest.mark.parametrize("world_size", [1, 3])
def test_sums_are_divided_at_the_end(pool, world_size) -> None:
    total = {
        name: torch.stack([report[name].double() for rank in range(world_size) for report in reports_of(rank)]).sum(0)
        for name in NAMES
    }
    for found in pool.run(reduced, world_size=world_size):
        assert found == {name: pytest.approx((pair[0] / pair[1]).item(), rel=1e-6) for name, pair in total.items()}


def counted_run(path: str) -> list[int]:
    """Reductions of figures in each step of a run: those of Megatron's own step, and ours."""
    import patches

    patches.apply()
    from torch import distributed as dist

    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train

    found, original = [0, 0], dist.all_reduce

    def counting(*args, **kwargs):
        import sys

        caller = sys._getframe(1).f_code
        found[0] += caller.co_name == "train_step" and caller.co_filename.endswith("megatron/training/training.py")
        found[1] += caller.co_name == "_of_the_step"
        return original(*args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counting):
        assert train(load_config(path)) == 0
    return found


def test_a_step_waits_once_for_its_figures(pool, material, tmp_path) -> None:
    config = configuration(material, tmp_path / "run", REMIT)
    path = Path(tmp_path) / "run.yaml"
    path.write_text(json.dumps(config))
    steps = config["megatron"]["train_iters"]
    assert pool.run(counted_run, world_size=2, path=str(path)) == [[0, steps]] * 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == steps
