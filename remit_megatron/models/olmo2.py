"""OLMo 2: a decoder that normalizes what a branch adds to the residual stream, not what it reads.

x + norm(attention(x)), then x + norm(mlp(x)); there is no norm before either. Queries and keys go through an RMSNorm
over all heads together, before they are split into heads and rotated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from remit_megatron.models.family import Family
from remit_megatron.models.llama import (
    ATTENTION_OUTPUT,
    MLP,
    QUERY_KEY_VALUE,
    decoder_arguments,
    decoder_names,
    plain_rope,
)
from remit_megatron.models.mapping import Direct, NameMap

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

# Of transformers' class, where a file says nothing.
_DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}

LAYER = (
    QUERY_KEY_VALUE,
    Direct("self_attn.q_norm.weight", "self_attention.q_norm.weight", split="column"),
    Direct("self_attn.k_norm.weight", "self_attention.k_norm.weight", split="column"),
    ATTENTION_OUTPUT,
    Direct("post_attention_layernorm.weight", "self_attention.post_norm.weight"),
    *MLP,
    Direct("post_feedforward_layernorm.weight", "mlp.post_norm.weight"),
)


def arguments(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Megatron arguments of an OLMo 2 ``config.json``; see :class:`remit_megatron.models.family.Family`."""
    hf_config = _DEFAULTS | hf_config
    return decoder_arguments(hf_config) | plain_rope(hf_config)


def names(hf_config: dict[str, Any]) -> NameMap:
    """Table of weights."""
    return decoder_names(hf_config, LAYER)


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """The layer with norms on its branches."""
    from remit_megatron.models.branch_norm import branch_norm_layer  # with the work, as in llama.py

    return branch_norm_layer(config)


def unlisted_parameters(hf_config: dict[str, Any]) -> tuple[int, int]:
    """The norms of queries and keys, which are sharded; those of the branches are as many as a pre-norm layer has."""
    values = arguments(hf_config)
    return (values["num_attention_heads"] + values["num_query_groups"]) * values["kv_channels"], 0


FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    arguments=arguments,
    layer_spec=layer_spec,
    names=names,
    unlisted_parameters=unlisted_parameters,
)
