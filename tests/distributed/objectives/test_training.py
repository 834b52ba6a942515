"""rho1 and kd in training: every layout trains like one process, and each does what its definition says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.training.test_training import LAYOUTS, STEPS, configuration, train
from tests.distributed.training.test_training import material as material  # a fixture

OBJECTIVES: dict[str, dict[str, Any]] = {
    "rho1_sequence": {"name": "rho1", "keep": 0.6, "scope": "sequence"},
    "rho1_micro_batch": {"name": "rho1", "keep": 0.6, "scope": "micro_batch"},
    "rho1_global_batch": {"name": "rho1", "keep": 0.6, "scope": "global_batch"},
    "kd": {"name": "kd"},
    "kd_mixed": {"name": "kd", "temperature": 2.0, "ntp_weight": 0.3},
}
CASES = [("tp2_pp2", name) for name in OBJECTIVES] + [
    ("dp2", "rho1_global_batch"),
    ("cp2", "rho1_sequence"),
    ("cp2", "rho1_micro_batch"),
    ("cp2", "rho1_global_batch"),
    ("pp2_virtual2", "rho1_global_batch"),
    ("pp2_virtual2", "kd"),
    ("tp2_sp", "kd_mixed"),
    ("dp2_distributed_optimizer", "kd"),
]


@pytest.fixture(scope="module")
def single(pool, material) -> dict[str, list[dict[str, Any]]]:
    """Each objective on one rank, and ntp."""
    objectives = OBJECTIVES | {"ntp": {"name": "ntp"}}
    return {
        name: train(pool, configuration(material, material["root"] / f"objective_{name}", objective), world_size=1)
        for name, objective in objectives.items()
    }


def test_single_runs_are_real(single):
    ntp = single["ntp"]
    for name in OBJECTIVES:
        metrics = single[name]
        assert len(metrics) == STEPS
        assert metrics[0]["lm_loss"] == pytest.approx(ntp[0]["lm_loss"], rel=1e-6), "same batch, same weights"
        assert metrics[0]["objective_loss"] != pytest.approx(metrics[0]["lm_loss"], rel=1e-2)
        assert metrics[0]["grad_norm"] != pytest.approx(ntp[0]["grad_norm"], rel=1e-3)
        assert metrics[-1]["objective_loss"] < metrics[0]["objective_loss"]
        assert metrics[0]["weight_mean"] == 1 and metrics[0]["dropped_tokens"] == 0
    first = {name: single[name][0] for name in OBJECTIVES}
    scopes = [first[f"rho1_{scope}"] for scope in ("sequence", "micro_batch", "global_batch")]
    assert len({round(metrics["delta_mean"], 5) for metrics in scopes}) == 3, "the scopes rank differently"
    # Of all ways to keep so many tokens, the largest over the whole batch have the largest mean.
    assert scopes[2]["delta_mean"] == max(metrics["delta_mean"] for metrics in scopes)
    assert first["kd"]["objective_loss"] > 0


@pytest.mark.parametrize(("layout", "objective"), CASES)
def test_layouts_agree(pool, material, single, layout, objective):
    world_size, megatron = LAYOUTS[layout]
    run_dir = material["root"] / f"{layout}_{objective}"
    metrics = train(pool, configuration(material, run_dir, OBJECTIVES[objective], **megatron), world_size=world_size)
    assert len(metrics) == STEPS
    for expected, found in zip(single[objective], metrics, strict=True):
        for name in ("lm_loss", "objective_loss", "grad_norm", "delta_mean", "delta_std"):
            assert math.isclose(found[name], expected[name], rel_tol=1e-4, abs_tol=1e-5), (
                f"step {found['iteration']}, {name}: found {found[name]}; expected {expected[name]}"
            )


def test_keeping_all_tokens_is_ntp(pool, material, single):
    for scope in ("sequence", "global_batch"):
        objective = {"name": "rho1", "keep": 1.0, "scope": scope}
        run_dir = material["root"] / f"keep_all_{scope}"
        metrics = train(pool, configuration(material, run_dir, objective), world_size=1)
        for expected, found in zip(single["ntp"], metrics, strict=True):
            for name in ("lm_loss", "objective_loss", "grad_norm"):
                assert found[name] == expected[name], name


def test_evaluation_reports_the_plain_loss(pool, material, single):
    """Validation runs without a reference; of kd's two losses only the plain one is there."""
    import json

    ends = {}
    for name in ("ntp", "kd"):
        objective = OBJECTIVES["kd"] if name == "kd" else {"name": "ntp"}
        settings = {"train_iters": 1, "eval_interval": 1, "eval_iters": 2, "lr": 1e-12, "min_lr": 0.0}
        config = configuration(material, material["root"] / f"validated_{name}", objective, **settings)
        config["data"]["valid"] = config["data"]["train"]
        train(pool, config, world_size=1)
        lines = (Path(config["run_dir"]) / "validation.jsonl").read_text().splitlines()
        ends[name] = json.loads(lines[-1])["lm_loss"]
    assert ends["kd"] == pytest.approx(ends["ntp"], rel=1e-6)
