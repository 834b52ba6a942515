"""config.json to Megatron arguments: values, both spellings of rope, and what is refused by the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from remit_megatron.errors import UserError
from remit_megatron.models.family import families, family_of, rope_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "initializer_range": 0.041,
    "rope_theta": 100000,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def arguments(**changes: Any) -> dict[str, Any]:
    config = {**LLAMA, **changes}
    return family_of(config).arguments(config)


def test_smollm2():
    found = arguments()
    expected = {
        "num_layers": 30,
        "hidden_size": 576,
        "ffn_hidden_size": 1536,
        "num_attention_heads": 9,
        "group_query_attention": True,
        "num_query_groups": 3,
        "kv_channels": 64,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "rotary_base": 100000,
        "use_rope_scaling": False,
        "untie_embeddings_and_output_weights": False,
        "vocab_size": 49152,
        "init_method_std": 0.041,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    assert {name: found[name] for name in expected} == expected


def test_no_grouping_and_an_explicit_head_size():
    found = arguments(num_key_value_heads=None, head_dim=80)
    assert (found["group_query_attention"], found["num_query_groups"], found["kv_channels"]) == (False, 9, 80)


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_theta": 5e5}, 500000),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1.6e6}}, 1600000),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 12345.5}}, 12345.5),
        ({"rope_theta": 7, "rope_parameters": {"rope_type": "default"}}, 7),
    ],
)
def test_theta_is_the_checkpoints_own(fields, theta):
    found = arguments(**fields)["rotary_base"]
    # Megatron's option parses an int: a whole theta must be one.
    assert found == theta and type(found) is type(theta)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100000.0, **LLAMA3}},
    ],
)
def test_llama3_rope_in_all_spellings(fields):
    found = arguments(**fields)
    assert (found["use_rope_scaling"], found["rope_scaling_factor"], found["rotary_base"]) == (True, 8.0, 100000)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"hidden_size": 577}, "hidden_size"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5, **LLAMA3, "low_freq_factor": 2.0}},
            "low_freq_factor",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5, **LLAMA3, "factor": None}}, "factor"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e5,
                    **LLAMA3,
                    "original_max_position_embeddings": 4096,
                }
            },
            "original_max_position_embeddings",
        ),
        ({"rope_parameters": {"full": {"rope_theta": 1e5}, "window": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_refusals_name_the_field(changes, field):
    with pytest.raises(UserError) as caught:
        arguments(**changes)
    assert field in caught.value.field


def test_unknown_family_lists_the_known_ones():
    with pytest.raises(UserError, match="llama"):
        family_of({"model_type": "nothing_like_it"})


def test_model_types_are_claimed_once():
    claimed = [model_type for family in families().values() for model_type in family.model_types]
    assert len(claimed) == len(set(claimed)) > 0


def test_rope_of_keeps_unknown_parameters():
    rope = rope_of({"rope_parameters": {"rope_theta": 2, "rope_type": "other", "depth": 3}})
    assert (rope.theta, rope.kind, rope.parameters) == (2, "other", {"depth": 3})
