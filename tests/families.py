"""Tiny models of every family: what the tests of parity, conversion and training run on.

A new family adds its entry here, and nowhere else, to be tested on every layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remit_megatron.models.family import families
from tests.tiny import make_model

VOCABULARY = 131
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 26,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "rms_norm_eps": 1e-6,
}

# What every model has: odd sizes, four layers (two pipeline stages of two virtual ones), large initial weights.
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "attention_bias": False,
}

# family -> case -> values of config.json beside BASE. Every family has a tied and an untied case.
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "gqa_6_2_tied": {
            "num_attention_heads": 6,
            "head_dim": 10,
            "tie_word_embeddings": True,
        },
        "gqa_4_2_untied": {
            "head_dim": 12,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 12345.5},
        },
        "mha_llama3": {
            "num_key_value_heads": 4,
            "rope_parameters": _LLAMA3,
            "tie_word_embeddings": False,
        },
        "one_group": {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True},
    },
    "olmo2": {
        "mha_untied": {
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        "gqa_6_2_tied": {"num_attention_heads": 6, "tie_word_embeddings": True},
    },
    "smollm3": {
        "gqa_4_2_tied": {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
        # No rotary embeddings on the last layer of the first pipeline stage and the first of the second.
        "own_list_untied": {"no_rope_layers": [1, 0, 0, 1], "tie_word_embeddings": False},
        "every_second": {"no_rope_layer_interval": 2, "num_key_value_heads": 4, "tie_word_embeddings": True},
    },
    # Heads of queries and keys have 16 channels here, and those of values fewer or more.
    "youtu": {
        "narrow_values_tied": _LATENT
        | {
            "v_head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1600000.0},
        },
        "six_heads_wide_values_untied": _LATENT
        | {
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "v_head_dim": 22,
            "tie_word_embeddings": False,
        },
        "whole_queries": _LATENT | {"v_head_dim": 10, "q_lora_rank": None, "tie_word_embeddings": True},
    },
}

CASES = [f"{family}-{case}" for family, cases in FAMILIES.items() for case in cases]
# One case of each family, for tests that are long.
FIRST_CASES = [f"{family}-{next(iter(cases))}" for family, cases in FAMILIES.items()]


def hf_values(case: str) -> dict[str, Any]:
    """Values of config.json of a case, given as ``family-case``."""
    family, name = case.split("-", 1)
    return BASE | {"model_type": families()[family].model_types[0]} | FAMILIES[family][name]


def make_case(directory: Path, case: str, *, seed: int = 1, tokenizer: Path | None = None, **changes: Any) -> Path:
    """A random model of a case as a Hugging Face directory; ``changes`` replace values of its config.json."""
    return make_model(directory, hf_values(case) | changes, seed=seed, tokenizer=tokenizer)
