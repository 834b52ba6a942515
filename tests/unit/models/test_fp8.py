"""FP8 settings of student and reference, what is refused, loading into FP8 parameters. Without Transformer Engine."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import patches

patches.apply()

from remit_megatron.models import fp8  # noqa: E402
from remit_megatron.models.build import default_arguments, megatron_arguments, model_config  # noqa: E402
from remit_megatron.run.configuration import load_config, load_model_description  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
TINY = load_model_description({"base": "tiny_llama", "vocab_size": 301})
MODEL = megatron_arguments(load_model_description("llama3_1b"))
# A student with every setting of low precision away from its default.
STUDENT: dict[str, Any] = {
    "fp8": "hybrid",
    "fp8_recipe": "mxfp8",
    "fp8_param_gather": True,
    "fp8_margin": 1,
    "fp8_interval": 2,
    "fp8_amax_history_len": 16,
    "fp8_amax_compute_algo": "max",
    "fp8_wgrad": False,
    "fp8_output_proj": True,
    "fp8_quantizer_factory": "a.b",
    "first_last_layers_bf16": True,
    "num_layers_at_start_in_bf16": 2,
    "num_layers_at_end_in_bf16": 2,
    "fp4_quantizer_factory": "a.b",
}
# Arguments that speak of low precision and change nothing in a model that only runs forward: optimizer, gradients,
# checkpoints, and parts of mixture-of-experts and inference models, which there are none of here.
ELSEWHERE = {
    "grad_reduce_in_bf16",
    "keep_fp8_transpose_cache",
    "reuse_grad_buf_for_mxfp8_param_ag",
    "moe_router_padding_for_fp8",
    "use_kitchen_attention",
    "kitchen_attention_backend",
}


@pytest.fixture
def runs_here(monkeypatch) -> None:
    """As on a machine that runs every recipe."""
    monkeypatch.setattr(fp8, "missing", lambda recipe: None)


def student(**changes: Any) -> argparse.Namespace:
    return default_arguments(**(STUDENT | changes))


def test_nothing_of_the_students_precision_reaches_the_reference():
    args = student()
    before = dict(vars(args))
    found = model_config(TINY, fp8.frozen_arguments(args)).transformer
    expected = model_config(TINY, default_arguments()).transformer
    for field in dataclasses.fields(expected):
        if field.name not in ("init_method", "output_layer_init_method", "embedding_init_method"):
            assert getattr(found, field.name) == getattr(expected, field.name), field.name
    assert vars(args) == before
    assert model_config(TINY, args).transformer.fp8 == "hybrid", "the student keeps its own"


def test_every_precision_argument_of_megatron_is_known():
    words = ("fp8", "fp4", "layers_bf16", "in_bf16", "precision_config", "kitchen")
    found = {name for name in vars(default_arguments()) if any(word in name for word in words)}
    assert found - ELSEWHERE == set(fp8._OFF)


def test_an_fp8_reference_has_its_own_settings():
    args = student(use_cpu_initialization=True)
    config = model_config(TINY, fp8.frozen_arguments(args, fp8="e4m3", recipe="blockwise")).transformer
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("e4m3", "blockwise", True)
    assert (config.first_last_layers_bf16, config.num_layers_at_start_in_bf16) == (True, 1)
    assert (config.num_layers_at_end_in_bf16, config.fp8_margin, config.fp8_output_proj) == (1, 0, False)
    assert config.use_cpu_initialization is False and args.use_cpu_initialization is True
    with pytest.raises(ValueError, match="recipe: found 'delayed'; expected one of tensorwise, blockwise, mxfp8"):
        fp8.frozen_arguments(args, fp8="e4m3", recipe="delayed")


def values(**changes: Any) -> dict[str, Any]:
    layout = {"fp8": "hybrid", "seq_length": 4096, "micro_batch_size": 1}
    return vars(default_arguments()) | MODEL | layout | changes


@pytest.mark.parametrize("recipe", fp8.RECIPES)
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 8, "sequence_parallel": True}])
def test_real_models_fit_every_recipe(runs_here, recipe, layout):
    for name in ("llama3_1b", "olmo2_1b", "smollm3_3b", "youtu_2b"):
        model = megatron_arguments(load_model_description(name))
        fp8.check_run(values(fp8_recipe=recipe, **layout) | model)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "weights in FP8 alone": (
        {"fp8": None, "fp8_param_gather": True},
        "megatron.fp8_param_gather: found true without megatron.fp8; expected false, or fp8: e4m3 or hybrid",
    ),
    "ends in bf16": (
        {"first_last_layers_bf16": True},
        "megatron.first_last_layers_bf16: found true with fp8_recipe delayed; expected false, or fp8_recipe "
        "tensorwise, blockwise or mxfp8",
    ),
    "tokens": (
        {"seq_length": 1000},
        "megatron.seq_length: found 1000 x micro_batch_size 1 = 1000 tokens a rank; expected a multiple of 16 with "
        "megatron.fp8 (delayed)",
    ),
    "tokens over ranks": (
        {
            "seq_length": 128,
            "tensor_model_parallel_size": 4,
            "sequence_parallel": True,
            "context_parallel_size": 2,
            "fp8_recipe": "mxfp8",
        },
        "megatron.seq_length: found 128 over 8 ranks x micro_batch_size 1 = 16 tokens a rank; expected a multiple of "
        "32 with megatron.fp8 (mxfp8)",
    ),
    "tokens of an evaluation": (
        {"seq_length": 24, "micro_batch_size": 2, "eval_micro_batch_size": 1, "fp8_recipe": "tensorwise"},
        "megatron.seq_length: found 24 x eval_micro_batch_size 1 = 24 tokens a rank; expected a multiple of 16 with "
        "megatron.fp8 (tensorwise)",
    ),
    "feed-forward": (
        {"ffn_hidden_size": 8200, "tensor_model_parallel_size": 4},
        "megatron.fp8: found delayed with ffn_hidden_size 8200 over 4 tensor-parallel ranks; expected multiples of 16 "
        "on every rank, or null",
    ),
    "heads": (
        {"kv_channels": 12, "num_attention_heads": 4, "num_query_groups": 2},
        "megatron.fp8: found delayed with columns of queries, keys and values 96 over 4 tensor-parallel ranks",
    ),
    "hidden size": ({"hidden_size": 2056}, "megatron.fp8: found delayed with hidden_size 2056; expected multiples"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_fp8_cannot_take_is_one_line(runs_here, name):
    changes, expected = WRONG[name]
    if name == "heads":
        changes = changes | {"tensor_model_parallel_size": 4}
    with pytest.raises(UserError) as caught:
        fp8.check_run(values(**changes))
    assert str(caught.value).startswith(expected)


def test_latent_attention_has_its_own_sizes(runs_here):
    latent = {
        "multi_latent_attention": True,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_head_dim": 128,
        "qk_pos_emb_head_dim": 64,
        "v_head_dim": 128,
    }
    fp8.check_run(values(**latent))
    fp8.check_run(values(**(latent | {"q_lora_rank": None})))
    for name, size in {"q_lora_rank": 1544, "kv_lora_rank": 520}.items():
        with pytest.raises(UserError, match=f"with {name} {size}; expected multiples of 16"):
            fp8.check_run(values(tensor_model_parallel_size=8, **(latent | {name: size})))


def test_the_answer_about_this_machine_is_transformer_engines(monkeypatch):
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine
    from packaging.version import Version

    class State:
        is_fp8_available = staticmethod(lambda: (True, ""))
        is_mxfp8_available = staticmethod(lambda: (False, "Device compute capability 10.0 or higher required."))
        is_fp8_block_scaling_available = staticmethod(lambda: (True, ""))

    assert set(fp8.support().values()) == {"it needs Transformer Engine and a GPU"}, "there is none here"
    monkeypatch.setattr(fp8, "transformer_engine_usable", lambda: True)
    monkeypatch.setattr(transformer_engine, "FP8GlobalStateManager", State, raising=False)
    monkeypatch.setattr(utils, "get_te_version", lambda: Version("2.2.0"))
    assert fp8.support() == {
        "delayed": None,
        "tensorwise": None,
        "mxfp8": "Device compute capability 10.0 or higher required",
        "blockwise": "it needs Transformer Engine 2.3.0, and 2.2.0 is installed",
    }
    with pytest.raises(UserError) as caught:
        fp8.check_run(values(fp8_recipe="mxfp8"))
    assert str(caught.value) == (
        "megatron.fp8: found hybrid with fp8_recipe mxfp8; expected null: Device compute capability 10.0 or higher "
        "required"
    )


def test_an_fp8_reference_that_cannot_run_is_refused(monkeypatch):
    args = argparse.Namespace(**values(transformer_impl="transformer_engine", tensor_model_parallel_size=2))
    with pytest.raises(UserError) as caught:
        fp8.check_frozen("e4m3", "tensorwise", MODEL, args)
    assert str(caught.value) == (
        "reference.fp8: found e4m3 with fp8_recipe tensorwise; expected null: it needs Transformer Engine and a GPU"
    )
    monkeypatch.setattr(fp8, "missing", lambda recipe: None)
    fp8.check_frozen("e4m3", "tensorwise", MODEL, args)
    with pytest.raises(UserError, match=r"reference\.fp8: found e4m3 for a model of 2 layers"):
        fp8.check_frozen("e4m3", "tensorwise", MODEL | {"num_layers": 2}, args)
    with pytest.raises(UserError, match=r"reference\.fp8: found mxfp8 with hidden_size 2064; expected multiples of 32"):
        fp8.check_frozen("e4m3", "mxfp8", MODEL | {"hidden_size": 2064}, args)
    args.transformer_impl = "local"
    with pytest.raises(UserError, match=r"expected null with megatron\.transformer_impl local"):
        fp8.check_frozen("e4m3", "tensorwise", MODEL, args)


REFUSED = {
    "reference.fp8=e5m2": "reference.fp8: found 'e5m2'; expected one of e4m3, hybrid",
    "reference.fp8_recipe=delayed": (
        "reference.fp8_recipe: found 'delayed'; expected one of tensorwise, blockwise, mxfp8"
    ),
    "reference.fp8_gate_batches=0": "reference.fp8_gate_batches: found 0; expected 1 or more",
    "reference.fp8_tolerance=-0.1": "reference.fp8_tolerance: found -0.1; expected a number from 0 to 2",
}


@pytest.mark.parametrize("override", REFUSED)
def test_configuration_says_what_it_takes(override):
    example = ROOT / "configs/runs/example_remit.yaml"
    assert load_config(example, ["reference.fp8=hybrid"]).reference.fp8 == "hybrid"  # type: ignore[union-attr]
    with pytest.raises(UserError) as caught:
        load_config(example, [override])
    assert str(caught.value).startswith(REFUSED[override])


def test_the_fp8_head_is_refused_where_the_loss_takes_its_weight():
    from remit_megatron.objectives import build_objective
    from remit_megatron.run.checks import check_linear_loss

    config = load_config(ROOT / "configs/runs/example_remit.yaml", ["loss.linear=true"])
    check_linear_loss(config, default_arguments(), build_objective("remit"))
    with pytest.raises(UserError, match=r"megatron\.fp8_output_proj: found true; expected false with loss\.linear"):
        check_linear_loss(config, student(), build_objective("remit"))


def test_weights_are_loaded_into_fp8_parameters(tmp_path):
    """Also into what an optimizer makes its master weights from."""
    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models import build
    from tests.float8 import Float8Weight, quantize_weights
    from tests.tiny import make_llama

    source = resolve(make_llama(tmp_path / "hf", seed=1), field="model")
    with process_groups(alone=True) as groups:
        args = default_arguments()
        (expected,) = build.build_chunks(model_config(source.hf_config, args), groups)
        config = model_config(source.hf_config, fp8.frozen_arguments(args, fp8="e4m3"))
        (model,) = build.build_chunks(config, groups)
        names = quantize_weights(model, trained=True)
        assert len(names) == 4 * 2, "four linear weights in each layer but the first and the last"
        load_weights([expected], source)
        load_weights([model], source)
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in names:
            assert torch.equal(parameter, wanted[name]), name
            continue
        assert isinstance(parameter, Float8Weight) and parameter.copies == 1, "one copy, so one scale for all of it"
        assert torch.equal(parameter.dequantize(), Float8Weight(wanted[name].detach()).dequantize()), name
        error = (parameter.dequantize() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert 0 < error < 0.04
        assert torch.equal(parameter.get_high_precision_init_val(), wanted[name]), name
