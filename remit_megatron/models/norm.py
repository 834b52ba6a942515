"""Normalization on plain torch, under tensor parallelism with sequence parallelism too.

Without Transformer Engine and apex, Megatron's own wrapper around torch's norms refuses sequence parallelism: there
every rank sees s / tp of the tokens, so the gradients of the weights must be summed over the tensor-parallel group.
Megatron does that for each parameter that carries ``sequence_parallel``, which is all these classes add. Parameter
names are those of the other norms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

from remit_megatron.kernels.rms_norm import TorchNorms, backend_of, rms_norms


def _check(config: TransformerConfig) -> None:
    if config.layernorm_zero_centered_gamma:
        raise ValueError(
            "layernorm_zero_centered_gamma: found True; expected False (not supported without Transformer Engine)"
        )


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in float32.

    Args:
        config: read for ``params_dtype`` and ``sequence_parallel``.
        hidden_size: length of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        _check(config)
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h], in the dtype of the weight (with a float32 residual stream, x is wider than the linear
        after it)."""
        weight = self.weight
        return functional.rms_norm(x, self.normalized_shape, weight.to(x.dtype), self.eps).to(weight.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; arguments as :class:`RMSNorm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        _check(config)
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h], in the dtype of the weight."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


def norm_class(config: TransformerConfig) -> type[RMSNorm] | type[LayerNorm]:
    """The class that ``config.normalization`` names."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]


def weights_only(norm: Callable[..., Any]) -> Callable[..., Any]:
    """A kind of norms that keep nothing in checkpoints but their weights.

    Transformer Engine's norms write state of quantizers that they do not have (``_extra_state``) and ask for it when
    they are loaded. The local norms have none, so that a run begun with these could not go on with those.

    Args:
        norm: makes one, from the arguments that Megatron gives.
    """

    def make(*args: Any, **kwargs: Any) -> torch.nn.Module:
        module = norm(*args, **kwargs)
        module.register_state_dict_post_hook(_without_extra_state)
        module._register_load_state_dict_pre_hook(_with_no_extra_state)
        return module

    return make


def _without_extra_state(module: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}_extra_state", None)


def _with_no_extra_state(state: dict[str, Any], prefix: str, *_: Any) -> None:
    state[f"{prefix}_extra_state"] = None  # present, for a strict load; with nothing in it


class ShardedRMSNorm(torch.nn.Module):
    """RMSNorm over an axis that tensor parallelism has split: each rank holds its part of the vector and of the weight.

    The mean square is that of the whole vector, so its sum is reduced over the ranks, and so is the inner product that
    comes back from it (`remit_megatron.kernels.rms_norm`). The weight is this rank's own: its gradient needs no
    reduction, and with sequence parallelism neither, because the vectors hold all tokens.

    Megatron sums the gradients of parameters over the tensor-parallel group by name (``q_layernorm``, ``k_layernorm``)
    where ``qk_layernorm`` is on. Do not give an instance such a name.

    Args:
        config: read for ``params_dtype``.
        hidden_size: length of the whole vector; a multiple of the group's size.
        eps: added to the mean square.
        tp_group: the tensor-parallel group.

    Raises:
        ValueError: the vector does not split evenly.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, tp_group: dist.ProcessGroup):
        _check(config)
        super().__init__()
        if hidden_size % tp_group.size():
            raise ValueError(f"hidden_size: found {hidden_size}; expected a multiple of {tp_group.size()} ranks")
        self.hidden_size, self.eps, self._tp_group = hidden_size, eps, tp_group
        self.weight = torch.nn.Parameter(torch.ones(hidden_size // tp_group.size(), dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size / tp] -> the same, in the dtype of ``x``; statistics and product in float32 at least."""
        return sharded_rms_norms((x.unsqueeze(-2),), (self,), self._tp_group)[0].squeeze(-2)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Megatron's description for distributed checkpoints: the weight is cut along its only axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def sharded_rms_norms(
    vectors: tuple[Tensor, ...], norms: tuple[ShardedRMSNorm, ...], tp_group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Several :class:`ShardedRMSNorm` of the same tokens with one reduction over the ranks, forward and backward each.

    On a GPU with Triton the parts around the reductions are one launch each for all of them
    (`remit_megatron.kernels.rms_norm_triton`).

    Args:
        vectors: [..., n, d] of each norm, n heads of d channels on this rank; the leading axes are equal.
        norms: as many.
        tp_group: theirs.

    Returns:
        What each norm gives, in its vector's dtype and shape.
    """
    if tp_group.size() == 1 and backend_of(vectors, "auto") is TorchNorms:
        return tuple(_whole(x, norm) for x, norm in zip(vectors, norms, strict=True))
    sizes = [(norm.hidden_size, norm.eps) for norm in norms]
    return rms_norms(vectors, [norm.weight for norm in norms], sizes=sizes, tp_group=tp_group)


def _whole(x: Tensor, norm: ShardedRMSNorm) -> Tensor:
    weight = norm.weight.to(x.dtype)
    return functional.rms_norm(x.flatten(-2), weight.shape, weight, norm.eps).view(x.shape)
