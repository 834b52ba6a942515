"""Youtu: config.json to Megatron arguments, the names of its weights, what is refused, and the true sizes."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

import patches

patches.apply()

from remit_megatron.conversion.processes import process_groups  # noqa: E402
from remit_megatron.models.build import build_chunks, megatron_arguments, model_config  # noqa: E402
from remit_megatron.models.family import family_of  # noqa: E402
from remit_megatron.models.mapping import WHOLE, Direct, TensorRank, place_of  # noqa: E402
from remit_megatron.run.configuration import DataConfig, RunConfig, load_model_description  # noqa: E402
from remit_megatron.run.derived import count_parameters, parameters_on_rank  # noqa: E402
from remit_megatron.run.megatron_args import build_arguments  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.families import FAMILIES, hf_values  # noqa: E402

PARAMETERS = 1_961_560_064
CASES = [f"youtu-{case}" for case in FAMILIES["youtu"]]


def youtu_2b(**changes: Any) -> dict[str, Any]:
    return load_model_description("youtu_2b") | changes


def run_arguments(model: Any, world_size: int = 1, **megatron: Any) -> argparse.Namespace:
    chosen = {"seq_length": 64, "train_iters": 10, "lr": 1e-3} | megatron
    config = RunConfig(
        model=model, data=DataConfig(train=[[1.0, "data/a"]], tokenizer="tok"), run_dir="runs/x", megatron=chosen
    )
    architecture = megatron_arguments(load_model_description(config.model))
    return build_arguments(config, architecture, world_size=world_size, rank=0, gpu=False)


def test_arguments():
    found = megatron_arguments(youtu_2b())
    expected = {
        "num_layers": 32,
        "hidden_size": 2048,
        "ffn_hidden_size": 6144,
        "num_attention_heads": 16,
        "group_query_attention": False,
        "multi_latent_attention": True,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_head_dim": 128,
        "qk_pos_emb_head_dim": 64,
        "v_head_dim": 128,
        "qk_layernorm": True,
        "rope_type": "rope",
        "rotary_base": 1_600_000,
        "rotary_scaling_factor": 1.0,
        "rotary_interleaved": False,
        "apply_rope_fusion": False,
        "untie_embeddings_and_output_weights": False,
        "layernorm_epsilon": 1e-6,
        "vocab_size": 128256,
    }
    assert {name: found[name] for name in expected} == expected


def test_what_a_file_may_leave_out():
    config = youtu_2b()
    for name in ("tie_word_embeddings", "initializer_range", "num_key_value_heads", "rope_interleave", "mlp_bias"):
        del config[name]
    found = megatron_arguments(config)
    assert found == megatron_arguments(youtu_2b()), "the authors' own deviation of random weights among them"
    assert family_of(config).names(config).head is None


def test_the_config_that_transformers_writes(tmp_path):
    """Its class adds head_dim, qk_head_dim and rope_parameters."""
    import transformers

    from remit_megatron.conversion.source import read_config

    values = {name: value for name, value in youtu_2b().items() if name != "model_type"}
    transformers.YoutuConfig(**values).save_pretrained(tmp_path)
    written = read_config(tmp_path)
    assert "rope_theta" not in written
    assert megatron_arguments(written) == megatron_arguments(youtu_2b())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"rope_interleave": None}, "rope_interleave"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"head_dim": 128}, "head_dim"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"v_head_dim": None}, "v_head_dim"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type"),
    ],
)
def test_refusals_name_the_field(changes, field):
    with pytest.raises(UserError) as caught:
        megatron_arguments(youtu_2b(**changes))
    assert field in caught.value.field


def test_a_file_must_say_whether_queries_are_compressed():
    config = youtu_2b()
    del config["q_lora_rank"]
    with pytest.raises(UserError, match=r"q_lora_rank: found nothing; expected a number, or null"):
        megatron_arguments(config)
    config["q_lora_rank"] = None
    assert megatron_arguments(config)["q_lora_rank"] is None
    names = {name for weight in family_of(config).names(config).layer for name in weight.hf}
    assert "self_attn.q_proj.weight" in names and not any("q_a" in name or "q_b" in name for name in names)


def test_names_in_an_export():
    family = family_of(youtu_2b())
    plain = youtu_2b()
    assert family.exported(plain) is plain
    published = youtu_2b(model_type="youtu_llm", auto_map={"AutoConfig": "x.Y"}, architectures=["YoutuLLM"])
    assert family.exported(published) == plain
    assert family_of(published) is family and megatron_arguments(published) == megatron_arguments(plain)


def test_true_sizes():
    import transformers

    values = {name: value for name, value in youtu_2b().items() if name != "model_type"}
    with torch.device("meta"):
        model = transformers.YoutuForCausalLM(transformers.YoutuConfig(**values))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    args = run_arguments("youtu_2b")
    assert count_parameters(args) == PARAMETERS
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = family_of(youtu_2b()).names(youtu_2b())
    held = {name for layer, weight in names.weights(32) for name in names.hf_names(layer, weight)}
    assert held == shapes.keys()


def test_floating_point_operations():
    """Megatron's count, which mfu is computed from: six per weight and token, and causal scores and values."""
    from megatron.training.training import num_floating_point_operations

    length, heads = 8192, 16
    args = run_arguments("youtu_2b", seq_length=length)
    norms = 32 * 2 * 2048 + 2048  # the count takes the norms of the latents in, and no others
    attention = 32 * 6 * heads * (192 + 128) * length / 2
    expected = 6 * (PARAMETERS - norms) + attention
    assert num_floating_point_operations(args, 1) / length == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_parameters_on_a_rank_equal_those_of_the_model_that_is_built(case):
    values = hf_values(case)
    args = run_arguments(values)
    with process_groups(alone=True) as groups:
        (model,) = build_chunks(model_config(load_model_description(values), args), groups)
        built = sum(parameter.numel() for parameter in model.parameters())
    assert parameters_on_rank(args, 0) == count_parameters(args) == built


@pytest.mark.parametrize(
    ("case", "tp", "found"),
    [("youtu-narrow_values_tied", 3, "q_lora_rank, 26"), ("youtu-whole_queries", 5, "qk_pos_emb_head_dim, 24")],
)
def test_tensor_parallelism_must_divide_the_latents(case, tp, found):
    model = hf_values(case) | {"num_attention_heads": 15, "num_key_value_heads": 15, "intermediate_size": 240}
    with pytest.raises(UserError) as caught:
        run_arguments(model, tp, tensor_model_parallel_size=tp)
    assert found in str(caught.value) and caught.value.field == "megatron.tensor_model_parallel_size"


@pytest.mark.parametrize("key", ["mla_down_proj_fusion", "cache_mla_latents"])
def test_what_the_layers_do_not_honor_is_refused(key):
    with pytest.raises(UserError) as caught:
        run_arguments("youtu_2b", **{key: True})
    assert caught.value.field == f"megatron.{key}"


def test_transformer_engine_keeps_down_projections_whole():
    place, shape = TensorRank(1, 2), (26, 48)
    names = family_of(youtu_2b()).names(youtu_2b())
    whole = {weight.local for weight in names.layer if place_of(weight, place, "transformer_engine") is WHOLE}
    assert whole == {f"self_attention.linear_{kind}_down_proj.weight" for kind in ("q", "kv")}
    weight = next(weight for weight in names.layer if isinstance(weight, Direct) and weight.te_whole)
    assert place_of(weight, place, "local") is place
    assert weight.full_shape((13, 48), place_of(weight, place, "local").size) == shape
    assert weight.full_shape(shape, place_of(weight, place, "transformer_engine").size) == shape
