"""Random config.json files of the four families: what transformers reads, what it ignores, and what it computes
otherwise.

A file is drawn from its number alone. It is written as somebody might have: any of the spellings of rope, fields left
out where they have a default, fields that belong to other programs; and every second one has something unusual.
"""

from __future__ import annotations

import random
from typing import Any

FAMILIES = ("llama", "olmo2", "smollm3", "youtu")

_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# What config.json files hold that no model of these families computes with, and what changes nothing while it is off.
_IGNORED: dict[str, tuple[Any, ...]] = {
    "use_cache": (True, False),
    "pretraining_tp": (1, 2),
    "attention_dropout": (0.0, 0.1, 0),
    "initializer_range": (0.02, 0.3),
    "bos_token_id": (None, 1, 50_000),
    "eos_token_id": (None, 0, [0, 1], [2]),
    "dtype": ("float32", "bfloat16", "float16"),
    "torch_dtype": ("float32", "bfloat16"),
    "architectures": (["LlamaForCausalLM"], ["AnythingElse"], None),
    "transformers_version": ("4.38.1", "5.0.0"),
    "_name_or_path": ("somewhere/else",),
    "num_labels": (3,),
    "id2label": ({"0": "a", "1": "b"},),
    "problem_type": ("regression",),
    "output_hidden_states": (True,),
    "output_attentions": (False,),
    "return_dict": (True,),
    "chunk_size_feed_forward": (0, 4),
    "is_decoder": (True,),
    "is_causal": (True,),
    "is_llama_config": (True,),
    "quantization_config": (None,),
    "rope_interleaved": (False, True),
    "temperature": (0.6,),
    "max_length": (20,),
    "clip_qkv": (8.0,),
    "attention_multiplier": (0.1,),
    "embedding_multiplier": (12.0,),
    "residual_multiplier": (0.2,),
    "logits_scaling": (8.0,),
    "final_logit_softcapping": (30.0,),
    "attn_logit_softcapping": (50.0,),
    "query_pre_attn_scalar": (224,),
    "logit_scale": (0.5,),
    "scale_emb": (12,),
    "qk_layernorm": (True,),
    "use_qk_norm": (True,),
    "norm_topk_prob": (True,),
    "num_experts": (4,),
    "n_routed_experts": (8,),
    "num_local_experts": (8,),
    "first_k_dense_replace": (1,),
    "layer_norm_eps": (0.1,),
    "norm_eps": (0.1,),
    "norm_type": ("layernorm",),
    "hidden_activation": ("gelu",),
    "activation_function": ("gelu",),
    "lm_head_bias": (True,),
    "use_bias": (True,),
    "bias": (True,),
    "qkv_bias": (True,),
    "add_bias_linear": (True,),
    "parallel_residual": (True,),
    "alibi": (True,),
    "max_window_layers": (1,),
    "attention_chunk_size": (8,),
    "auto_map": ({"AutoModelForCausalLM": "modeling.Other"},),
    "remit": ({"anything": [1, 2, 3]},),
    "n_layer": (9,),
    "n_embd": (9,),
    "layers": (9,),
}

