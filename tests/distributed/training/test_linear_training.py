"""Training with ``loss.linear``: the numbers of the path through logits, on every kind of layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.run.configuration import load_config
from remit_megatron.runtime.errors import UserError
from tests.distributed.training.test_training import LAYOUTS, REMIT, STEPS, configuration, train
from tests.distributed.training.test_training import material as material  # a fixture

COMPARED = (
    "lm_loss",
    "objective_loss",
    "grad_norm",
    "weight_mean",
    "weight_std",
    "weight_clipped_low",
    "weight_clipped_high",
    "delta_mean",
    "delta_std",
    "dropped_tokens",
)
OBJECTIVES = {
    "remit": REMIT,
    "ntp": {"name": "ntp"},
    "rho1": {"name": "rho1", "scope": "global_batch"},
}
CASES = (
    ("single", "remit"),
    ("single", "rho1"),
    ("tp2", "ntp"),
    ("tp2_sp", "remit"),
    ("tp2_pp2", "remit"),
    ("pp2_virtual2", "remit"),
    ("cp2", "remit"),
)


def train_linear_rank(path: str) -> dict[str, Any]:
    """One rank of ``remit train``, with chunks of one sequence; counts how the losses are made."""
    import sys

    import patches

    patches.apply()
    from remit_megatron.training import linear_loss, step
    from remit_megatron.training.command import train

    kernel = sys.modules["remit_megatron.kernels.linear_token_loss"]
    counts = {"chunks": 0, "token_loss": 0}
    originals = (kernel._apply, step.token_loss, kernel._CHUNK_BYTES)

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    kernel._apply, step.token_loss = counted("chunks", originals[0]), counted("token_loss", originals[1])
    kernel._CHUNK_BYTES = 1
    try:
        assert linear_loss.linear_token_loss is kernel.linear_token_loss
        code = train(load_config(path))
    finally:
        kernel._apply, step.token_loss, kernel._CHUNK_BYTES = originals
    return {"code": code} | counts


def linear(config: dict[str, Any]) -> Path:
    """Writes the configuration with ``loss.linear`` on."""
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "input.yaml"
    path.write_text(json.dumps(config | {"loss": {"linear": True}}))  # JSON is YAML
    return path


def validated(config: dict[str, Any]) -> dict[str, Any]:
    """With a validation in the middle."""
    config["data"]["valid"] = config["data"]["train"]
    config["megatron"] |= {"eval_interval": 2, "eval_iters": 2}
    return config


@pytest.fixture(scope="module")
def logits(pool, material) -> dict[str, Any]:
    """The runs on one rank through logits: metrics and validations."""
    found = {}
    for name, objective in OBJECTIVES.items():
        config = validated(configuration(material, material["root"] / f"logits_{name}", objective))
        found[name] = train(pool, config, world_size=1), validations(config)
    return found


def validations(config: dict[str, Any]) -> list[dict[str, Any]]:
    path = Path(config["run_dir"]) / "validation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("layout, objective", CASES)
def test_it_trains_as_through_logits(pool, material, logits, layout, objective):
    world_size, megatron = LAYOUTS.get(layout, (1, {}))
    run_dir = material["root"] / f"linear_{layout}_{objective}"
    config = validated(configuration(material, run_dir, OBJECTIVES[objective], **megatron))
    ranks = pool.run(train_linear_rank, world_size=world_size, path=str(linear(config)))
    assert [rank["code"] for rank in ranks] == [0] * world_size
    assert not any(rank["token_loss"] for rank in ranks), "no microbatch's logits"
    # 8 sequences a step, one in each chunk; ranks of earlier pipeline stages make no losses.
    last_stage = [rank for rank in ranks if rank["chunks"]]
    assert len(last_stage) == world_size // megatron.get("pipeline_model_parallel_size", 1)
    assert all(rank["chunks"] == 8 * STEPS for rank in last_stage)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == STEPS
    for expected, found in zip(logits[objective][0], metrics, strict=True):
        for name in COMPARED:
            assert math.isclose(found[name], expected[name], rel_tol=1e-4, abs_tol=1e-5), (
                f"step {found['iteration']}, {name}: found {found[name]}; expected {expected[name]}"
            )
    found, expected = validations(config), logits[objective][1]
    assert len(found) == len(expected) >= 2
    for a, b in zip(found, expected, strict=True):
        assert a["iteration"] == b["iteration"] and math.isclose(a["lm_loss"], b["lm_loss"], rel_tol=1e-4)


@pytest.mark.parametrize(
    "objective, megatron, message",
    [
        ({"name": "kd"}, {}, "false with objective kd"),
        ({"name": "rho1", "scope": "micro_batch"}, {}, "false with objective rho1"),
        ({"name": "ntp"}, {"fp16": True}, "false with megatron.fp16"),
    ],
)
def test_what_needs_logits_is_refused(material, objective, megatron, message):
    from remit_megatron.run.prepare import prepare

    config = configuration(material, material["root"] / "refused", objective, **megatron)
    with pytest.raises(UserError, match=f"loss.linear: found true; expected {message}"):
        prepare(load_config(linear(config)), world_size=1, rank=0)
