"""Multi-latent attention: queries, keys and values through low-rank latents, one rotary key for all heads.

    c_q = norm(W_qa x)                 [q_lora_rank]              q = W_qb c_q  (or q = W_q x without the latent)
    c, k_r = split(W_kva x)            [kv_lora_rank], [rope]     k_nope, v = split(W_kvb norm(c))  per head
    q_nope, q_r = split(q)  per head   k = [k_nope, rope(k_r)]    o = W_o softmax([q_nope, rope(q_r)] k^T / sqrt(d)) v

The modules are Megatron's own. Its down projections are sharded over tensor-parallel ranks in the local spec and kept
whole on every rank by Transformer Engine; a checkpoint holds the same global tensors under the same keys.

Under the local modules context parallelism gathers keys and values of all heads (not the latents they come from), and
documents are told apart by a mask; packed sequences (``packed_seq_params``) are refused there, by the core attention,
and are for Transformer Engine. Refused with both: one fused down projection, and latents cached for generation.
"""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_submodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import pad

from remit_megatron.models.attention import ScaledDotProductAttention
from remit_megatron.models.norm import norm_class, weights_only
from remit_megatron.models.spec import TE, dense_mlp


class LatentSelfAttention(MLASelfAttention):
    """Megatron's attention with the norms and projections that the specification names, and no others.

    Megatron guesses from ``qk_layernorm`` and would put a second norm before the query projection of a model that does
    not compress its queries.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _run_core_attention(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Tensor:
        """As the base class, which makes the values of packed sequences as wide as queries, and cuts wider ones.

        Narrower ones stay as they are where Transformer Engine takes them: cuDNN's gradients of packed values that are
        not 64, 128 or 256 channels wide are wrong on an H100 (9.19; docs/benchmarks/parity.md), and a kernel has less
        to do. Wider ones are left whole: zeros behind queries and keys change no score, whose scale is given.
        """
        missing = value.shape[-1] - query.shape[-1]
        kwargs["packed_seq_params"] = packed_seq_params
        if packed_seq_params is None or missing == 0 or (missing < 0 and not narrow_values_are_taken()):
            return super()._run_core_attention(query, key, value, *args, **kwargs)
        core: Any = self.core_attention
        if missing < 0:
            kwargs["attn_mask_type"] = kwargs.get("attn_mask_type") or self.attn_mask_type
            return core(query, key, value, *args, **kwargs)
        own = getattr(core, "hidden_size_per_attention_head_k", None)  # which Transformer Engine compares with keys
        core.hidden_size_per_attention_head_k = value.shape[-1]
        try:
            return super()._run_core_attention(pad(query, (0, missing)), pad(key, (0, missing)), value, *args, **kwargs)
        finally:
            core.hidden_size_per_attention_head_k = own


def narrow_values_are_taken() -> bool:
    """Whether packed values may be narrower than queries: Transformer Engine 2.17 pads those of FlashAttention itself,
    and neither cuDNN nor its unfused attention needs it (TransformerEngine #2629)."""
    from megatron.core.utils import is_te_min_version

    return is_te_min_version("2.17.0")


def latent_attention_layer(config: TransformerConfig) -> ModuleSpec:
    """x + attention(norm(x)), then x + mlp(norm(x)), with multi-latent attention and norms on both latents.

    Args:
        config: an MLATransformerConfig; ``transformer_impl`` decides between Transformer Engine and the local modules.
    """
    if config.transformer_impl == TE:
        fused = get_gpt_layer_with_transformer_engine_submodules(multi_latent_attention=True, qk_layernorm=True)
        assert isinstance(fused.self_attention, ModuleSpec)
        fused.self_attention.module = LatentSelfAttention
        fused.input_layernorm = weights_only(fused.input_layernorm)
        return ModuleSpec(module=TransformerLayer, submodules=fused)
    norm = norm_class(config)
    attention = ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=ScaledDotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        pre_mlp_layernorm=norm,
        mlp=dense_mlp(),
        mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        # Checkpoint keys are those of Transformer Engine, which fuses each norm but the first into the linear after it.
        sharded_state_dict_keys_map={
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)
