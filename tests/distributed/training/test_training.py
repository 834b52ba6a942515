"""The engine: every layout trains alike, remit with epsilon 0 is ntp, ntp is Megatron's own loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool
from tests.tiny import make_llama, make_tokenizer, write_documents

STEPS = 5

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2_distributed_optimizer": (2, {"use_distributed_optimizer": True}),
    "dp2_overlap": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "tp2_dp2_sp_distributed_optimizer": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True},
    ),
    "pp2_virtual2": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "cp2": (2, {"context_parallel_size": 2}),
}


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> dict[str, Path]:
    """A student, a reference that differs, a tokenizer, and token files of documents of uneven length."""
    from remit_megatron.data.build import build_dataset

    root = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer(root / "tokenizer")
    student = make_llama(root / "student", seed=1, tokenizer=tokenizer)
    reference = make_llama(
        root / "reference", seed=2, tokenizer=tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 50000.0}
    )
    documents = write_documents(root / "documents.jsonl", count=400, seed=3)
    build_dataset([str(documents)], tokenizer=str(tokenizer), output=str(root / "corpus"))
    return {"root": root, "tokenizer": tokenizer, "student": student, "reference": reference, "corpus": root / "corpus"}


def configuration(
    material: dict[str, Path], run_dir: Path, objective: dict[str, Any], **megatron: Any
) -> dict[str, Any]:
    """A run of a few steps: uneven masks, documents that do not see each other, several microbatches."""
    return {
        "init": str(material["student"]),
        "objective": objective,
        "reference": {"checkpoint": str(material["reference"])},
        "data": {
            "train": [[1.0, str(material["corpus"])]],
            "tokenizer": str(material["tokenizer"]),
            "document_mask": True,
            "mask_eod_loss": True,
            "num_workers": 0,
        },
        "megatron": {
            "seq_length": 64,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "train_iters": STEPS,
            "lr": 1e-3,
            "min_lr": 1e-5,
            "save_interval": 1000,
            "make_vocab_size_divisible_by": 4,
        }
        | megatron,
        "run_dir": str(run_dir),
        "logging": {"tensorboard": False},
    }


def train_rank(config: dict[str, Any], path: str) -> int:
    """One rank of ``remit train``."""
    import patches

    patches.apply()
    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train

    del config
    return train(load_config(path))


def train(pool: RankPool, config: dict[str, Any], *, world_size: int) -> list[dict[str, Any]]:
    """Runs a configuration on ``world_size`` ranks; returns its metrics."""
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "input.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    assert pool.run(train_rank, world_size=world_size, config={}, path=str(path)) == [0] * world_size
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


REMIT = {"name": "remit", "epsilon": 0.2, "centering": "sequence"}


@pytest.fixture(scope="session")
def single(pool, material) -> dict[str, list[dict[str, Any]]]:
    """The same run on one rank, for both objectives."""
    root = material["root"]
    return {
        name: train(pool, configuration(material, root / f"single_{name}", objective), world_size=1)
        for name, objective in (("ntp", {"name": "ntp"}), ("remit", REMIT))
    }


def test_single_runs_are_real(single):
    ntp, remit = single["ntp"], single["remit"]
    assert len(ntp) == len(remit) == STEPS
    assert ntp[0]["lm_loss"] == pytest.approx(remit[0]["lm_loss"], rel=1e-6), "the same batch, the same weights"
    assert ntp[-1]["lm_loss"] < ntp[0]["lm_loss"]
    assert remit[0]["weight_std"] > 0.05
    assert remit[0]["weight_clipped_low"] > 0 and remit[0]["weight_clipped_high"] > 0
    assert remit[0]["objective_loss"] != pytest.approx(remit[0]["lm_loss"], rel=1e-4)
    assert ntp[0]["objective_loss"] == ntp[0]["lm_loss"]


@pytest.mark.parametrize("objective", ["ntp", "remit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(pool, material, single, layout, objective):
    world_size, megatron = LAYOUTS[layout]
    settings = {"ntp": {"name": "ntp"}, "remit": REMIT}[objective]
    config = configuration(material, material["root"] / f"{layout}_{objective}", settings, **megatron)
    if layout == "cp2" and objective == "remit":
        config["objective"] = REMIT | {"centering": "sequence"}
    metrics = train(pool, config, world_size=world_size)
    assert len(metrics) == STEPS
    for expected, found in zip(single[objective], metrics, strict=True):
        for name in ("lm_loss", "objective_loss", "grad_norm", "weight_mean", "weight_std", "delta_mean"):
            assert math.isclose(found[name], expected[name], rel_tol=1e-4, abs_tol=1e-5), (
                f"step {found['iteration']}, {name}: found {found[name]}; expected {expected[name]}"
            )


def test_epsilon_zero_is_ntp(pool, material, single):
    objective = {"name": "remit", "epsilon": 0.0}
    metrics = train(pool, configuration(material, material["root"] / "epsilon0", objective), world_size=1)
    for expected, found in zip(single["ntp"], metrics, strict=True):
        for name in ("lm_loss", "objective_loss", "grad_norm"):
            assert found[name] == expected[name], name
        assert found["weight_mean"] == 1.0 and found["weight_std"] == 0.0


def test_document_centering_trains(pool, material, single):
    config = configuration(material, material["root"] / "document", REMIT | {"centering": "document"})
    metrics = train(pool, config, world_size=1)
    assert metrics[0]["lm_loss"] == single["remit"][0]["lm_loss"]
    assert metrics[0]["objective_loss"] != single["remit"][0]["objective_loss"]


def megatron_loss_and_gradients(
    student: str, tokens: list[list[int]], labels: list[list[int]], mask: list[list[float]]
) -> dict[str, Any]:
    """The same batch through Megatron's own loss, and through ours: losses and all gradients."""
    import patches

    patches.apply()
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.batch import to_batch
    from remit_megatron.models.build import build_chunks, default_arguments, model_config, unwrap
    from remit_megatron.models.forward import ModelForward
    from remit_megatron.objectives import build_objective
    from remit_megatron.runtime import parallel
    from remit_megatron.training.step import TrainingStep

    environment = parallel.rank_environment()
    parallel.initialize(environment)
    parallel_state.initialize_model_parallel(environment.world_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    source = resolve(student)
    arguments = default_arguments(tensor_model_parallel_size=environment.world_size)
    chunks = build_chunks(model_config(source.hf_config, arguments), ProcessGroupCollection.use_mpu_process_groups())
    load_weights(chunks, source)
    model = unwrap(chunks[0]).train().requires_grad_(True)
    item = {"tokens": torch.tensor(tokens), "labels": torch.tensor(labels), "loss_mask": torch.tensor(mask)}
    batch = to_batch(item, device=torch.device("cpu"), eod_id=0)

    def gradients() -> dict[str, Any]:
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return found

    losses = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    native = (losses.float() * batch.loss_mask).sum()
    native.backward()
    native_gradients = gradients()

    step = TrainingStep(
        objective=build_objective("ntp"),
        vocab_size=source.hf_config["vocab_size"],
        forward=ModelForward(eod_id=0, groups=ProcessGroupCollection.use_mpu_process_groups),
    )
    output, loss = step.forward_step(iter([item]), model)
    ours, counted, _ = loss(output)
    ours.backward()
    our_gradients = gradients()
    worst = max(
        ((our_gradients[name] - value).norm() / value.norm().clamp(min=1e-12)).item()
        for name, value in native_gradients.items()
    )
    return {
        "native": native.item(),
        "ours": ours.item(),
        "counted": int(counted),
        "worst": worst,
        "parameters": len(our_gradients),
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_ntp_equals_megatron_loss(pool, material, world_size):
    import random

    generator = random.Random(0)
    # Megatron does not know which columns are padding: a vocabulary that divides evenly has none.
    student = make_llama(material["root"] / "even", seed=5, tokenizer=material["tokenizer"], vocab_size=52)
    tokens = [[generator.randrange(52) for _ in range(33)] for _ in range(3)]
    mask = [[float(generator.random() < 0.7) for _ in range(32)] for _ in range(2)] + [[0.0] * 32]
    results = pool.run(
        megatron_loss_and_gradients,
        world_size=world_size,
        student=str(student),
        tokens=[row[:-1] for row in tokens],
        labels=[row[1:] for row in tokens],
        mask=mask,
    )
    for result in results:
        assert result["ours"] == pytest.approx(result["native"], rel=2e-7)
        assert result["counted"] == sum(map(sum, mask))
        assert result["parameters"] > 20 and result["worst"] < 2e-6
