"""Random configurations of the four families: our log-probabilities are those of transformers, or the file is refused
by the name of a field.

``REMIT_SWEEP=200`` tries as many as docs/field_cases.md counts; ``python -m tests.fuzz.test_parity_sweep 200`` prints
that count.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import patches

patches.apply()

from remit_megatron.models.family import families  # noqa: E402
from tests.fuzz.architectures import architecture  # noqa: E402
from tests.fuzz.parity import Outcome, compare, quiet  # noqa: E402

COUNT = int(os.environ.get("REMIT_SWEEP", "20"))
GOOD = {"equal", "refused", "unknown to transformers"}

# What the sweep found and what stands since then; beside it, what has to be refused.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "pad_token_id": None}
YOUTU = LLAMA | {
    "model_type": "youtu",
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 26,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
_LONG = {**_LLAMA3, "original_max_position_embeddings": 8192}

FOUND: dict[str, tuple[dict[str, Any], str | None]] = {
    # transformers reads the original length outside of rope's parameters first: off by up to 2.5 nats before.
    "length_outside": (
        LLAMA | {"rope_scaling": _LONG, "original_max_position_embeddings": 16},
        "original_max_position_embeddings",
    ),
    "length_outside_agrees": (
        LLAMA | {"rope_scaling": _LLAMA3 | {"factor": 4}, "original_max_position_embeddings": 8192},
        None,
    ),
    # The theta inside rope_scaling wins over the one beside it.
    "theta_inside": (LLAMA | {"rope_scaling": {"rope_type": "default", "rope_theta": 77.0}}, None),
    # transformers' Youtu zeroes this row of the embedding when it loads a model.
    "zeroed_row": (YOUTU | {"pad_token_id": 3}, None),
    "zeroed_row_from_the_end": (YOUTU | {"pad_token_id": -1}, None),
    "no_such_row": (YOUTU | {"pad_token_id": 97}, "pad_token_id"),
    "not_causal": (LLAMA | {"is_causal": False}, "is_causal"),
    "layers_that_differ": (LLAMA | {"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config"),
    "ignored": (LLAMA | {"attention_multiplier": 0.1, "logits_scaling": 8.0, "sliding_window": 4, "clip_qkv": 1}, None),
    "window_of_llama": (LLAMA | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}, None),
    "text_for_a_number": (LLAMA | {"num_hidden_layers": "2"}, "num_hidden_layers"),
    "no_heads": (LLAMA | {"num_key_value_heads": 0}, "num_key_value_heads"),
    "odd_heads": (LLAMA | {"head_dim": 3}, "head_dim"),
    "odd_heads_unsaid": (LLAMA | {"num_attention_heads": 16, "num_key_value_heads": 4}, "hidden_size"),
    "nothing_wide": (LLAMA | {"hidden_size": 0}, "hidden_size"),
    "rope_in_a_word": (LLAMA | {"rope_scaling": "linear"}, "rope_scaling"),
    "tied_in_a_word": (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    "epsilon_not_a_number": (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "epsilon_in_text": (LLAMA | {"rms_norm_eps": "1e-05"}, "rms_norm_eps"),
    "lists_in_a_list": (SMOLLM3 | {"no_rope_layers": [[1], [0]]}, "no_rope_layers"),
    "window": (SMOLLM3 | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}, "layer_types"),
    "too_few_kinds": (SMOLLM3 | {"layer_types": ["full_attention"]}, "layer_types"),
    "no_rank": (YOUTU | {"q_lora_rank": 0}, "q_lora_rank"),
    "odd_values": (YOUTU | {"v_head_dim": 9}, None),
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    quiet()


@pytest.mark.parametrize("number", range(COUNT))
def test_equals_transformers_or_is_refused_by_name(tmp_path, number):
    config, unusual = architecture(number)
    outcome = compare(tmp_path / "model", config, seed=number)
    assert outcome.kind in GOOD, f"{unusual}: {outcome}\n{config}"
    if unusual is None:
        assert outcome.kind == "equal", f"an ordinary file: {outcome}\n{config}"


@pytest.mark.parametrize("case", FOUND)
def test_found(tmp_path, case):
    config, refused = FOUND[case]
    outcome = compare(tmp_path / "model", config, seed=1)
    assert (outcome.kind, outcome.detail) == ("refused", refused) if refused else outcome.kind == "equal", outcome


def test_a_difference_is_noticed(tmp_path, monkeypatch):
    """The sweep can fail: with an epsilon that is a thousandth off."""
    family = families()["llama"]
    shifted = dataclasses.replace(family, arguments=lambda config: _with_other_epsilon(family.arguments(config)))
    monkeypatch.setattr("remit_megatron.models.build.family_of", lambda config: shifted)
    assert compare(tmp_path / "model", LLAMA | {"rms_norm_eps": 1e-2}, seed=1).kind == "differs"


def _with_other_epsilon(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"layernorm_epsilon": 1.001 * values["layernorm_epsilon"]}


def main(count: int) -> Counter[str]:
    """Counts what comes of the first ``count`` configurations."""
    quiet()
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            outcome: Outcome = compare(Path(folder) / str(number), architecture(number)[0], seed=number)
            found[outcome.kind] += 1
            if outcome.kind == "refused":
                found[f"refused: {outcome.detail}"] += 1
            elif outcome.kind not in GOOD:
                print(number, outcome)
    return found


if __name__ == "__main__":
    for what, times in sorted(main(int(sys.argv[1])).items()):
        print(f"{times:4d}  {what}")
