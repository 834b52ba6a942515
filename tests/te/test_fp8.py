"""A frozen model with FP8 weights, Transformer Engine's own tensors: what is quantized, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import VOCABULARY, make_case
from tests.te.machine import activate
from tests.te.models import LOCAL, TE, sizes_of

# Rows and columns are multiples of 16 on two ranks.
SIZES: dict[str, dict[str, Any]] = {
    "llama-gqa_4_2_untied": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
    "olmo2-mha_untied": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
    "youtu-narrow_values_tied": {
        "hidden_size": 64, "intermediate_size": 96, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 16,
    },
}  # fmt: skip
TOKENS = 48
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "_down_proj", "_up_proj", "linear_q_proj")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Random models on disk."""
    root = tmp_path_factory.mktemp("models")
    return {case: make_case(root / case, case, seed=5, **sizes) for case, sizes in SIZES.items()}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Through float8_e4m3fn and back, scaled by its largest value."""
    highest = torch.finfo(torch.float8_e4m3fn).max
    scale = highest / x.abs().max()
    return (x * scale).clamp(-highest, highest).to(torch.float8_e4m3fn).float() / scale


def emulated(chunk: Any, layers: list[int]) -> None:
    """Rounds weights and inputs of the linear layers of these layers of a model of the local modules."""
    for number in layers:
        for name, module in chunk.decoder.layers[number].named_modules():
            if any(name.endswith(part) for part in LINEAR):
                module.weight.data = rounded(module.weight.data)
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]), *inputs[1:]))


def score(directories: dict[str, str], layout: str) -> dict[str, Any]:
    """Losses of a reference in FP8 and what it holds; on one rank also those of its emulation and of the exact model.

    float32 in place of 16 bits, so that nothing but FP8 rounds.
    """
    activate()
    from megatron.core.transformer.enums import AttnBackend

    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models import fp8
    from remit_megatron.models.build import default_arguments, unwrap
    from remit_megatron.models.forward import ModelForward
    from remit_megatron.reference.live import LiveReference

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (2, TOKENS + 1), generator=generator)
    item = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "loss_mask": torch.ones(2, TOKENS)}
    results: dict[str, Any] = {"support": fp8.support()}
    with process_groups(**sizes_of(layout)) as groups, torch.no_grad():
        forward = ModelForward(eod_id=-1, groups=lambda: groups)
        for case, directory in directories.items():
            found: dict[str, Any] = {}
            for kind in ("fp8",) if layout != "one" else ("fp8", "emulated", "exact"):
                arguments = default_arguments(
                    transformer_impl=TE if kind == "fp8" else LOCAL,
                    attention_backend=AttnBackend.unfused,
                    **sizes_of(layout),
                )
                reference = LiveReference.load(
                    resolve(directory), arguments, forward=forward, fp8="e4m3" if kind == "fp8" else None
                )
                (chunk,) = (unwrap(one) for one in reference.chunks)
                if kind == "fp8":
                    found["held"] = {
                        name: (type(parameter.data).__name__, _values(parameter).clone())
                        for name, parameter in chunk.named_parameters()
                    }
                if kind == "emulated":
                    emulated(chunk, [1, 2])
                found[kind] = forward.run(chunk, forward.batch(item), reference.losses)
            results[case] = found
    return results


def _values(parameter: Any) -> torch.Tensor:
    return (
        parameter.dequantize()
        if hasattr(parameter, "dequantize") and "Float8" in repr(type(parameter))
        else parameter.data
    )


@pytest.fixture(scope="module")
def scored(pool, models) -> dict[str, Any]:
    """On one rank."""
    (rank,) = pool.run(score, world_size=1, directories={c: str(p) for c, p in models.items()}, layout="one")
    return rank


def test_what_the_gpu_can_do_is_transformer_engines_answer(scored):
    """An H100's answers, of which Megatron's names are asked."""
    assert scored["support"]["delayed"] is None and scored["support"]["tensorwise"] is None
    assert "10.0" in scored["support"]["mxfp8"]


@pytest.mark.parametrize("case", SIZES)
def test_linear_weights_of_the_inner_layers_are_fp8_and_nothing_else(scored, models, case):
    from tests.te.models import names_of

    held = scored[case]["held"]
    quantized = {name for name, (kind, _) in held.items() if kind == "Float8Tensor"}
    names = names_of(models[case])
    inner = [f"{names.megatron_prefix}{layer}." for layer in (1, 2)]
    expected = {name for name, (_, value) in held.items() if name.startswith(tuple(inner)) and value.ndim == 2}
    assert quantized == expected and len(expected) >= 8
    assert all(torch.isfinite(value).all() for _, value in held.values())


@pytest.mark.parametrize("case", SIZES)
def test_losses_are_those_of_rounded_weights_and_inputs(scored, case):
    found = scored[case]
    effect = (found["emulated"] - found["exact"]).abs().mean()
    error = (found["fp8"] - found["emulated"]).abs().mean()
    assert effect > 1e-3, "rounding shows"
    assert error <= 0.02 * effect, (error.item(), effect.item())


@pytest.mark.parametrize("case", SIZES)
def test_two_ranks_score_alike(pool, scored, models, case):
    """Scales are of each rank's part of a weight, so that the numbers are others, of the same size of error."""
    ranks = pool.run(score, world_size=2, directories={case: str(models[case])}, layout="tp2")
    effect = (scored[case]["fp8"] - scored[case]["exact"]).abs().mean()
    for rank in ranks:
        error = (rank[case]["fp8"] - scored[case]["exact"]).abs().mean()
        assert 0 < error <= 2 * effect
