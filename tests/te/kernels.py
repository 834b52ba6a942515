"""What Transformer Engine's Python asks of its CUDA kernels, in plain torch: enough for its layers to run on a CPU.

Each function takes the place of one of `transformer_engine_torch`, with its arguments in their order. Sums are made in
float32 at least, as the kernels do; results have the dtype that was asked for. Of quantized tensors there are those of
one scale each (Megatron's recipe ``tensorwise``), whose products are made of the dequantized numbers: an FP8 product
but for the order of its sums. Other recipes, overlapped communication and the GELU epilogue are refused: what is not
computed must not look as if it were.

Legend: t tokens (all leading axes together), h width of a row.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _wide(tensor: Any) -> Tensor:
    if _is_float8(tensor):
        return tensor.dequantize(dtype=torch.float32)
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _dtype(te_dtype: Any) -> torch.dtype:
    """A dtype of torch, from Transformer Engine's or torch's."""
    from transformer_engine.pytorch.constants import TE_DType

    if isinstance(te_dtype, torch.dtype):
        return te_dtype
    return next(ours for ours, theirs in TE_DType.items() if theirs == te_dtype)


def _is_float8(tensor: Any) -> bool:
    """Whether this is one of Transformer Engine's tensors of FP8 numbers and one scale."""
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import (  # type: ignore[import-not-found]
        Float8TensorStorage,
    )

    return isinstance(tensor, Float8TensorStorage)


def _known(**tensors: Any) -> None:
    """Refuses what is neither a tensor nor absent."""
    for name, tensor in tensors.items():
        if tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter) and not _is_float8(tensor):
            raise NotImplementedError(f"{name}: found {type(tensor).__name__}; expected a plain tensor")


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_input: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """alpha op(B) op(A) + bias, as rows; with ``accumulate`` added to ``beta out``. op(A) = A^T with ``transpose_a``.

    A weight [n, k] and an input [..., k] give [..., n] (TN), gradients [..., n] give [..., k] (NN), and gradients
    [..., n] with inputs [..., k] the weight's [n, k] (NT).
    """
    del bias_dtype, workspace, workspace_size, use_split_accumulator, comm_type
    _known(A=a, B=b, D=out, bias=bias)
    if quantizer is not None or comm_overlap is not None or extra_output is not None or bulk_overlap or gelu:
        raise NotImplementedError("generic_gemm: found an epilogue; expected a plain product")
    rows, weight = _wide(b), _wide(a)
    left, right = rows.reshape(-1, rows.shape[-1]), weight.reshape(-1, weight.shape[-1])
    product = alpha * ((left.t() if transpose_b else left) @ (right.t() if transpose_a else right))
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = rows.flatten(0, -2).sum(0).to(_dtype(out_dtype) if out_dtype is not None else a.dtype)
    elif bias is not None:
        product = product + bias
    if not transpose_b:
        product = product.reshape(*rows.shape[:-1], product.shape[-1])
    if out is None:
        return product.to(_dtype(out_dtype) if out_dtype is not None else a.dtype), bias_gradient, None, None
    if accumulate:
        product = product.view_as(out) + (1.0 if beta is None else beta) * _wide(out)
    out.copy_(product.view_as(out))
    return out, bias_gradient, None, None


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """[t, h] -> y [t, h], None, 1 / rms [t] float32."""
    del sm_margin
    _known(x=x, weight=weight, out=out)
    scale = torch.rsqrt(_wide(x).square().mean(-1) + eps)
    y = _wide(x) * scale.unsqueeze(-1) * (_wide(weight) + zero_centered_gamma)
    return _as_asked(y, out, quantizer, out_dtype), None, scale.flatten()


def _as_asked(y: Tensor, out: Any, quantizer: Any, out_dtype: Any) -> Any:
    """A norm's output in its dtype, in the buffer that was given, quantized."""
    y = y.to(_dtype(out_dtype))
    if quantizer is not None:
        return quantize(y, quantizer, out)
    return y if out is None else out.copy_(y)


