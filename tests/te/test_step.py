"""Transformer Engine's own forward and backward passes on a CPU: logits and gradients against transformers."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed.models import test_parity as parity
from tests.families import CASES, VOCABULARY
from tests.te.machine import activate
from tests.te.models import LAYOUTS, LOCAL, PIPELINES, TE, ranks_of, step, whole_gradients


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """[4, LENGTH + 1]: two microbatches of two."""
    return torch.randint(0, VOCABULARY, (4, parity.LENGTH + 1), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(models, tokens) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Logits and gradients of transformers."""
    return {name: parity.truth(directory, tokens) for name, directory in models.items()}


@pytest.fixture(scope="module")
def on_layout(pool, models, tokens):
    """Runs all models on a layout, once; the results of its ranks by model."""

    @cache
    def run(layout: str, layers: str = TE, packed: bool = False, **choices: Any) -> dict[str, list[dict[str, Any]]]:
        ranks = pool.run(
            step,
            world_size=ranks_of(layout),
            directories={name: str(path) for name, path in models.items()},
            tokens=tokens.tolist(),
            layout=layout,
            layers=layers,
            documents=documents().tolist() if packed else None,
            **choices,
        )
        return {name: [rank[name] for rank in ranks] for name in models}

    return run


def documents() -> torch.Tensor:
    """[4, LENGTH]: documents of uneven lengths, other ones in each sequence; one fills its sequence."""
    lengths = [(5, 1, 12, 6), (24,), (1, 23), (7, 7, 10)]
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


def check_logits(results: list[dict[str, Any]], expected: torch.Tensor) -> None:
    assert any(result["logits"] for result in results)
    for found in (torch.cat(result["logits"]) for result in results if result["logits"]):
        assert found.shape[-1] > VOCABULARY and not found[..., VOCABULARY:].any(), "padding rows are zero"
        assert (found[..., :VOCABULARY] - expected).abs().max() <= 5e-5


def check_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for weight, gradient in expected.items():
        error = ((ours[weight] - gradient).norm() / gradient.norm()).item()
        assert error <= 1e-5, f"{weight}: {error}"


@pytest.mark.parametrize("layout", LAYOUTS | PIPELINES)
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(models, expected, on_layout, case, layout):
    results = on_layout(layout)[case]
    logits, gradients = expected[case]
    check_logits(results, logits)
    check_gradients(whole_gradients(models[case], results), gradients)
    assert not any(result["fused"] for result in results)


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_the_layers_add_to_the_buffer(models, expected, on_layout, case):
    """And rotary embeddings in one kernel, where the family has them: both are on where a run has these layers."""
    results = on_layout("tp2_sp", gradient_accumulation_fusion=True, apply_rope_fusion=True)[case]
    logits, gradients = expected[case]
    check_logits(results, logits)
    check_gradients(whole_gradients(models[case], results), gradients)
    for result in results:
        matrices = [name for name in result["fused"] if not name.endswith("norm_weight")]
        assert result["fused"] == matrices and len(matrices) >= 4 * 4, "every linear layer of four layers"
        assert all(".layers." in name for name in matrices), "not the output layer"
        # Queries and keys of each layer that has rotary embeddings, in two microbatches.
        rotated = result["calls"].get("fused_rope_forward", 0)
        assert rotated == 0 if case.startswith("youtu") else 0 < rotated <= 2 * 2 * 4
        assert result["calls"].get("fused_rope_backward", 0) == rotated


@pytest.mark.parametrize("case", CASES)
def test_what_fused_gradients_save(on_layout, case):
    """For each matrix and microbatch one operation, which reads a gradient and reads and writes the buffer."""
    plain = on_layout("tp2_sp")[case]
    fused = on_layout("tp2_sp", gradient_accumulation_fusion=True, apply_rope_fusion=True)[case]
    for before, after in zip(plain, fused, strict=True):
        matrices = sum(after["sizes"][name] for name in after["fused"])
        assert before["additions"] == 2 * len(before["sizes"]), "every weight, in two microbatches"
        assert before["additions"] - after["additions"] == 2 * len(after["fused"])
        assert before["added"] - after["added"] == 2 * matrices > before["added"] / 2


# What a run sets where it has these layers on a GPU, beside Megatron's own defaults.
OF_A_RUN = {"gradient_accumulation_fusion": True, "apply_rope_fusion": True}


@pytest.mark.parametrize("choices", [{}, OF_A_RUN], ids=["plain", "as a run"])
@pytest.mark.parametrize("layout", LAYOUTS | PIPELINES)
@pytest.mark.parametrize("case", CASES)
def test_packed_documents_are_those_of_a_mask(models, on_layout, case, layout, choices):
    """Logits and gradients of the local layers under a mask, which other tests compare with documents alone."""
    masked = on_layout("one", layers=LOCAL, packed=True)[case]
    packed = on_layout(layout, packed=True, **choices)[case]
    logits = torch.cat(masked[0]["logits"])[..., :VOCABULARY]
    check_logits(packed, logits)
    check_gradients(whole_gradients(models[case], packed), whole_gradients(models[case], masked))
    for result in packed:
        rotated = result["calls"].get("fused_rope_forward", 0)
        assert (rotated > 0) is (bool(choices) and not case.startswith("youtu")), "in one kernel where it was asked for"
        assert bool(result["fused"]) is bool(choices)
        assert all(error <= 1e-5 for error in (result["attention"] or {}).values())
    assert any(result["attention"] for result in packed)


@pytest.mark.parametrize("layout", ["one", "tp2_sp"])
@pytest.mark.parametrize("case", CASES)
def test_bf16_is_as_good_as_the_local_layers(models, expected, on_layout, case, layout):
    """Weights and activations in bfloat16: not further from transformers' float32 than the local layers are."""
    exact, gradients = expected[case]
    found = {layers: on_layout(layout, layers=layers, params_dtype=torch.bfloat16)[case] for layers in (TE, LOCAL)}
    logits = {
        layers: torch.cat(ranks[0]["logits"])[..., :VOCABULARY].float() - exact for layers, ranks in found.items()
    }
    assert logits[LOCAL].norm() > 1e-3 * exact.norm(), "rounding shows"
    assert logits[TE].norm() <= 1.2 * logits[LOCAL].norm()
    ours, local = whole_gradients(models[case], found[TE]), parity.merged(models[case], found[LOCAL])
    for weight, gradient in gradients.items():
        error, other = ((one[weight] - gradient).norm() / gradient.norm() for one in (ours, local))
        assert error <= 1.5 * other + 2e-3, f"{weight}: {error} beside {other}"


def backends(context_parallel: bool) -> dict[str, bool]:
    """Which of Transformer Engine's attentions are left when only the one of plain torch may be taken."""
    activate()
    os.environ |= {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}  # asking for those asks the driver
    from transformer_engine.pytorch.attention.dot_product_attention.utils import (  # type: ignore[import-not-found]
        AttentionParams,
        get_attention_backend,
    )

    parameters = AttentionParams(
        context_parallel=context_parallel,
        cp_size=1 + context_parallel,
        attn_mask_type="causal",
        qkv_layout="sbhd_sbhd_sbhd",
    )
    flash, _, fused, _, unfused, _ = get_attention_backend(parameters)
    return {"flash": bool(flash), "fused": bool(fused), "unfused": bool(unfused)}


def test_context_parallelism_is_left_to_kernels(pool):
    """Why it is not among the layouts, as docs/cluster.md says: its unfused attention does not take part in it."""
    assert pool.run(backends, world_size=1, context_parallel=False)[0]["unfused"]
    assert not pool.run(backends, world_size=1, context_parallel=True)[0]["unfused"]
