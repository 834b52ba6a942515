"""`remit plan` against runs: every tensor that training holds is measured and compared with the arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool
from tests.families import FIRST_CASES, hf_values
from tests.saved_tensors import SavedTensors, megatron_objects, state_bytes
from tests.tiny import make_tokenizer, write_documents

# Peak of what autograd keeps, against the plan's figure. The rest is bookkeeping of a few bytes a token; figures are in
# docs/benchmarks/plan.md.
TOLERANCE = 0.002
FAMILY_TOLERANCE = {"youtu": 0.015}

LLAMA = "llama-gqa_4_2_untied"
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "bf16_document_mask": (1, {"bf16": True, "bias_swiglu_fusion": True, "document_mask": True}),
    "mlp_recomputed": (1, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
    "pp2_all_recomputed": (2, FULL | {"recompute_method": "uniform", PP: 2}),
    "pp2_virtual2": (2, {PP: 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "cp2_distributed_optimizer": (2, {"context_parallel_size": 2, "use_distributed_optimizer": True}),
    "dp2_distributed_optimizer_bf16": (2, {"use_distributed_optimizer": True, "bf16": True}),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A tokenizer and token files."""
    from remit_megatron.data.build import build_dataset

    root = tmp_path_factory.mktemp("plan")
    tokenizer = make_tokenizer(root / "tokenizer")
    documents = write_documents(root / "documents.jsonl", count=200, seed=3)
    build_dataset([str(documents)], tokenizer=str(tokenizer), output=str(root / "corpus"))
    return root


def train_rank(path: str) -> dict[str, float]:
    """One rank of ``remit train`` for a step, measured."""
    import patches

    patches.apply()
    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train
    from remit_megatron.training.engine import Engine
    from remit_megatron.training.step import TrainingStep

    found: dict[str, float] = {}
    saved, earlier = SavedTensors(), megatron_objects()  # of other tests in this process
    after_step, forward_step = Engine.after_step, TrainingStep.forward_step

    def measured_after_step(self, *args, **kwargs):
        found.update(state_bytes(earlier))
        return after_step(self, *args, **kwargs)

    def measured_forward_step(self, *args, **kwargs):
        saved.start()
        return forward_step(self, *args, **kwargs)

    Engine.after_step, TrainingStep.forward_step = measured_after_step, measured_forward_step
    try:
        with saved.recording():
            assert train(load_config(path)) == 0
    finally:
        Engine.after_step, TrainingStep.forward_step = after_step, forward_step
    return found | {"activations": saved.peak}


def planned_ranks(path: Path, *, world_size: int) -> list[dict[str, float]]:
    """What the plan says of every rank of the same run on this machine's kernels."""
    import patches

    patches.apply()
    from remit_megatron.cluster.hardware import gpu_named
    from remit_megatron.cluster.planner import Planner
    from remit_megatron.cluster.state import place_of
    from remit_megatron.cluster.timing import Machine
    from remit_megatron.run.configuration import load_config
    from remit_megatron.run.prepare import prepare

    prepared = prepare(load_config(path), world_size=world_size)
    planner = Planner(
        prepared.hf_config,
        prepared.arguments,
        machine=Machine(gpu_named("H100"), 8, 0.4),
        document_mask=prepared.config.data.document_mask,
        fused=False,
    )
    ranks = []
    for rank in range(world_size):
        place = place_of(prepared.arguments, rank)
        memory = planner.memory(prepared.arguments, place.stage, shard=place.shard)
        state = {name: getattr(memory.state, name) for name in ("parameters", "weights", "gradients", "optimizer")}
        ranks.append(state | {"activations": memory.activations.kept})
    return ranks


def measure(
    pool: RankPool, material: Path, folder: Path, *, model: str, world_size: int, settings: dict[str, Any]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """(measured, planned) of every rank."""
    megatron = {name: value for name, value in settings.items() if name != "document_mask"}
    config = {
        "model": hf_values(model),
        "objective": {"name": "ntp"},
        "data": {
            "train": [[1.0, str(material / "corpus")]],
            "tokenizer": str(material / "tokenizer"),
            "document_mask": settings.get("document_mask", False),
            "num_workers": 0,
        },
        "megatron": {"seq_length": 64, "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 1, "lr": 1e-3}
        | {"make_vocab_size_divisible_by": 4}
        | megatron,
        "run_dir": str(folder / "run"),
        "logging": {"tensorboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    measured = pool.run(train_rank, world_size=world_size, path=str(path))
    return measured, planned_ranks(path, world_size=world_size)


def compare(measured: list[dict[str, float]], planned: list[dict[str, float]], *, tolerance: float) -> None:
    for rank, (found, expected) in enumerate(zip(measured, planned, strict=True)):
        for name in ("parameters", "weights", "gradients", "optimizer"):
            assert found[name] == expected[name], f"rank {rank}: {name}"
        assert expected["activations"] == pytest.approx(found["activations"], rel=tolerance), f"rank {rank}"


@pytest.mark.parametrize("case", CASES)
def test_plan_is_what_a_run_holds(pool, material, tmp_path, case):
    world_size, settings = CASES[case]
    measured, planned = measure(pool, material, tmp_path, model=LLAMA, world_size=world_size, settings=settings)
    compare(measured, planned, tolerance=TOLERANCE)


@pytest.mark.parametrize("model", FIRST_CASES)
def test_plan_knows_every_family(pool, material, tmp_path, model):
    settings = {TP: 2, "sequence_parallel": True, "bf16": True}
    measured, planned = measure(pool, material, tmp_path, model=model, world_size=2, settings=settings)
    compare(measured, planned, tolerance=FAMILY_TOLERANCE.get(model.partition("-")[0], TOLERANCE))