# What changes what a model computes, or might: each family's file gets at most one of these.
_UNUSUAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True, None, 0, "false"),
    "mlp_bias": (True, None),
    "hidden_act": ("gelu", "relu", "swish", "gelu_pytorch_tanh", None, "nothing", ["silu"]),
    "tie_word_embeddings": (None, "true", 1),
    "head_dim": (4, 6, 8, 9, 16, 0, None, "12", 12.0, -4),
    "hidden_size": (0, 30, 33, "48", 48.0, None, True, -48),
    "intermediate_size": (0, 1, "80", 80.0, None, [80, 80]),
    "num_attention_heads": (0, 3, 5, "4", 4.0, None, True),
    "num_key_value_heads": (0, 3, 8, None, "2", 2.0, True, -2),
    "num_hidden_layers": (0, 1, "2", 2.0, None, True),
    "vocab_size": (0, "131", 131.0, None, 130, True),
    "max_position_embeddings": (0, 1, 8, "256", None, 256.0),
    "rms_norm_eps": (0, 0.0, 1e-3, 1e-12, 1, "1e-05", None, -1e-5, True, float("nan")),
    "partial_rotary_factor": (0.5, 0.25, 1.0, 1, 0, None, "0.5"),
    "rope_theta": (0, -1.0, "10000", None, True, float("inf"), 1, 0.5, [1e4]),
    "rope_scaling": (
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 1.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        {"type": "mrope", "mrope_section": [1, 2]},
        {"rope_type": "default", "factor": 3.0},
        {"rope_type": "default", "rope_theta": 77.0},
        {"rope_type": None},
        {"type": "default"},
        {"rope_type": "default", "type": "linear", "factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "default", "mscale_all_dim": 1.0, "factor": 4.0},
        {**_LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
        {**_LLAMA3, "factor": 8.0, "original_max_position_embeddings": 16},
        {**_LLAMA3, "factor": 8.0},
        {**_LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 2.0},
        {**_LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 2.0},
        {**_LLAMA3, "factor": 0.5, "original_max_position_embeddings": 8192},
        {**_LLAMA3, "factor": "8", "original_max_position_embeddings": 8192},
        {**_LLAMA3, "factor": True, "original_max_position_embeddings": 8192},
        {},
        "linear",
        ["linear", 2.0],
        8.0,
    ),
    "rope_parameters": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64},
        {"rope_type": "default", "rope_theta": 1e4, "factor": 3.0},
        {"rope_type": "default"},
        {"rope_theta": 500.0},
        {"type": "default", "rope_theta": 500.0},
        {"rope_type": "default", "rope_theta": None},
        {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_type": "axial", "rope_theta": 1e4},
        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        {},
        "default",
    ),
    "pad_token_id": (None, 3, 50, -1),
    "original_max_position_embeddings": (16, 8192, None),
    "layer_types": (
        "full",
        "sliding",
        "mixed",
        ["full_attention"],
        "sliding_attention",
        {},
    ),
    "sliding_window": (4, 0, None, "4"),
    "use_sliding_window": (True, False, None, 1),
    "no_rope_layers": ("ones", "zeros", "short", "long", [], [2, 2, 2, 2], "booleans", None, 4),
    "no_rope_layer_interval": (1, 2, 3, 0, -1, None, 99, "4", 2.0, True),
    "is_causal": (False, None, 0),
    "use_bidirectional_attention": (True,),
    "per_layer_config": (
        {"0": {"rms_norm_eps": 0.5}},
        {"1": {"rope_theta": 7.0}},
        {"0": {"hidden_act": "gelu"}},
        {"0": {"intermediate_size": 12}},
        {"0": {"attention_dropout": 0.1}},
        {},
        None,
    ),
    "attn_implementation": ("eager", "sdpa"),
    "_attn_implementation": ("eager",),
    "output_attentions": (True,),
    "return_dict": (False,),
    "quantization_config": ({}, {"quant_method": "fp8"}, {"load_in_4bit": True}, "fp8"),
    "model_type": ("mistral", "Llama", None, 7),
    "text_config": ({"hidden_size": 8},),
    "is_encoder_decoder": (True,),
    "q_lora_rank": (None, 0, 12, "26", 26.0),
    "kv_lora_rank": (0, None, 12, "18"),
    "qk_rope_head_dim": (5, 0, 8, None, "6"),
    "qk_nope_head_dim": (0, 7, None, "10"),
    "v_head_dim": (0, 9, None, "12"),
    "qk_head_dim": (8, None),
    "rope_interleave": (False, None, True, 1),
    "embedding_initializer_range": (0.5, None),
}


def architecture(number: int) -> tuple[dict[str, Any], str | None]:
    """The content of a config.json, and the name of the unusual field in it (None for an ordinary file)."""
    draw = random.Random(number)
    family = FAMILIES[number % len(FAMILIES)]
    config = (_latent if family == "youtu" else _decoder)(draw, family)
    config |= _rope(draw, family) | {"pad_token_id": None}  # some classes have a default beyond a tiny vocabulary
    config["tie_word_embeddings"] = draw.random() < 0.5
    if draw.random() < 0.2:
        del config["tie_word_embeddings"]
    for name in draw.sample(sorted(_IGNORED), draw.randint(0, 12)):
        config[name] = draw.choice(_IGNORED[name])
    if family == "smollm3" and draw.random() < 0.7:
        config |= _no_rope(draw, config["num_hidden_layers"])
    unusual = None
    if draw.random() < 0.5:
        unusual = draw.choice(sorted(_UNUSUAL))
        if unusual in ("rope_scaling", "original_max_position_embeddings"):  # beside rope_parameters it is refused
            theta = draw.choice((10000.0, 500000.0))
            config = {name: value for name, value in config.items() if name != "rope_parameters"} | {
                "rope_theta": theta
            }
        elif unusual == "rope_parameters" and draw.random() < 0.5:
            config.pop("rope_theta", None)
        config[unusual] = _spelled(draw.choice(_UNUSUAL[unusual]), unusual, config["num_hidden_layers"])
        if unusual == "original_max_position_embeddings" and family == "llama":
            config["rope_scaling"] = {**_LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}
    return config, unusual


