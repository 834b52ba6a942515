"""Youtu-LLM: a dense decoder with multi-latent attention.

Pre-norm RMSNorm, SwiGLU, low-rank queries, keys and values, one rotary key for all heads, no biases. Files published
with remote code call the model ``youtu_llm``; their code is never run, and an export carries the name that
transformers knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from remit_megatron.models.family import Family, flag, number, require, whole
from remit_megatron.models.llama import ATTENTION_OUTPUT, MLP, decoder_arguments, decoder_names, padding_row, plain_rope
from remit_megatron.models.mapping import Direct, NameMap
from remit_megatron.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

# Of transformers' class, where a file says nothing.
_DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072}

_ATTENTION = "self_attention."
QUERY = (Direct("self_attn.q_proj.weight", _ATTENTION + "linear_q_proj.weight", split="column"),)
COMPRESSED_QUERY = (
    Direct("self_attn.q_a_proj.weight", _ATTENTION + "linear_q_down_proj.weight", split="column", te_whole=True),
    Direct(
        "self_attn.q_a_layernorm.weight",
        _ATTENTION + "q_layernorm.weight",
        te=_ATTENTION + "linear_q_up_proj.layer_norm_weight",
    ),
    Direct("self_attn.q_b_proj.weight", _ATTENTION + "linear_q_up_proj.weight", split="column"),
)
KEY_VALUE = (
    Direct(
        "self_attn.kv_a_proj_with_mqa.weight", _ATTENTION + "linear_kv_down_proj.weight", split="column", te_whole=True
    ),
    Direct(
        "self_attn.kv_a_layernorm.weight",
        _ATTENTION + "kv_layernorm.weight",
        te=_ATTENTION + "linear_kv_up_proj.layer_norm_weight",
    ),
    Direct("self_attn.kv_b_proj.weight", _ATTENTION + "linear_kv_up_proj.weight", split="column"),
)
INPUT_NORM = Direct("input_layernorm.weight", "input_layernorm.weight")
REST = (
    ATTENTION_OUTPUT,
    Direct("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", te="mlp.linear_fc1.layer_norm_weight"),
    *MLP,
)


def _tied(hf_config: dict[str, Any]) -> bool:
    return flag(hf_config, "tie_word_embeddings", True)  # as in transformers' class


def _query_rank(hf_config: dict[str, Any]) -> int | None:
    """Width of the query's latent; null in the file, and None here, for a model without one.

    Raises:
        UserError: the file says nothing.
    """
    if "q_lora_rank" not in hf_config:
        raise UserError("config.json q_lora_rank", "nothing", "a number, or null for queries that are not compressed")
    return None if hf_config["q_lora_rank"] is None else whole(hf_config, "q_lora_rank")


def zero_rows(hf_config: dict[str, Any]) -> dict[str, int]:
    """The padding token's row of the embedding: transformers 5 sets it to zero when it loads a model, whatever the
    files hold (``YoutuPreTrainedModel._init_weights``); tied, the head has it too.

    Raises:
        UserError: an id without a row.
    """
    row = padding_row(hf_config)
    return {} if row is None else {"model.embed_tokens.weight": row}


def arguments(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a Youtu ``config.json``; see :class:`remit_megatron.models.family.Family`."""
    hf_config = _DEFAULTS | hf_config
    heads = whole(hf_config, "num_attention_heads")
    require(hf_config, "num_key_value_heads", (heads, None))
    require(hf_config, "rope_interleave", (True,))
    # transformers norms the latents with this epsilon whatever the file says.
    require(hf_config, "rms_norm_eps", (1e-6,))
    rope_width, value_width = whole(hf_config, "qk_rope_head_dim"), whole(hf_config, "v_head_dim")
    # transformers rotates over head_dim where a file names it.
    require(hf_config, "head_dim", (rope_width,))
    if rope_width % 2:
        raise UserError("config.json qk_rope_head_dim", rope_width, "an even number")
    # Absent, it is what the authors' own code draws random weights with: sqrt(2 / (5 h)).
    deviation = number(hf_config, "initializer_range", 0.0) or (2 / (5 * whole(hf_config, "hidden_size"))) ** 0.5
    common = {
        "num_key_value_heads": heads,
        "tie_word_embeddings": _tied(hf_config),
        "initializer_range": deviation,
    }
    return (
        decoder_arguments(hf_config | common, value_width=value_width)
        | plain_rope(hf_config)
        | {
            "multi_latent_attention": True,
            "q_lora_rank": _query_rank(hf_config),
            "kv_lora_rank": whole(hf_config, "kv_lora_rank"),
            "qk_head_dim": whole(hf_config, "qk_nope_head_dim"),
            "qk_pos_emb_head_dim": rope_width,
            "v_head_dim": value_width,
            "qk_layernorm": True,
            "rope_type": "rope",
            # Factors of another kind of rope that would scale the scores.
            "rotary_scaling_factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
            # Megatron has fused kernels of the latent kind for another rope only.
            "apply_rope_fusion": False,
            "mla_down_proj_fusion": False,
            "cache_mla_latents": False,
        }
    )


def names(hf_config: dict[str, Any]) -> NameMap:
    """Table of weights; a tied model has no head of its own, whatever its files hold."""
    query = QUERY if _query_rank(hf_config) is None else COMPRESSED_QUERY
    layer = (INPUT_NORM, *query, *KEY_VALUE, *REST)
    return decoder_names(hf_config | {"tie_word_embeddings": _tied(hf_config)}, layer)


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Pre-norm layer with multi-latent attention."""
    from remit_megatron.models.latent_attention import latent_attention_layer

    return latent_attention_layer(config)


def exported(hf_config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` without the remote code's name and files."""
    if hf_config["model_type"] == "youtu" and "auto_map" not in hf_config:
        return hf_config
    return {name: value for name, value in hf_config.items() if name != "auto_map"} | {
        "model_type": "youtu",
        "architectures": ["YoutuForCausalLM"],
    }


FAMILY = Family(
    name="youtu",
    model_types=("youtu", "youtu_llm"),
    arguments=arguments,
    layer_spec=layer_spec,
    names=names,
    exported=exported,
    zero_rows=zero_rows,
    layer_flags=frozenset({"fused_residual_rmsnorm", "qk_clip"}),
)
