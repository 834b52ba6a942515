"""What a config.json may leave out means what it means to transformers."""

from __future__ import annotations

import importlib
from typing import Any

import patches

patches.apply()

import pytest  # noqa: E402
import transformers  # noqa: E402

from remit_megatron.models.family import families, family_of  # noqa: E402
from tests.families import FIRST_CASES, hf_values  # noqa: E402
from tests.fuzz.parity import compare  # noqa: E402


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A file of before transformers 5 without these fields."""
    rope = values.get("rope_parameters") or {}
    flat = {"rope_theta": rope.get("rope_theta", 10000.0)} | values | {"dtype": "float32", "pad_token_id": None}
    return {name: value for name, value in flat.items() if name not in (*names, "rope_parameters", "rope_scaling")}


@pytest.mark.parametrize("name", families())
def test_defaults_are_those_of_the_class(name):
    family = families()[name]
    theirs = transformers.AutoConfig.for_model(family.model_types[0])
    defaults: dict[str, Any] = importlib.import_module(f"remit_megatron.models.{name}")._DEFAULTS
    for field, value in defaults.items():
        found = theirs.rope_parameters["rope_theta"] if field == "rope_theta" else getattr(theirs, field)
        assert value == found, field
    assert {"rope_theta", "rms_norm_eps", "max_position_embeddings"} <= defaults.keys()


@pytest.mark.parametrize("case", FIRST_CASES)
@pytest.mark.parametrize("rope", [{}, {"rope_parameters": {"rope_type": "default"}}], ids=["none", "no theta"])
def test_a_file_without_them_is_the_same_model(tmp_path, case, rope):
    values = without(hf_values(case), "rope_theta", "rms_norm_eps", "max_position_embeddings")
    outcome = compare(tmp_path / "m", values | rope, seed=1)
    assert (outcome.kind, outcome.transformers) == ("equal", None), outcome


def test_two_names_of_one_function(tmp_path):
    values = without(hf_values(FIRST_CASES[0]))
    assert compare(tmp_path / "m", values | {"hidden_act": "swish"}, seed=1).kind == "equal"
    assert family_of(values).arguments(values | {"hidden_act": "swish"}) == family_of(values).arguments(values)
