"""config.json to Megatron arguments: values, both spellings of rope, and what is refused by the field's name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from remit_megatron.models.family import families, family_of, rope_of
from remit_megatron.runtime.errors import UserError
from tests.families import FAMILIES, FIRST_CASES, hf_values

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
        ({"pad_token_id": 49152}, "pad_token_id"),  # rows end before it; transformers makes no model of it either
        ({"pad_token_id": -49153}, "pad_token_id"),
    ],
)
def test_refusals_name_the_field(changes, field):
    with pytest.raises(UserError) as caught:
        arguments(**changes)
    assert field in caught.value.field


OLMO2: dict[str, Any] = {
    "model_type": "olmo2",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "vocab_size": 100352,
    "rope_theta": 500000,
}
SMOLLM3: dict[str, Any] = OLMO2 | {
    "model_type": "smollm3",
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "rope_theta": 5000000.0,
}


def test_olmo2():
    found = family_of(OLMO2).arguments(OLMO2)
    expected = {
        "num_query_groups": 16,
        "group_query_attention": False,
        "kv_channels": 128,
        "rotary_base": 500000,
        "use_rope_scaling": False,
        "untie_embeddings_and_output_weights": True,
        "add_bias_linear": False,
    }
    assert {name: found[name] for name in expected} == expected
    # Megatron's own norms of queries and keys are per head; with them on it would sum gradients by name.
    assert not found.get("qk_layernorm", False)
    assert family_of(OLMO2).unlisted_parameters(OLMO2) == (2 * 2048, 0)
    assert family_of(OLMO2 | {"num_key_value_heads": 4}).unlisted_parameters(OLMO2 | {"num_key_value_heads": 4}) == (
        2048 + 4 * 128,
        0,
    )


@pytest.mark.parametrize(
    ("fields", "without"),
    [
        ({}, [0, 0, 0, 1, 0, 0, 0, 1]),
        ({"no_rope_layer_interval": 3}, [0, 0, 1, 0, 0, 1, 0, 0]),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, [0, 1] * 4),
        ({"no_rope_layer_interval": 1}, [1] * 8),
        ({"no_rope_layer_interval": 99}, None),
        # The list wins over the interval, and may be longer than the model.
        ({"no_rope_layers": [1, 1, 0, 1, 1, 1, 1, 0, 0, 0], "no_rope_layer_interval": 4}, [0, 0, 1, 0, 0, 0, 0, 1]),
        ({"no_rope_layers": [1] * 8}, None),
    ],
)
def test_smollm3_says_which_layers_have_rope_and_megatron_which_have_none(fields, without):
    config = SMOLLM3 | fields
    found = family_of(config).arguments(config)
    assert found["no_rope_freq"] == without
    assert (found["rotary_base"], found["num_query_groups"]) == (5000000, 4)


def test_smollm3_is_tied_unless_it_says_otherwise():
    for fields, tied in (({}, True), ({"tie_word_embeddings": True}, True), ({"tie_word_embeddings": False}, False)):
        config = SMOLLM3 | fields
        assert family_of(config).arguments(config)["untie_embeddings_and_output_weights"] == (not tied)
        assert (family_of(config).names(config).head is None) == tied


@pytest.mark.parametrize(
    ("config", "changes", "field"),
    [
        (OLMO2, {"attention_bias": True}, "attention_bias"),
        (OLMO2, {"hidden_act": "gelu"}, "hidden_act"),
        (OLMO2, {"rope_theta": None}, "rope_theta"),
        (OLMO2, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        (OLMO2, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (SMOLLM3, {"num_key_value_heads": None}, "num_key_value_heads"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        (SMOLLM3, {"no_rope_layers": [2] * 8}, "no_rope_layers"),
        (SMOLLM3, {"no_rope_layers": "every fourth"}, "no_rope_layers"),
        (SMOLLM3, {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        (SMOLLM3, {"no_rope_layer_interval": None}, "no_rope_layer_interval"),
        (SMOLLM3, {"use_sliding_window": True, "sliding_window": 512}, "use_sliding_window"),
        (SMOLLM3, {"layer_types": ["full_attention", "sliding_attention"] * 4}, "layer_types"),
        (SMOLLM3, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        (SMOLLM3, {"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_refusals_of_other_families_name_the_field(config, changes, field):
    changed = config | changes
    with pytest.raises(UserError) as caught:
        family_of(changed).arguments(changed)
    assert field in caught.value.field


@pytest.mark.parametrize("case", FIRST_CASES)
def test_two_spellings_of_rope_are_refused_unless_one_is_empty(case):
    """transformers would take rope_scaling and drop the other, its theta too."""
    config = hf_values(case)
    assert config["rope_parameters"]
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for changed in (config | {"rope_scaling": yarn}, config | {"rope_scaling": yarn, "rope_parameters": {}}):
        with pytest.raises(UserError, match=r"config.json rope_scaling: found .*yarn.* null beside rope_parameters"):
            family_of(changed).arguments(changed | {"rope_theta": 1e4})
    for empty in (None, {}, config["rope_parameters"]):  # programs that are read by old and new versions write both
        changed = config | {"rope_scaling": empty}
        assert family_of(changed).arguments(changed) == family_of(config).arguments(config)


def test_a_window_that_is_off_is_no_window():
    config = SMOLLM3 | {"use_sliding_window": False, "sliding_window": 512, "layer_types": ["full_attention"] * 8}
    assert family_of(config).arguments(config)["num_layers"] == 8


def test_every_family_is_tested():
    """Parity, conversion and training run over tests/families.py: a family without an entry would not be tested."""
    assert FAMILIES.keys() == families().keys()
    for family, cases in FAMILIES.items():
        values = [hf_values(f"{family}-{case}") for case in cases]
        assert {family_of(value).name for value in values} == {family}
        assert {value["tie_word_embeddings"] for value in values} == {True, False}, f"{family}: tied and untied"
        heads = [(value["num_attention_heads"], value["num_key_value_heads"]) for value in values]
        assert any(query % 4 or query != key for query, key in heads), f"{family}: not only even heads"


def test_an_entry_in_families_is_all_that_a_new_family_needs(monkeypatch):
    new = dataclasses.replace(families()["llama"], name="new", model_types=("new_type", "its_alias"))
    monkeypatch.setattr("tests.families.families", lambda: {"new": new})
    monkeypatch.setitem(FAMILIES, "new", {"tied": {"tie_word_embeddings": True}})
    assert hf_values("new-tied")["model_type"] == "new_type"


def test_the_first_model_type_is_that_of_transformers():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert all(family.model_types[0] in CONFIG_MAPPING for family in families().values())


def test_unknown_family_lists_the_known_ones():
    with pytest.raises(UserError, match="llama"):
        family_of({"model_type": "nothing_like_it"})


def test_model_types_are_claimed_once():
    claimed = [model_type for family in families().values() for model_type in family.model_types]
    assert len(claimed) == len(set(claimed)) > 0


def test_rope_of_keeps_unknown_parameters():
    rope = rope_of({"rope_parameters": {"rope_theta": 2, "rope_type": "other", "depth": 3}})
    assert (rope.theta, rope.kind, rope.parameters) == (2, "other", {"depth": 3})
