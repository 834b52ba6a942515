"""The replicated reference: the numbers of the pipelined one, a step ahead, in the student's pauses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_training import REMIT, STEPS, configuration, train
from tests.distributed.test_training import material as material  # a fixture

COMPARED = ("lm_loss", "objective_loss", "grad_norm", "weight_mean", "weight_std", "delta_mean", "delta_std")

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2_sp_pp2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    ),
    "pp2_virtual2": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "cp2_pp2": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}),
}


def run(
    material, name: str, placement: str, *, reference: dict[str, Any] | None = None, **megatron: Any
) -> dict[str, Any]:
    """A run with a reference in a place."""
    config = configuration(material, material["root"] / f"replicated_{name}_{placement}", REMIT, **megatron)
    config["reference"] |= {"placement": placement} | (reference or {})
    return config


def same(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Bit for bit: on a CPU both placements run the same kernels on the same shapes."""
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert {name: one[name] for name in COMPARED} == {name: other[name] for name in COMPARED}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_of_the_pipeline(pool, material, layout):
    world_size, megatron = LAYOUTS[layout]
    expected = train(pool, run(material, layout, "pipeline", **megatron), world_size=world_size)
    found = train(pool, run(material, layout, "replicated", **megatron), world_size=world_size)
    assert len(found) == STEPS and found[0]["weight_std"] > 0.05
    same(expected, found)
