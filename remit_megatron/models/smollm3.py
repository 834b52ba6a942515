"""SmolLM3: Llama's layers, with rotary embeddings left out of some of them (every fourth, in the released models).

The list ``no_rope_layers`` of config.json says 1 where a layer *has* rotary embeddings; Megatron's ``no_rope_freq``
says 1 where a layer has none.
"""

from __future__ import annotations

from typing import Any

from remit_megatron.models.family import Family, require, required, whole
from remit_megatron.models.llama import PRE_NORM_FLAGS, decoder_arguments, decoder_names, layer_spec, plain_rope
from remit_megatron.models.mapping import NameMap
from remit_megatron.runtime.errors import UserError

# Of transformers' class, where a file says nothing; transformers 4 did not write that embeddings are tied.
_DEFAULTS = {
    "tie_word_embeddings": True,
    "rope_theta": 2000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
_DEFAULT_INTERVAL = 4  # of layers without rope, where config.json says neither which they are nor how many


def _layers_without_rope(hf_config: dict[str, Any]) -> list[int] | None:
    """Megatron's pattern, 1 where a layer has no rotary embeddings; None where all have them."""
    layers = whole(hf_config, "num_hidden_layers")
    with_rope = hf_config.get("no_rope_layers")
    if with_rope is None:
        interval = hf_config.get("no_rope_layer_interval", _DEFAULT_INTERVAL)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise UserError("config.json no_rope_layer_interval", interval, "a whole number, at least 1")
        with_rope = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(with_rope, list) or len(with_rope) < layers or any(each not in (0, 1) for each in with_rope):
        raise UserError("config.json no_rope_layers", with_rope, f"a list of 0 and 1, for each of the {layers} layers")
    pattern = [1 - int(rotated) for rotated in with_rope[:layers]]
    return pattern if any(pattern) else None


def arguments(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a SmolLM3 ``config.json``; see :class:`remit_megatron.models.family.Family`."""
    hf_config = _DEFAULTS | hf_config
    required(hf_config, "num_key_value_heads")  # absent means 4 here, and as many as heads in other families
    if hf_config.get("sliding_window") is not None:
        require(hf_config, "use_sliding_window", (False,))
    kinds = hf_config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * whole(hf_config, "num_hidden_layers"):
        raise UserError("config.json layer_types", kinds, "full_attention for every layer")
    values = decoder_arguments(hf_config)
    return values | plain_rope(hf_config) | {"no_rope_freq": _layers_without_rope(hf_config)}


def names(hf_config: dict[str, Any]) -> NameMap:
    """Table of weights: Llama's."""
    return decoder_names(_DEFAULTS | hf_config)


FAMILY = Family(
    name="smollm3",
    model_types=("smollm3",),
    arguments=arguments,
    layer_spec=layer_spec,
    names=names,
    layer_flags=PRE_NORM_FLAGS,
)
