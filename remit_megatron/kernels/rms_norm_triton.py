"""Triton kernels of `remit_megatron.kernels.rms_norm`: what is around its two reductions, for one or two vectors.

A launch does its work for both vectors (queries and keys): the second axis of its grid says which. Forward, on several
ranks, is one launch that sums squares, the reduction, and one that scales; on one rank a single launch, which reads x
once. Backward, on several ranks, is one launch for the inner products that travel and for the gradients of the weights,
the reduction, and one that writes the gradients of the vectors; on one rank the first does all of it. A program of the
inner products goes over several rows and adds up their part of the weights' gradients in float32; those of all programs
are summed by torch, always in the same order.

A row is a block: its width is at most 8192. Rows may be views: queries and keys are every third head of one product,
and are read where they lie. Nothing is written in place.

With TRITON_INTERPRET=1 in the environment before the first import these kernels run on the CPU, for tests.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false
# The body of a kernel is Triton's language, not Python's: Triton compiles it.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from remit_megatron.kernels.rms_norm import Reduction, Sizes
from remit_megatron.kernels.token_loss_triton import on_device

_WIDEST = 8192  # channels of a row; with 16 warps 16 a thread
_LEAST_ROWS = 16  # of a program of the inner products
_MOST_PROGRAMS = 512  # of one vector: their float32 sums are as many rows, which are written and read once more


@triton.jit
def _load_row(x, row, stride, head_stride, width, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of one row in float32, 0 behind them; head n begins at n * head_stride."""
    column = tl.arange(0, BLOCK)
    place = (column // HEAD) * head_stride + column % HEAD
    return tl.load(x + row * stride + place, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def _store_row(out, row, width, value, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _square_sum_of_row(x, squares, row, stride, head_stride, width, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    value = _load_row(x, row, stride, head_stride, width, HEAD, BLOCK)
    tl.store(squares + row, tl.sum(value * value, axis=0))


@triton.jit
def _scale_row(
    x, weight, out, squares, row, stride, head_stride, width, size, eps,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    value = _load_row(x, row, stride, head_stride, width, HEAD, BLOCK)
    if WHOLE:
        square = tl.sum(value * value, axis=0)
        tl.store(squares + row, square)
    else:
        square = tl.load(squares + row)
    scale = tl.rsqrt(square / size + eps)
    factor = _load_row(weight, 0, 0, BLOCK, width, BLOCK, BLOCK)
    _store_row(out, row, width, value * scale * factor, BLOCK)


@triton.jit
def _inner_products_of_rows(
    incoming, x, weight, out, squares, inner, partials, first, last, stride, head_stride, width, size, eps,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    factor = _load_row(weight, 0, 0, BLOCK, width, BLOCK, BLOCK)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    for number in range(0, last - first):
        row = first.to(tl.int64) + number
        scale = tl.rsqrt(tl.load(squares + row) / size + eps)
        unit = _load_row(x, row, stride, head_stride, width, HEAD, BLOCK) * scale
        gradient = _load_row(incoming, row, width, BLOCK, width, BLOCK, BLOCK)
        of_weight += gradient * unit
        weighted = gradient * factor
        product = tl.sum(weighted * unit, axis=0)
        if WHOLE:
            _store_row(out, row, width, scale * (weighted - unit * (product / size)), BLOCK)
        else:
            tl.store(inner + row, product)
    column = tl.arange(0, BLOCK)
    tl.store(partials + column, of_weight, mask=column < width)


@triton.jit
def _gradient_of_row(
    incoming, x, weight, out, squares, inner, row, stride, head_stride, width, size, eps,
    HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = tl.rsqrt(tl.load(squares + row) / size + eps)
    unit = _load_row(x, row, stride, head_stride, width, HEAD, BLOCK) * scale
    factor = _load_row(weight, 0, 0, BLOCK, width, BLOCK, BLOCK)
    weighted = _load_row(incoming, row, width, BLOCK, width, BLOCK, BLOCK) * factor
    _store_row(out, row, width, scale * (weighted - unit * (tl.load(inner + row) / size)), BLOCK)


# Arguments of the four kernels, of each vector (0, 1):
#   x           [T, n, d] in, a row of `width` = n * d channels every `stride` elements, a head every `head_stride`
#   weight      [width] in
#   size, eps   channels of the whole vector, and what is added to its mean square, float32
#   HEAD        d, or BLOCK where the row lies in one piece; BLOCK the power of two that holds a row
# and of both: squares and inner [2, T] float32, tokens T.


@triton.jit
def _norm_squares_kernel(
    x0, x1, squares, tokens, stride0, stride1, head_stride0, head_stride1, width0, width1,
    HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK0: tl.constexpr, BLOCK1: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _square_sum_of_row(x0, squares, row, stride0, head_stride0, width0, HEAD0, BLOCK0)
    else:
        _square_sum_of_row(x1, squares + tokens, row, stride1, head_stride1, width1, HEAD1, BLOCK1)


@triton.jit
def _norm_scale_kernel(
    x0, x1, weight0, weight1,
    out0, out1,  # [T, width] out
    squares,  # in, or with WHOLE out: all channels are this rank's
    tokens, stride0, stride1, head_stride0, head_stride1, width0, width1, size0, size1, eps0, eps1,
    HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK0: tl.constexpr, BLOCK1: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _scale_row(
            x0, weight0, out0, squares, row, stride0, head_stride0, width0, size0, eps0, HEAD0, BLOCK0, WHOLE
        )  # fmt: skip
    else:
        _scale_row(
            x1, weight1, out1, squares + tokens, row, stride1, head_stride1, width1, size1, eps1, HEAD1, BLOCK1, WHOLE
        )  # fmt: skip


@triton.jit
def _norm_products_kernel(
    incoming0, incoming1,  # [T, width] in
    x0, x1, weight0, weight1,
    out0, out1,  # [T, width] out with WHOLE, else not used: gradients of the vectors
    squares,  # in
    inner,  # out without WHOLE, else not used
    partials,  # [programs, width0 + width1] out, float32: sums of a program's rows
    tokens,
    rows,  # of a program
    stride0, stride1, head_stride0, head_stride1, width0, width1, size0, size1, eps0, eps1,
    HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK0: tl.constexpr, BLOCK1: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program * rows
    last = tl.minimum(first + rows, tokens)
    if tl.program_id(1) == 0:
        _inner_products_of_rows(
            incoming0, x0, weight0, out0, squares, inner, partials + program.to(tl.int64) * (width0 + width1),
            first, last, stride0, head_stride0, width0, size0, eps0, HEAD0, BLOCK0, WHOLE,
        )  # fmt: skip
    else:
        _inner_products_of_rows(
            incoming1, x1, weight1, out1, squares + tokens, inner + tokens,
            partials + program.to(tl.int64) * (width0 + width1) + width0,
            first, last, stride1, head_stride1, width1, size1, eps1, HEAD1, BLOCK1, WHOLE,
        )  # fmt: skip


@triton.jit
def _norm_backward_kernel(
    incoming0, incoming1,  # [T, width] in
    x0, x1, weight0, weight1,
    out0, out1,  # [T, width] out
    squares, inner,  # in
    tokens, stride0, stride1, head_stride0, head_stride1, width0, width1, size0, size1, eps0, eps1,
    HEAD0: tl.constexpr, HEAD1: tl.constexpr, BLOCK0: tl.constexpr, BLOCK1: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _gradient_of_row(
            incoming0, x0, weight0, out0, squares, inner,
            row, stride0, head_stride0, width0, size0, eps0, HEAD0, BLOCK0,
        )  # fmt: skip
    else:
        _gradient_of_row(
            incoming1, x1, weight1, out1, squares + tokens, inner + tokens,
            row, stride1, head_stride1, width1, size1, eps1, HEAD1, BLOCK1,
        )  # fmt: skip


class TritonNorms:
    """Arguments as `remit_megatron.kernels.rms_norm.TorchNorms`, but rows are [T, n, d] of any first two strides."""

    @staticmethod
    def rows(vectors: Sequence[Tensor]) -> list[Tensor]:
        """[..., n, d] -> [T, n, d] of each, where it lies if that can be said with three strides."""
        found = [x.flatten(0, -3) for x in vectors]
        if all(x.stride(-1) == 1 for x in found) and not _wasteful(found):
            return found
        return [x.contiguous() for x in found]

    @staticmethod
    def forward(
        rows: Sequence[Tensor], weights: Sequence[Tensor], sizes: Sizes, reduce: Reduction
    ) -> tuple[list[Tensor], Tensor]:
        tokens = len(rows[0])
        squares = torch.empty(len(rows), tokens, dtype=torch.float32, device=rows[0].device)
        outputs = [x.new_empty(x.shape) for x in rows]
        if tokens == 0:
            return outputs, squares
        grid = (tokens, len(rows))
        layout, own = _layout(rows), _sizes(sizes)
        with on_device(rows[0]):
            if reduce is not None:
                _norm_squares_kernel[grid](*_two(rows), squares, tokens, **layout)
                reduce(squares)
            _norm_scale_kernel[grid](
                *_two(rows), *_two(weights), *_two(outputs), squares, tokens, **layout, **own, WHOLE=reduce is None
            )
        return outputs, squares

    @staticmethod
    def backward(
        incoming: Sequence[Tensor],
        rows: Sequence[Tensor],
        weights: Sequence[Tensor],
        squares: Tensor,
        sizes: Sizes,
        reduce: Reduction,
    ) -> tuple[list[Tensor], list[Tensor]]:
        tokens = len(rows[0])
        of_vectors = [x.new_empty(x.shape) for x in rows]
        if tokens == 0:
            return of_vectors, [torch.zeros_like(weight) for weight in weights]
        incoming = [gradient.contiguous() for gradient in incoming]
        each = max(_LEAST_ROWS, triton.cdiv(tokens, _MOST_PROGRAMS))
        programs = triton.cdiv(tokens, each)
        widths = [len(weight) for weight in weights]
        stride = widths[0] + _two(widths)[1]  # as the kernel has it: of one vector the second half stays empty
        partials = torch.empty(programs, stride, dtype=torch.float32, device=squares.device)
        inner = squares if reduce is None else torch.empty_like(squares)
        layout, own = _layout(rows), _sizes(sizes)
        tensors = (*_two(incoming), *_two(rows), *_two(weights), *_two(of_vectors), squares, inner)
        with on_device(rows[0]):
            _norm_products_kernel[(programs, len(rows))](
                *tensors, partials, tokens, each, **layout, **own, WHOLE=reduce is None
            )
            if reduce is not None:
                reduce(inner)
                _norm_backward_kernel[(tokens, len(rows))](*tensors, tokens, **layout, **own)
        sums = partials[:, : sum(widths)].sum(0)
        if len({weight.dtype for weight in weights}) == 1:
            sums = sums.to(weights[0].dtype)  # one launch for both
        of_weights = [one.to(weight.dtype) for one, weight in zip(sums.split(widths), weights, strict=True)]
        return of_vectors, of_weights


def refusal(vectors: Sequence[Tensor]) -> str | None:
    """Why the kernels do not take these vectors, [..., n, d] each, as one line; None where they do."""
    if len(vectors) > 2:
        return f"vectors: found {len(vectors)}; expected one or two for impl 'triton'"
    for x in vectors:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"vectors: found {x.dtype}; expected float32, bfloat16 or float16 for impl 'triton'"
        if not 0 < (width := x.shape[-2] * x.shape[-1]) <= _WIDEST:
            return f"vectors: found {width} channels; expected 1 to {_WIDEST} for impl 'triton'"
    return None


def _wasteful(rows: Sequence[Tensor]) -> bool:
    """Whether keeping these views for backward keeps at least twice as many bytes alive as they show."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in rows}
    return sum(storages.values()) >= 2 * sum(x.numel() * x.element_size() for x in rows)


def _two(values: Sequence[Any]) -> tuple[Any, Any]:
    """The kernels name two vectors; of a single one the second program of the grid does not exist."""
    return values[0], values[-1]


def _layout(rows: Sequence[Tensor]) -> dict[str, Any]:
    """How rows [T, n, d] lie, by the names of the kernels' arguments."""
    found: dict[str, Any] = {}
    for number, x in enumerate(_two(rows)):
        width = x.shape[1] * x.shape[2]
        block = triton.next_power_of_2(width)
        pieces = x.shape[1] > 1 and x.stride(1) != x.shape[2]
        found |= {f"stride{number}": x.stride(0), f"width{number}": width, f"BLOCK{number}": block}
        found |= {f"head_stride{number}": x.stride(1) if pieces else block}
        found |= {f"HEAD{number}": x.shape[2] if pieces else block}
    return found | {"num_warps": warps(max(found["BLOCK0"], found["BLOCK1"]))}


def _sizes(sizes: Sizes) -> dict[str, float]:
    (size0, eps0), (size1, eps1) = _two(sizes)
    return {"size0": float(size0), "size1": float(size1), "eps0": eps0, "eps1": eps1}


def warps(block: int) -> int:
    """16 channels a thread: two loads of 16 bytes in 16 bits, and room in the registers for three vectors."""
    return max(1, min(16, block // 512))
