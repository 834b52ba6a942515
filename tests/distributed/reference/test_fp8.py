"""An FP8 reference behind its gate, in training: what is scored by which model, in every layout alike.

There is no Transformer Engine here. The candidate is built through the settings of an FP8 reference, and the linear
weights of its FP8 layers are float8_e4m3fn tensors of torch (tests/float8.py); activations keep their type.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.training.test_training import LAYOUTS, REMIT, STEPS, configuration
from tests.distributed.training.test_training import material as material  # a fixture

GATE = 2
STATISTICS = ("lm_loss", "objective_loss", "grad_norm", "delta_mean", "delta_std", "weight_mean", "weight_std")


def train_rank(path: str) -> int:
    """One rank of ``remit train`` on a machine that claims to have FP8."""
    import patches

    patches.apply()
    from remit_megatron.models import build
    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train
    from tests.float8 import quantize_weights

    build_chunks, quantized = build.build_chunks, []

    def build_quantized(config: Any, *args: Any, **kwargs: Any) -> Any:
        chunks = build_chunks(config, *args, **kwargs)
        if config.transformer.fp8 is not None:
            assert config.transformer.fp8_param and config.transformer.first_last_layers_bf16
            for chunk in chunks:
                # A fixed scale rounds a number alike wherever its weight is cut.
                quantized.extend(quantize_weights(chunk, scale=64.0))
        return chunks

    with (
        mock.patch("remit_megatron.models.build.build_chunks", build_quantized),
        mock.patch("remit_megatron.models.fp8.missing", lambda recipe: None),
        mock.patch("remit_megatron.models.fp8.check_frozen", lambda *args: None),
    ):
        code = train(load_config(path))
    assert code == 0
    return len(quantized)


def train(pool: RankPool, material: dict[str, Path], name: str, *, layout: str | None = None, **reference: Any):
    """Runs with these settings of the reference; returns the metrics of each step and what was printed."""
    world_size, megatron = LAYOUTS[layout] if layout else (1, {})
    config = configuration(material, material["root"] / f"fp8_{name}_{layout}", REMIT, **megatron)
    config["reference"] |= reference
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True)
    path = run_dir / "input.yaml"
    path.write_text(json.dumps(config))
    quantized = pool.run(train_rank, world_size=world_size, path=str(path))
    tp = megatron.get("tensor_model_parallel_size", 1)
    replicas = world_size // tp // megatron.get("pipeline_model_parallel_size", 1)
    # Two of four layers, four weights each, shared out over the pipeline.
    assert sum(quantized) == (2 * 4 * tp * replicas if "fp8" in reference else 0)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == STEPS
    logs = "".join(path.read_text() for path in sorted((run_dir / "logs").glob("rank_*.log")))
    return metrics, [line for line in logs.splitlines() if "token weights" in line]


PASSING = {"fp8": "e4m3", "fp8_gate_batches": GATE, "fp8_tolerance": 2.0}


@pytest.fixture(scope="module")
def plain(pool, material):
    return train(pool, material, "plain")[0]


@pytest.fixture(scope="module")
def accepted(pool, material):
    return train(pool, material, "accepted", **PASSING)


def test_a_passing_candidate_scores_after_the_gate(plain, accepted):
    metrics, said = accepted
    for step in range(GATE):
        for name in STATISTICS:
            assert metrics[step][name] == plain[step][name], (
                f"step {step + 1} is scored by the trusted reference: {name}"
            )
    assert abs(metrics[GATE]["delta_mean"] - plain[GATE]["delta_mean"]) > 1e-4, "from here on by the candidate"
    assert metrics[GATE]["lm_loss"] == plain[GATE]["lm_loss"], "whose scores change nothing in the student's own loss"
    assert [line["reference_fp8"] for line in metrics] == ["measuring"] * (GATE - 1) + ["accepted"] * (STEPS - GATE + 1)
    error = metrics[-1]["reference_weight_error"]
    assert 0.001 < error < 0.2 and metrics[GATE - 1]["reference_weight_error"] == error
    assert "reference_fp8" not in plain[0]
    (line,) = said
    assert "reference: e4m3 (tensorwise) from here on" in line and f"of {GATE} steps; limit 2)" in line


def test_a_failing_candidate_leaves_no_trace(pool, material, plain, accepted):
    metrics, said = train(pool, material, "rejected", fp8="hybrid", fp8_gate_batches=GATE, fp8_tolerance=1e-6)
    for expected, found in zip(plain, metrics, strict=True):
        for name in STATISTICS:
            assert found[name] == expected[name], name
    assert metrics[-1]["reference_fp8"] == "rejected"
    assert metrics[-1]["reference_weight_error"] == accepted[0][-1]["reference_weight_error"]
    (line,) = said
    assert "WARNING" in line and "reference: hybrid (tensorwise) is not used" in line


@pytest.mark.parametrize("layout", ["tp2", "tp2_pp2", "pp2_virtual2", "dp2", "cp2"])
def test_layouts_agree(pool, material, accepted, layout):
    metrics, said = train(pool, material, "accepted", layout=layout, **PASSING)
    for expected, found in zip(accepted[0], metrics, strict=True):
        for name in (*STATISTICS, "reference_weight_error"):
            assert math.isclose(found[name], expected[name], rel_tol=1e-4, abs_tol=1e-5), (
                f"step {found['iteration']}, {name}: found {found[name]}; expected {expected[name]}"
            )
        assert found["reference_fp8"] == expected["reference_fp8"]
    assert len(said) == LAYOUTS[layout][0], "every rank has come to the verdict"
    counts = {line.split("average (")[1].split(" tokens")[0] for line in (*said, *accepted[1])}
    assert len(counts) == 1, "the same tokens are counted once in every layout"


def test_refused_where_nothing_could_be_measured(material):
    import patches

    patches.apply()
    from remit_megatron.run.configuration import load_config
    from remit_megatron.run.prepare import prepare
    from remit_megatron.runtime.errors import UserError

    run_dir = material["root"] / "fp8_refused"
    run_dir.mkdir()

    def refusal(objective: dict[str, Any], **reference: Any) -> str:
        config = configuration(material, run_dir, objective)
        config["reference"] |= reference
        path = run_dir / "input.yaml"
        path.write_text(json.dumps(config))
        with pytest.raises(UserError) as caught:
            prepare(load_config(path), world_size=1)
        return str(caught.value)

    assert refusal({"name": "kd"}, fp8="e4m3") == (
        "reference.fp8: found e4m3; expected null with objective kd: it has no weights whose error could be measured"
    )
    assert refusal(REMIT, fp8="e4m3", fp8_recipe="blockwise") == (
        "reference.fp8: found e4m3 with fp8_recipe blockwise; expected null: it needs Transformer Engine and a GPU"
    )