def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [t, h] and of the weight [h]."""
    del sm_margin
    scale = scale.view(*x.shape[:-1], 1)
    unit, incoming = _wide(x) * scale, _wide(gradient)
    weighted = incoming * (_wide(weight) + zero_centered_gamma)
    of_x = scale * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    return of_x.to(x.dtype), (incoming * unit).flatten(0, -2).sum(0).to(weight.dtype)


def rmsnorm_bwd_add(
    gradient: Tensor, x: Tensor, add: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`rmsnorm_bwd`, with ``add`` [t, h] added to the gradient of x."""
    of_x, of_weight = rmsnorm_bwd(gradient, x, scale, weight, sm_margin, zero_centered_gamma)
    return of_x + add, of_weight


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """[t, h] -> y [t, h], mean [t] and 1 / standard deviation [t], both float32."""
    del sm_margin
    _known(x=x, weight=weight, bias=bias, out=out)
    mean = _wide(x).mean(-1, keepdim=True)
    scale = torch.rsqrt((_wide(x) - mean).square().mean(-1, keepdim=True) + eps)
    y = (_wide(x) - mean) * scale * (_wide(weight) + zero_centered_gamma)
    y = y if bias is None else y + _wide(bias)
    return _as_asked(y, out, quantizer, out_dtype), mean.flatten(), scale.flatten()


