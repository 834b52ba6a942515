"""Asynchronous saves: what is written, when it counts, and what is left of one that was broken off."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from remit_megatron.runtime import checkpoints
from tests.distributed.training.test_training import REMIT, configuration
from tests.distributed.training.test_training import material as material  # a fixture
from tests.integration.test_resume import losses, tensors

STEPS = 7
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2_distributed_optimizer": (2, {"use_distributed_optimizer": True}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
}


def train_rank(path: str, slow: bool, stop_in: int | None = None, fail: int | None = None) -> tuple[int, list[int]]:
    """One rank of ``remit train``.

    Args:
        slow: its writer begins with a file when training is a step further, where there is a step more.
        stop_in: SIGTERM comes in this step, on rank 0.
        fail: number of the error that the file system gives the writer.

    Returns:
        Exit code, and how many steps the run was ahead each time a file was written.
    """
    import patches

    patches.apply()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from remit_megatron.run.configuration import load_config
    from remit_megatron.training import engine
    from remit_megatron.training.command import train

    steps: list[int] = []
    step = 0
    write, after_step = FileSystemWriterAsync.write_preloaded_data, engine.Engine.after_step

    def slowly(*args: Any, **kwargs: Any) -> Any:
        saved = int(Path(kwargs["write_bucket"][0]).parent.name.removeprefix("iter_"))
        deadline = time.monotonic() + 60
        while slow and step <= saved not in (STEPS, stop_in) and time.monotonic() < deadline:
            time.sleep(0.01)
        steps.append(step - saved)
        if fail is not None:
            return kwargs["local_proc_idx"], OSError(fail, os.strerror(fail))
        return write(*args, **kwargs)

    def watched(self: Any, losses: Any, *, iteration: int, **figures: Any) -> Any:
        nonlocal step
        step = iteration
        if iteration == stop_in and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(self, losses, iteration=iteration, **figures)

    with (
        mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(slowly)),
        mock.patch.object(engine.Engine, "after_step", watched),
    ):
        return train(load_config(path)), steps


def run(pool: Any, config: dict[str, Any], *, world_size: int, code: int = 0, **how: Any) -> list[int]:
    """Trains; returns how many steps rank 0 was ahead when it wrote files."""
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "input.yaml").write_text(json.dumps(config))
    results = pool.run(train_rank, world_size=world_size, path=str(run_dir / "input.yaml"), **({"slow": False} | how))
    assert [found for found, _ in results] == [code] * world_size
    return results[0][1]


def settings(material: dict[str, Path], run_dir: Path, **megatron: Any) -> dict[str, Any]:
    config = configuration(material, run_dir, REMIT, train_iters=STEPS, save_interval=2, **megatron)
    return config | {"checkpoint": {"keep": None}}


def assert_same(run_dir: Path, expected: Path, iteration: int) -> None:
    ours, theirs = tensors(run_dir, iteration), tensors(expected, iteration)
    assert set(ours) == set(theirs) and len(ours) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_of_its_own_step(pool, material, tmp_path, layout):
    world_size, megatron = LAYOUTS[layout]
    run(pool, settings(material, tmp_path / "plain", **megatron), world_size=world_size)
    config = settings(material, tmp_path / "run", async_save=True, **megatron)
    written = run(pool, config, world_size=world_size, slow=True)
    assert len(written) >= 4 and max(written) > 0, "training went on while files were written"
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    found = checkpoints.iterations(tmp_path / "run" / "checkpoints")
    assert found == checkpoints.iterations(tmp_path / "plain" / "checkpoints") == [STEPS, 6, 4, 2]
    for iteration in found:
        manifest = checkpoints.verify(checkpoints.iteration_directory(tmp_path / "run" / "checkpoints", iteration))
        assert manifest.properties["iteration"] == iteration
        assert manifest.properties["updates"] == iteration, "as of its own step, not of the one it was finalized in"
        assert_same(tmp_path / "run", tmp_path / "plain", iteration)


def test_a_signal_ends_in_a_complete_checkpoint(pool, material, tmp_path):
    """SIGTERM in step 3, while the checkpoint of step 2 is written: both are complete, and the run goes on."""
    run(pool, settings(material, tmp_path / "plain"), world_size=2)
    config = settings(material, tmp_path / "run", async_save=True)
    run(pool, config, world_size=2, slow=True, stop_in=3, code=75)
    root = tmp_path / "run" / "checkpoints"
    assert checkpoints.newest_complete(root) == 3 and checkpoints.iterations(root) == [3, 2]
    checkpoints.verify(root / "iter_0000002")
    run(pool, config, world_size=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert_same(tmp_path / "run", tmp_path / "plain", STEPS)


def test_a_write_that_fails_leaves_the_one_before(pool, material, tmp_path):
    config = settings(material, tmp_path / "run", async_save=True)
    run(pool, config | {"megatron": config["megatron"] | {"exit_interval": 2}}, world_size=1, code=75)
    with pytest.raises(AssertionError, match=f"Errno {errno.ENOSPC}.*checkpoints"):
        run(pool, config, world_size=1, fail=errno.ENOSPC)
    root = tmp_path / "run" / "checkpoints"
    assert checkpoints.newest_complete(root) == 2
    assert not (root / "iter_0000004" / "manifest.json").exists()
    run(pool, config, world_size=1)
    assert checkpoints.newest_complete(root) == STEPS
