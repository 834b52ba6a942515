"""What the tests of `remit plan` share: a run that exists nowhere but in its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import patches

patches.apply()

from remit_megatron.cluster import timing  # noqa: E402
from remit_megatron.cluster.hardware import gpu_named  # noqa: E402
from remit_megatron.models.build import megatron_arguments  # noqa: E402
from remit_megatron.run.configuration import load_config, load_model_description  # noqa: E402
from remit_megatron.run.megatron_args import build_arguments  # noqa: E402

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
MODELS = ("llama3_1b", "olmo2_1b", "smollm3_3b", "youtu_2b")
H100 = timing.Machine(gpu_named("H100"), per_node=8, utilization=0.4)


def run_file(folder: Path, model: Any = "llama3_1b", *, objective: str = "ntp", **megatron: Any) -> Path:
    """A run configuration; its data and its reference exist nowhere."""
    config = {
        "model": model,
        "objective": {"name": objective},
        "reference": {"checkpoint": "checkpoints/nowhere"} if objective != "ntp" else None,
        "data": {"train": "data/nowhere", "tokenizer": "nowhere"},
        "megatron": {
            "seq_length": 4096,
            "micro_batch_size": 1,
            "global_batch_size": 512,
            "train_iters": 1000,
            "lr": 1e-4,
        }
        | megatron,
        "run_dir": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    return path


def arguments(folder: Path, world_size: int, model: Any = "llama3_1b", *, rank: int = 0, **megatron: Any):
    config = load_config(run_file(folder, model, **megatron))
    architecture = megatron_arguments(load_model_description(config.model))
    return build_arguments(config, architecture, world_size=world_size, rank=rank, gpu=True)