def layernorm_bwd(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [t, h], of the weight [h] and of the bias [h]."""
    del sm_margin
    mean, scale = mean.view(*x.shape[:-1], 1), scale.view(*x.shape[:-1], 1)
    unit, incoming = (_wide(x) - mean) * scale, _wide(gradient)
    weighted = incoming * (_wide(weight) + zero_centered_gamma)
    inner = (weighted * unit).mean(-1, keepdim=True)
    of_x = scale * (weighted - weighted.mean(-1, keepdim=True) - unit * inner)
    of_weight, of_bias = (incoming * unit).flatten(0, -2).sum(0), incoming.flatten(0, -2).sum(0)
    return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype)


def quantize(x: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """FP8 numbers of ``x`` and their scale, by its own largest value (on all ranks of the quantizer's group, if any).

    The columnwise copy, which a backward pass reads, is made where the quantizer asks for it.
    """
    from transformer_engine.pytorch.constants import TE_DType_To_Torch  # type: ignore[import-not-found]
    from transformer_engine.pytorch.tensor.float8_tensor import (  # type: ignore[import-not-found]
        Float8CurrentScalingQuantizer,
    )

    if not isinstance(quantizer, Float8CurrentScalingQuantizer) or noop is not None:
        raise NotImplementedError(f"quantize: found {type(quantizer).__name__}; expected one scale for a tensor")
    kind = TE_DType_To_Torch[quantizer.dtype]
    highest = torch.finfo(kind).max
    largest = x.detach().abs().max().float()
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    largest = largest.clamp(min=quantizer.amax_epsilon)
    scale = torch.where(torch.isfinite(largest) & (largest > 0), highest / largest, 1.0)
    if quantizer.force_pow_2_scales:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    numbers = (_wide(x.detach()) * scale).clamp(-highest, highest).to(kind).view(torch.uint8)
    columns = numbers.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None
    if out is None:
        out = quantizer.create_tensor_from_data(numbers, fake_dtype=x.dtype, internal=quantizer.internal)
    elif out._data is not None:
        out._data.copy_(numbers.view_as(out._data))
    out._scale_inv.copy_((1 / scale).reshape(1))
    out._transpose, out._transpose_invalid = columns, columns is None
    return out


def _rows(boundaries: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Document and position in it of each of ``tokens`` tokens; of those behind the last boundary, the last one's."""
    token = torch.arange(tokens)
    document = (torch.searchsorted(boundaries.long(), token, right=True) - 1).clamp(max=len(boundaries) - 2)
    return document, token - boundaries.long()[document]


def convert_thd_to_bshd(packed: Tensor, boundaries: Tensor, batch: int, longest: int) -> Tensor:
    """[t, heads, d] and [b + 1] boundaries -> [b, longest, heads, d], zeros behind each document."""
    out = packed.new_zeros(batch, longest, *packed.shape[1:])
    document, position = _rows(boundaries, int(boundaries[-1]))
    out[document, position] = packed[: len(document)]
    return out


def convert_bshd_to_thd(padded: Tensor, boundaries: Tensor, tokens: int) -> Tensor:
    """The inverse of :func:`convert_thd_to_bshd`; zeros for tokens behind the last boundary."""
    out = padded.new_zeros(tokens, *padded.shape[2:])
    document, position = _rows(boundaries, int(boundaries[-1]))
    out[: len(document)] = padded[document, position]
    return out


def _rope(
    x: Tensor,
    angles: Tensor,
    start_positions: Tensor | None,
    layout: Any,
    interleaved: bool,
    boundaries: Tensor | None,
    cp_size: int,
    direction: float,
) -> Tensor:
    """Rotates the pairs of the first channels of each head by ``direction`` times an angle; the others stay."""
    from transformer_engine.pytorch.cpp_extensions.fused_attn import QKVFormat

    if start_positions is not None or cp_size != 1:
        raise NotImplementedError("fused_rope: found start positions or context parallelism; expected neither")
    angles = angles.view(angles.shape[0], angles.shape[-1])
    if layout == QKVFormat["thd"]:
        assert boundaries is not None
        _, position = _rows(boundaries, x.shape[0])
        angles = angles[position].unsqueeze(1)
    elif layout == QKVFormat["sbhd"]:
        angles = angles[: x.shape[0]].view(x.shape[0], 1, 1, -1)
    else:
        angles = angles[: x.shape[1]].view(1, x.shape[1], 1, -1)
    turned, rest = _wide(x[..., : angles.shape[-1]]), x[..., angles.shape[-1] :]
    cos, sin = angles.cos(), angles.sin()
    if direction < 0:  # the transpose: the sine of the other channel of the pair, with its sign
        turned_sin = turned * sin
        return torch.cat(((turned * cos - _quarter(turned_sin, interleaved)).to(x.dtype), rest), dim=-1)
    return torch.cat(((turned * cos + _quarter(turned, interleaved) * sin).to(x.dtype), rest), dim=-1)


def _quarter(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) -> (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def fused_rope_forward(x: Tensor, angles: Tensor, start: Any, layout: Any, interleaved: bool, *rest: Any) -> Tensor:
    """Rotary embedding of [s, b, heads, d], [b, s, heads, d] or [t, heads, d] by [s, 1, 1, d'] angles."""
    boundaries, cp_size, _ = rest
    return _rope(x, angles, start, layout, interleaved, boundaries, cp_size, 1.0)


def fused_rope_backward(x: Tensor, angles: Tensor, start: Any, layout: Any, interleaved: bool, *rest: Any) -> Tensor:
    """Its gradient."""
    boundaries, cp_size, _ = rest
    return _rope(x, angles, start, layout, interleaved, boundaries, cp_size, -1.0)


# How often each of the functions below has been called in this process.
calls: Counter[str] = Counter()


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return counted


KERNELS = {
    function.__name__: _counted(function)
    for function in (
        generic_gemm,
        rmsnorm_fwd,
        rmsnorm_bwd,
        rmsnorm_bwd_add,
        layernorm_fwd,
        layernorm_bwd,
        quantize,
        convert_thd_to_bshd,
        convert_bshd_to_thd,
        fused_rope_forward,
        fused_rope_backward,
    )
}


def install() -> None:
    """Puts the functions in the places of Transformer Engine's, also where a module has taken one by name."""
    import transformer_engine_torch as tex

    taken = [module for name, module in sys.modules.items() if name.startswith("transformer_engine.")]
    for name, function in KERNELS.items():
        original = getattr(tex, name)
        for module in (tex, *taken):
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, function)
