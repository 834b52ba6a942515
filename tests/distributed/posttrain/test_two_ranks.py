"""Post-training on two gloo ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.posttrain_runs import content_of, make_tiny, metrics_of


def run_rank(content: dict[str, Any], stage: str) -> int:
    from remit_megatron.posttrain import trl_engine
    from remit_megatron.posttrain.configuration import settings_of

    return trl_engine.run(settings_of(content, stage=stage))


@pytest.mark.parametrize("stage", ["sft", "rlvr"])
def test_two_ranks(stage: str, pool: Any, tmp_path: Path) -> None:
    """SFT on two ranks of two lines each is SFT on one rank of four; GRPO generates for whole groups on both."""
    model = make_tiny(tmp_path)
    sizes = {"per_device_train_batch_size": 2 if stage == "sft" else 8}
    content = content_of(stage, model, tmp_path, max_steps=4, save_steps=2, **sizes)
    assert pool.run(run_rank, world_size=2, content=content, stage=stage) == [0, 0]
    lines = metrics_of(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} | {f"remit_state_{rank}.pt" for rank in (0, 1)} <= files.keys()
    if stage == "sft":
        alone = content | {"run_dir": str(tmp_path / "alone")}
        alone["trl"] = content["trl"] | {"per_device_train_batch_size": 4}
        assert pool.run(run_rank, world_size=1, content=alone, stage=stage) == [0]
        expected = metrics_of(tmp_path / "alone")
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
        return
    # Gone on with, from the checkpoint of step 2: the same.
    for name in ("complete.json", "model", "checkpoints/checkpoint-4"):
        path = tmp_path / "run" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert pool.run(run_rank, world_size=2, content=content, stage=stage) == [0, 0]
    assert metrics_of(tmp_path / "run") == lines
