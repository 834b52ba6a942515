"""Llama: SmolLM2, Llama 3, and other models of this architecture.

Pre-norm RMSNorm, SwiGLU, grouped-query attention, rotary embedding of the half-rotation kind, no biases. Llama 3.1 and
later stretch the low frequencies (rope type ``llama3``); Megatron computes the same formula with its constants fixed at
low_freq_factor 1, high_freq_factor 4, original length 8192, which are those of every released Llama 3, and takes only
the factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from remit_megatron.models.family import Family, flag, number, require, rope_of, whole
from remit_megatron.models.mapping import QKV, Direct, GatedMLP, NameMap, Vocabulary, Weight
from remit_megatron.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

# What megatron.core's RotaryEmbedding._apply_scaling holds fixed.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}

# Of transformers' class, where a file says nothing: those of the first two Llamas have no theta.
_DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}

QUERY_KEY_VALUE = QKV(
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "self_attention.linear_qkv.weight",
)
ATTENTION_OUTPUT = Direct("self_attn.o_proj.weight", "self_attention.linear_proj.weight", split="row")
MLP = (
    GatedMLP(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "mlp.linear_fc1.weight"),
    Direct("mlp.down_proj.weight", "mlp.linear_fc2.weight", split="row"),
)
LAYER = (
    Direct("input_layernorm.weight", "input_layernorm.weight", te="self_attention.linear_qkv.layer_norm_weight"),
    QUERY_KEY_VALUE,
    ATTENTION_OUTPUT,
    Direct("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", te="mlp.linear_fc1.layer_norm_weight"),
    *MLP,
)
EMBEDDING = Vocabulary("model.embed_tokens.weight", "embedding.word_embeddings.weight")
FINAL_NORM = Direct("model.norm.weight", "decoder.final_layernorm.weight")
HEAD = Vocabulary("lm_head.weight", "output_layer.weight")
# Of the layer that spec.py's pre_norm_layer makes.
PRE_NORM_FLAGS = frozenset({"use_te_activation_func", "use_transformer_engine_op_fuser", "qk_clip"})


def decoder_arguments(hf_config: dict[str, Any], *, value_width: int | None = None) -> dict[str, Any]:
    """Arguments that every bias-free SwiGLU decoder with RMSNorm and rotary embeddings shares; rope is left to the
    family.

    Args:
        hf_config: content of config.json.
        value_width: channels of a head, where a family has another name for them than ``head_dim``.
    """
    require(hf_config, "hidden_act", ("silu", "swish"))  # two names of one function
    require(hf_config, "attention_bias", (False,))
    require(hf_config, "mlp_bias", (False,))
    require(hf_config, "is_causal", (True,))  # transformers lets attention see what follows where it is false
    padding_row(hf_config)
    if hf_config.get("per_layer_config"):
        raise UserError("config.json per_layer_config", hf_config["per_layer_config"], "none: all layers are alike")
    heads, hidden = whole(hf_config, "num_attention_heads"), whole(hf_config, "hidden_size")
    groups = heads if hf_config.get("num_key_value_heads") is None else whole(hf_config, "num_key_value_heads")
    if heads % groups:
        raise UserError("config.json num_key_value_heads", groups, f"a divisor of num_attention_heads ({heads})")
    head_dim = _head_dim(hf_config, hidden, heads) if value_width is None else value_width
    return {
        "num_layers": whole(hf_config, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": whole(hf_config, "intermediate_size"),
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": number(hf_config, "rms_norm_eps"),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "untie_embeddings_and_output_weights": not flag(hf_config, "tie_word_embeddings", False),
        "max_position_embeddings": whole(hf_config, "max_position_embeddings"),
        "init_method_std": number(hf_config, "initializer_range", 0.02),
        "attention_dropout": number(hf_config, "attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "vocab_size": whole(hf_config, "vocab_size"),
    }


def padding_row(hf_config: dict[str, Any]) -> int | None:
    """The row of the embedding that is the padding token's; None where config.json names none.

    Raises:
        UserError: an id without a row, of which transformers makes no model.
    """
    padding, rows = hf_config.get("pad_token_id"), whole(hf_config, "vocab_size")
    if padding is None:
        return None
    if type(padding) is not int or not -rows <= padding < rows:
        raise UserError("config.json pad_token_id", padding, f"null, or the id of one of the {rows} rows")
    return padding % rows


def _head_dim(hf_config: dict[str, Any], hidden: int, heads: int) -> int:
    """Channels of a head; rotary embeddings turn pairs of them."""
    if hf_config.get("head_dim") is None:
        if hidden % heads:
            raise UserError("config.json hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
        if (hidden // heads) % 2:
            raise UserError("config.json hidden_size", hidden, f"an even number for each of the {heads} heads")
        return hidden // heads
    head_dim = whole(hf_config, "head_dim")
    if head_dim % 2:
        raise UserError("config.json head_dim", head_dim, "an even number")
    return head_dim


def arguments(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a Llama ``config.json``; see :class:`remit_megatron.models.family.Family`."""
    hf_config = _DEFAULTS | hf_config
    rope = rope_of(hf_config)
    scaling: dict[str, Any] = {"use_rope_scaling": False}
    if rope.kind == "llama3":
        # transformers takes the original length from outside of rope's parameters where a file has it there, too.
        outside = {name: hf_config[name] for name in ("original_max_position_embeddings",) if name in hf_config}
        for name, value in _LLAMA3_CONSTANTS.items():
            found = (rope.parameters | outside).get(name)
            if found != value:
                field = name if name in outside else f"rope_parameters.{name}"
                raise UserError(f"config.json {field}", found, f"{value} (the value that Megatron holds fixed)")
        factor = rope.parameters.get("factor")
        if not isinstance(factor, int | float) or factor < 1:
            raise UserError("config.json rope_parameters.factor", factor, "a number, at least 1")
        scaling = {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}
    elif rope.kind != "default":
        raise UserError("config.json rope_parameters.rope_type", rope.kind, "default or llama3")
    return decoder_arguments(hf_config) | {"rotary_base": rope.theta} | scaling


def plain_rope(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of rotary embeddings without any stretching; refuses the other kinds."""
    rope = rope_of(hf_config)
    if rope.kind != "default":
        raise UserError("config.json rope_parameters.rope_type", rope.kind, "default")
    return {"rotary_base": rope.theta, "use_rope_scaling": False}


def decoder_names(hf_config: dict[str, Any], layer: tuple[Weight, ...] = LAYER) -> NameMap:
    """Table of weights of a decoder with these layers; a tied model has no head of its own, whatever its files hold."""
    tied = flag(hf_config, "tie_word_embeddings", False)
    return NameMap(embedding=EMBEDDING, layer=layer, final=(FINAL_NORM,), head=None if tied else HEAD)


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron's own pre-norm layer."""
    from remit_megatron.models.spec import pre_norm_layer  # with the work: descriptions are read without Megatron

    return pre_norm_layer(config)


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    arguments=arguments,
    layer_spec=layer_spec,
    names=decoder_names,
    layer_flags=PRE_NORM_FLAGS,
)
