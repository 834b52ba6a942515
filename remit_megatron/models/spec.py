"""Layer specifications: Megatron's own modules, with Transformer Engine where it is usable, else with our attention and
norms."""

from __future__ import annotations

from functools import cache, partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from remit_megatron.models.attention import ScaledDotProductAttention
from remit_megatron.models.norm import norm_class, weights_only

TE = "transformer_engine"
LOCAL = "local"


@cache
def transformer_engine_usable() -> bool:
    """Whether Transformer Engine can be imported and there is a GPU for it."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE) and torch.cuda.is_available()


def transformer_impl(wanted: str = TE) -> str:
    """``transformer_engine`` where that is wanted and usable, else ``local``."""
    return TE if wanted == TE and transformer_engine_usable() else LOCAL


def pre_norm_layer(config: TransformerConfig) -> ModuleSpec:
    """x + attention(norm(x)), then x + mlp(norm(x)): the layer of Llama and of most families."""
    if config.transformer_impl == TE:
        return get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm,
            use_te_op_fuser=config.use_transformer_engine_op_fuser,
            use_te_activation_func=config.use_te_activation_func,
        )
    norm = norm_class(config)
    query_key_norm = norm if config.qk_layernorm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ScaledDotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=query_key_norm,
            k_layernorm=query_key_norm,
        ),
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        pre_mlp_layernorm=norm,
        mlp=dense_mlp(),
        mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        # Checkpoint keys are those of Transformer Engine, which fuses each norm into the linear after it.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def dense_mlp() -> partial[MLP]:
    """The feed-forward part of the local spec."""
    return partial(
        MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )


def block_spec(
    layer: ModuleSpec, config: TransformerConfig, *, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (or of one virtual stage), and the norm after the last layer.

    A bare layer spec would make Megatron choose the last norm, and its choice refuses sequence parallelism.

    Args:
        layer: specification of one layer.
        config: sizes and pipeline layout.
        vp_stage: virtual pipeline stage; None without virtual pipelining.
        pp_rank: pipeline rank; None asks Megatron's parallel state.
    """
    if config.transformer_impl == TE:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = weights_only(TENorm)
    else:
        norm = norm_class(config)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)  # pyright: ignore[reportArgumentType]
