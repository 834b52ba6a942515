"""FP8 weights on a CPU: a tensor that behaves as Transformer Engine's quantized parameters do, on torch's own casts."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Float8Weight(Tensor):
    """Holds float8_e4m3fn numbers and one scale; looks like a tensor of the type that it was made from.

    What is copied into it is quantized; every other operation sees the dequantized values. There are no elements behind
    ``.data``, so that code that reaches for them fails.

    Args:
        value: what to hold.
        scale: multiplies before the cast; None takes the largest that fits, anew at every copy.
    """

    @staticmethod
    def __new__(cls, value: Tensor, scale: float | None = None) -> Float8Weight:
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)  # type: ignore[attr-defined]

    def __init__(self, value: Tensor, scale: float | None = None):
        self.fixed_scale = scale
        self.copies = 0
        self.quantize(value)

    def quantize(self, value: Tensor) -> None:
        largest = torch.finfo(torch.float8_e4m3fn).max
        fixed = self.fixed_scale
        self.scale = float(largest / value.abs().max().clamp(min=1e-12)) if fixed is None else fixed
        self.numbers = (value.float() * self.scale).clamp(-largest, largest).to(torch.float8_e4m3fn)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return (self.numbers.float() / self.scale).to(self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Float8Weight({self.dequantize()})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func is torch.ops.aten.copy_.default and isinstance(args[0], Float8Weight):
            args[0].quantize(args[1])
            args[0].copies += 1
            return args[0]
        plain = tree_map(lambda x: x.dequantize() if isinstance(x, Float8Weight) else x, (args, kwargs or {}))
        assert not func._schema.is_mutable, f"{func} would change a copy"
        return func(*plain[0], **plain[1])

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def quantize_weights(model: torch.nn.Module, *, scale: float | None = None, trained: bool = False) -> list[str]:
    """Puts `Float8Weight` in the place of every linear weight of an FP8 layer, before the weights are loaded.

    Args:
        model: a Megatron model whose configuration asks for FP8.
        scale: as in `Float8Weight`; a fixed one makes the numbers independent of how a weight is cut.
        trained: also keep the initial value as Transformer Engine does for an optimizer.

    Returns:
        Names of the weights.
    """
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    from remit_megatron.models.build import unwrap

    chunk, names = unwrap(model), []
    for index, layer in enumerate(chunk.decoder.layers):
        if is_first_last_bf16_layer(chunk.config, layer.layer_number - 1):  # type: ignore[arg-type, operator]
            continue
        for name, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.ndim != 2:
                continue
            module.weight = torch.nn.Parameter(Float8Weight(weight.detach(), scale), requires_grad=False)
            if trained:
                module.weight._high_precision_init_val = weight.detach().clone()
                module.weight.get_high_precision_init_val = MethodType(
                    lambda self: self._high_precision_init_val, module.weight
                )
            names.append(f"decoder.layers.{index}.{name}.weight")
    return names
