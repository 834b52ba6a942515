"""Normalization on plain torch, under tensor parallelism with sequence parallelism too.

Without Transformer Engine and apex, Megatron's own wrapper around torch's norms refuses sequence parallelism: there
every rank sees s / tp of the tokens, so the gradients of the weights must be summed over the tensor-parallel group.
Megatron does that for each parameter that carries ``sequence_parallel``, which is all these classes add. Parameter
names are those of the other norms.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


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
