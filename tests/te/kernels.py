"""What Transformer Engine's Python asks of its CUDA kernels, in plain torch: enough for its layers to run on a CPU.

Each function takes the place of one of `transformer_engine_torch`, with its arguments in their order. Sums are made in
float32 at least, as the kernels do; results have the dtype that was asked for. Quantized operands, overlapped
communication and the GELU epilogue are refused: no family needs them, and what is not computed must not look as if it
were.

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


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _dtype(te_dtype: Any) -> torch.dtype:
    """A dtype of torch, from Transformer Engine's or torch's."""
    from transformer_engine.pytorch.constants import TE_DType

    if isinstance(te_dtype, torch.dtype):
        return te_dtype
    return next(ours for ours, theirs in TE_DType.items() if theirs == te_dtype)


def _plain(**tensors: Any) -> None:
    """Refuses what is neither a tensor nor absent."""
    for name, tensor in tensors.items():
        if tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter):
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
    _plain(A=a, B=b, D=out, bias=bias)
    if quantizer is not None or comm_overlap is not None or extra_output is not None or bulk_overlap or gelu:
        raise NotImplementedError("generic_gemm: found an epilogue; expected a plain product")
    left, right = _wide(b).reshape(-1, b.shape[-1]), _wide(a).reshape(-1, a.shape[-1])
    product = alpha * ((left.t() if transpose_b else left) @ (right.t() if transpose_a else right))
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = _wide(b).flatten(0, -2).sum(0).to(_dtype(out_dtype) if out_dtype is not None else a.dtype)
    elif bias is not None:
        product = product + bias
    if not transpose_b:
        product = product.reshape(*b.shape[:-1], product.shape[-1])
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
    _plain(x=x, weight=weight, out=out)
    assert quantizer is None
    scale = torch.rsqrt(_wide(x).square().mean(-1) + eps)
    y = _wide(x) * scale.unsqueeze(-1) * (_wide(weight) + zero_centered_gamma)
    y = y.to(_dtype(out_dtype)) if out is None else out.copy_(y)
    return y, None, scale.flatten()


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
    _plain(x=x, weight=weight, bias=bias, out=out)
    assert quantizer is None
    mean = _wide(x).mean(-1, keepdim=True)
    scale = torch.rsqrt((_wide(x) - mean).square().mean(-1, keepdim=True) + eps)
    y = (_wide(x) - mean) * scale * (_wide(weight) + zero_centered_gamma)
    y = y if bias is None else y + _wide(bias)
    y = y.to(_dtype(out_dtype)) if out is None else out.copy_(y)
    return y, mean.flatten(), scale.flatten()


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
