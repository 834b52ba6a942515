"""The layer of OLMo 2: x + norm(attention(x)), then x + norm(mlp(x)), with queries and keys normalized over all heads.

Megatron has neither. Both norms of a branch are inside its module, not in the residual addition after it: the addition
runs with gradients enabled, also where none are wanted, and would keep the input of every norm of an evaluation.

The same two classes serve the local modules and Transformer Engine's, which differ in what the layer is made of, so
that names of parameters and keys of checkpoints are the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, sharded_state_dict_default
from torch import Tensor

from remit_megatron.models.attention import ScaledDotProductAttention
from remit_megatron.models.norm import ShardedRMSNorm, norm_class, sharded_rms_norms, weights_only
from remit_megatron.models.spec import TE
from remit_megatron.runtime.errors import UserError


@dataclass
class BranchAttentionSubmodules(SelfAttentionSubmodules):
    """Parts of :class:`BranchNormAttention`; ``post_norm`` is called with config, hidden_size and eps."""

    post_norm: Any = IdentityOp


@dataclass
class BranchMLPSubmodules(MLPSubmodules):
    """Parts of :class:`BranchNormMLP`; ``post_norm`` is called with config, hidden_size and eps."""

    post_norm: Any = IdentityOp


class BranchNormAttention(SelfAttention):
    """Self-attention whose output is normalized, and whose queries and keys are, each over the heads of all ranks.

    Arguments as :class:`megatron.core.transformer.attention.SelfAttention`.

    Raises:
        ValueError: the configuration asks for parts that leave no place for the norms.
    """

    def __init__(self, config: TransformerConfig, submodules: BranchAttentionSubmodules, *args: Any, **kwargs: Any):
        for name in ("fused_single_qkv_rope", "attention_output_gate", "add_bias_linear", "qk_layernorm", "qk_l2_norm"):
            if getattr(config, name):
                raise ValueError(f"{name}: found {getattr(config, name)}; expected False in this kind of layer")
        super().__init__(config, submodules, *args, **kwargs)
        norm = partial(ShardedRMSNorm, config, eps=config.layernorm_epsilon, tp_group=self.pg_collection.tp)
        self.q_norm = norm(hidden_size=self.query_projection_size)
        self.k_norm = norm(hidden_size=self.kv_projection_size)
        self.post_norm = submodules.post_norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, n, d], [s, b, g, d], [s, b, g, d] of this rank's heads, queries and keys normalized."""
        projected: Any = super().get_query_key_value_tensors(*args, **kwargs)
        query, key, value = projected  # of three kinds of answer the one that is left without gate and fused rope
        query, key = sharded_rms_norms((query, key), (self.q_norm, self.k_norm), self.pg_collection.tp)
        return query, key, value

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the base class; [s, b, h], or [s / tp, b, h] with sequence parallelism."""
        output, bias = super().forward(*args, **kwargs)
        assert bias is None
        return self.post_norm(output), None


class BranchNormMLP(MLP):
    """Feed-forward part whose output is normalized. Arguments as :class:`megatron.core.transformer.mlp.MLP`."""

    def __init__(self, config: TransformerConfig, submodules: BranchMLPSubmodules, *args: Any, **kwargs: Any):
        super().__init__(config, submodules, *args, **kwargs)
        self.post_norm = submodules.post_norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the base class; [s, b, h], or [s / tp, b, h] with sequence parallelism."""
        output, bias = super().forward(*args, **kwargs)
        assert bias is None
        return self.post_norm(output), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """As the base class, which would have every tensor-parallel rank claim the norm for itself."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        tp_group: Any = self.tp_group
        norm = sharded_state_dict_default(
            self.post_norm, f"{prefix}post_norm.", sharded_offsets, metadata, tp_group=tp_group
        )
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | norm


def branch_norm_layer(config: TransformerConfig) -> ModuleSpec:
    """Specification of the layer, of Transformer Engine's modules or of the local ones.

    Raises:
        UserError: more tensor-parallel ranks than key heads: the ranks that share a head would count it twice in the
            mean square of all keys.
    """
    groups, size = config.num_query_groups, config.tensor_model_parallel_size
    if groups is not None and groups % size:
        raise UserError(
            "tensor_model_parallel_size",
            size,
            f"a divisor of the {groups} key/value heads, which are normalized as one",
        )
    column: Any = ColumnParallelLinear
    row: Any = RowParallelLinear
    core_attention: Any = ScaledDotProductAttention
    norm: Any = norm_class(config)
    if config.transformer_impl == TE:
        from megatron.core.extensions import transformer_engine as te

        column, row, core_attention, norm = (
            te.TEColumnParallelLinear,
            te.TERowParallelLinear,
            te.TEDotProductAttention,
            weights_only(te.TENorm),
        )
    attention = ModuleSpec(
        module=BranchNormAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=BranchAttentionSubmodules(
            linear_qkv=column, core_attention=core_attention, linear_proj=row, post_norm=norm
        ),
    )
    mlp = partial(
        BranchNormMLP.as_mlp_submodule,
        submodules=BranchMLPSubmodules(linear_fc1=column, linear_fc2=row, post_norm=norm),
        ffn_hidden_size=config.ffn_hidden_size,
    )
    submodules = TransformerLayerSubmodules(
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)