def _decoder(draw: random.Random, family: str) -> dict[str, Any]:
    heads, head_dim = draw.choice((1, 2, 3, 4, 6)), draw.choice((4, 8, 10, 12))
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw.choice((131, 97, 200)),
        "hidden_size": heads * head_dim,
        "intermediate_size": draw.choice((24, 41, 80)),
        "num_hidden_layers": draw.choice((1, 2, 3, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([groups for groups in range(1, heads + 1) if heads % groups == 0]),
        "max_position_embeddings": draw.choice((64, 256, 16384)),
        "rms_norm_eps": draw.choice((1e-5, 1e-6, 1e-2, 0.0009765625)),
    }
    if draw.random() < 0.7:
        config["hidden_act"] = "silu"
    if draw.random() < 0.7:
        config["attention_bias"] = False
    if draw.random() < 0.3:
        config["mlp_bias"] = False
    if draw.random() < 0.5:
        config["head_dim"] = draw.choice((head_dim, head_dim, 2 * head_dim, 6, None if family == "llama" else 14))
    if family != "smollm3" and draw.random() < 0.3:  # whose class has a default of its own, 4
        del config["num_key_value_heads"]
    return config


def _latent(draw: random.Random, family: str) -> dict[str, Any]:
    heads = draw.choice((1, 2, 3, 4))
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw.choice((131, 97, 200)),
        "hidden_size": heads * draw.choice((12, 16)),
        "intermediate_size": draw.choice((24, 41, 80)),
        "num_hidden_layers": draw.choice((1, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": draw.choice((64, 256, 16384)),
        "rms_norm_eps": 1e-6,
        "q_lora_rank": draw.choice((26, 7, None)),
        "kv_lora_rank": draw.choice((18, 5)),
        "qk_rope_head_dim": draw.choice((2, 6, 8)),
        "qk_nope_head_dim": draw.choice((3, 10)),
        "v_head_dim": draw.choice((12, 5, 16)),
    }
    if draw.random() < 0.5:
        config["rope_interleave"] = True
    if draw.random() < 0.3:
        config["head_dim"] = config["qk_rope_head_dim"]
    return config


def _rope(draw: random.Random, family: str) -> dict[str, Any]:
    theta = draw.choice((10000.0, 10000, 500000.0, 12345.5, 100, 2000000.0))
    spellings: list[dict[str, Any]] = [
        {"rope_theta": theta},
        {"rope_theta": theta, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": theta}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_theta": 77.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": theta},
        {"rope_parameters": {"rope_theta": theta}, "rope_scaling": None},
    ]
    if family == "llama":
        stretched = {**_LLAMA3, "factor": draw.choice((2.0, 8.0, 32)), "original_max_position_embeddings": 8192}
        spellings += [
            {"rope_theta": theta, "rope_scaling": stretched},
            {"rope_parameters": stretched | {"rope_theta": theta}},
        ]
    return draw.choice(spellings)


def _no_rope(draw: random.Random, layers: int) -> dict[str, Any]:
    own = [draw.choice((0, 1)) for _ in range(layers)]
    choices: list[dict[str, Any]] = [
        {"no_rope_layers": own},
        {"no_rope_layers": own, "no_rope_layer_interval": 2},
        {"no_rope_layer_interval": draw.choice((1, 2, 3))},
        {"no_rope_layers": None, "layer_types": ["full_attention"] * layers},
        {"use_sliding_window": False, "sliding_window": 4},
    ]
    return draw.choice(choices)


def _spelled(value: Any, name: str, layers: Any) -> Any:
    """A list as long as the model has layers, where the table has a word for it."""
    count = layers if isinstance(layers, int) else 2
    lists = {
        "layer_types": {
            "full": ["full_attention"] * count,
            "sliding": ["sliding_attention"] * count,
            "mixed": ["full_attention", "sliding_attention"] * count,
        },
        "no_rope_layers": {
            "ones": [1] * count,
            "zeros": [0] * count,
            "short": [1] * (count - 1),
            "long": [0, 1] * count,
            "booleans": [False] * count,
        },
    }
    return lists.get(name, {}).get(value, value) if isinstance(value, str) else value
