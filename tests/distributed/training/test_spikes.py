"""Loss spikes: not trained on, on all ranks alike, as if their samples had been left out from the beginning."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from remit_megatron.cluster.run_status import run_status, status_text
from tests.distributed.training.test_training import REMIT, configuration
from tests.distributed.training.test_training import material as material  # a fixture
from tests.integration.test_resume import tensors

STEPS, SPIKE, BATCH = 12, 10, 8
FIRST = (SPIKE - 1) * BATCH  # number of the first sample of the step
RULE = {"deviations": 4.0, "window": 6}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2_overlap": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}


def train_rank(path: str, noise: list[int], louder: int | None, overrides: list[str]) -> tuple[int, str]:
    """One rank of ``remit train`` whose data has samples of characters that are nowhere else in it.

    Args:
        noise: numbers of those samples.
        louder: step whose gradients are a hundred times what they should be, its losses being as they are.

    Returns:
        Exit code, and with 70 the reason.
    """
    import patches

    patches.apply()
    from megatron.training import get_args

    from remit_megatron.data.blend import BlendedDataset
    from remit_megatron.run.configuration import load_config
    from remit_megatron.runtime.errors import DoNotRestart
    from remit_megatron.training.command import train
    from remit_megatron.training.step import TrainingStep

    read, loss = BlendedDataset.__getitem__, TrainingStep.loss

    def sample(self: BlendedDataset, index: int) -> dict[str, torch.Tensor]:
        item = read(self, index)
        if int(index) not in noise:
            return item
        generator = torch.Generator().manual_seed(int(index))
        ids = torch.randint(10, 28, (len(item["tokens"]) + 1,), generator=generator)
        return {**item, "tokens": ids[:-1], "labels": ids[1:]}

    def scaled(self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        total, count, report = loss(self, *args, **kwargs)
        return total * (100 if get_args().curr_iteration + 1 == louder else 1), count, report

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(BlendedDataset, "__getitem__", sample))
        stack.enter_context(mock.patch.object(TrainingStep, "loss", scaled))
        try:
            return train(load_config(path, overrides)), ""
        except DoNotRestart as error:
            return 70, str(error)


@pytest.fixture
def run(pool, material, tmp_path):
    """Trains in a directory of that name; gives its metrics by step."""

    def start(
        name: str,
        *,
        world_size: int = 1,
        noise: range = range(FIRST, FIRST + BATCH),
        louder: int | None = None,
        spikes: dict[str, Any] | None = None,
        code: int = 0,
        overrides: tuple[str, ...] = (),
        **megatron: Any,
    ) -> dict[int, dict[str, Any]]:
        settings = {"train_iters": STEPS, "lr": 5e-3, "lr_decay_style": "constant", "save_interval": 4} | megatron
        settings |= {"min_lr": 5e-3, "global_batch_size": BATCH}
        config = configuration(material, tmp_path / name, REMIT, **settings) | {"checkpoint": {"keep": None}}
        if spikes is not None:
            config["spikes"] = RULE | spikes
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(config))
        found = pool.run(
            train_rank,
            world_size=world_size,
            path=str(path),
            noise=list(noise),
            louder=louder,
            overrides=list(overrides),
        )
        assert {answer for answer, _ in found} == {code}, found
        start.said = found[0][1]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {record["iteration"]: record for record in map(json.loads, lines)}

    return start


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def assert_same(run_dir: Path, expected: Path) -> None:
    """Weights and optimizer, bit for bit."""
    ours, theirs = tensors(run_dir, STEPS), tensors(expected, STEPS)
    assert set(ours) == set(theirs) and len(ours) > 20
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spike_is_skipped(run, tmp_path, layout):
    world_size, megatron = LAYOUTS[layout]
    metrics = run("run", world_size=world_size, spikes={}, **megatron)
    others = run("never", world_size=world_size, iterations_to_skip=[SPIKE], **megatron)
    assert metrics[SPIKE]["skipped"] and metrics[SPIKE]["spike"] == "loss" and metrics[SPIKE]["back_to"] is None
    assert [step for step, record in metrics.items() if "spike" in record] == [SPIKE]
    assert set(metrics) - set(others) == {SPIKE}, "Megatron's own skipping writes no line"
    assert all(metrics[step]["lm_loss"] == record["lm_loss"] for step, record in others.items())
    assert_same(tmp_path / "run", tmp_path / "never")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_going_back_is_as_if_the_samples_had_never_been(run, tmp_path, layout):
    world_size, megatron = LAYOUTS[layout]
    metrics = run("run", world_size=world_size, spikes={"action": "rollback"}, **megatron)
    run("never", world_size=world_size, iterations_to_skip=[9, 10], **megatron)
    assert metrics[SPIKE]["back_to"] == 8 and metrics[SPIKE]["spike"] == "loss"
    assert_same(tmp_path / "run", tmp_path / "never")
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "iter_0000012" / "manifest.json").read_text())
    assert manifest["properties"]["updates"] == 10 and manifest["properties"]["consumed_samples"] == STEPS * BATCH


def test_the_samples_are_named_and_the_status_counts(run, material, tmp_path):
    from remit_megatron.data.blend import open_blend

    run("run", spikes={})
    (event,) = events(tmp_path / "run", "spike")
    assert (event["iteration"], event["figure"], event["first_sample"]) == (SPIKE, "loss", FIRST)
    assert event["value"] > event["limit"]
    blend = open_blend([(1.0, str(material["corpus"]))], sequence_length=64, num_samples=200, seed=1234, eod_id=0)
    expected = [blend.locate(number)[1] for number in range(FIRST, FIRST + BATCH)]
    (part,) = event["samples"]
    assert part["samples"] == expected and part["identity"] == blend.datasets[0].identity
    status = run_status(tmp_path / "run")
    assert (status.spikes, status.skipped_steps) == (1, 1)
    assert f"1 loss spike, the last at step {SPIKE}" in status_text(status)


def test_a_gradient_that_stands_out(run, tmp_path):
    metrics = run("run", noise=range(0), louder=SPIKE, spikes={})
    run("never", noise=range(0), iterations_to_skip=[SPIKE])
    assert [step for step, record in metrics.items() if "spike" in record] == [SPIKE]
    assert metrics[SPIKE]["spike"] == "grad_norm"
    assert_same(tmp_path / "run", tmp_path / "never")


def test_too_many_spikes_end_the_run(run, tmp_path):
    metrics = run("run", noise=range(FIRST - BATCH, FIRST + BATCH), spikes={"give_up": 1}, code=70)
    assert max(metrics) == SPIKE
    assert f"step {SPIKE}: loss" in run.said and "spikes.give_up" in run.said
    assert not (tmp_path / "run" / "checkpoints" / "iter_0000010").exists()
    assert run_status(tmp_path / "run").state == "failed"


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_run_that_goes_on_judges_as_before(run, tmp_path, action):
    """Stopped one step before the spike: what is ordinary is in the checkpoint."""
    straight = run("straight", spikes={"action": action})
    run("run", spikes={"action": action}, code=75, overrides=("megatron.exit_interval=9",))
    resumed = run("run", spikes={"action": action})
    assert resumed[SPIKE]["spike"] == straight[SPIKE]["spike"] == "loss"
    if action == "skip":
        assert_same(tmp_path / "run", tmp_path / "straight")
    else:
        assert (straight[SPIKE]["back_to"], resumed[SPIKE]["back_to"]) == (8, 9), "the newest there is"


def test_before_there_is_a_checkpoint_it_is_skipped(run, tmp_path):
    metrics = run("run", spikes={"action": "rollback"}, save_interval=100)
    assert metrics[SPIKE]["back_to"] is None and metrics[SPIKE]["skipped"]
