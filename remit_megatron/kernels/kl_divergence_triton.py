"""Triton kernels of `remit_megatron.kernels.kl_divergence`: each logit of both models is read once forward, and once
backward, where the gradient is written over the student's.

Forward, one program for a row: blocks of columns of both models from left to right, with a running maximum of each and
vectors of running sums taken against them. When a block raises a maximum, the sums are rescaled, and the sum of
differences is moved by what the maxima moved: it is never taken against anything else than the maxima so far, so that
models that agree give exactly 0 and large logits cost no digits.

Backward, one program for a block of a row.

Rows that do not count: no logit is read, forward leaves what is there, backward writes zeros. Padding columns are
dropped after the load, as in `token_loss_triton`; the reference's logits are padded like the student's.

With TRITON_INTERPRET=1 in the environment before the first import these kernels run on the CPU, for tests.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false
# The body of a kernel is Triton's language, not Python's: Triton compiles it.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remit_megatron.kernels import vocab_shard as vs
from remit_megatron.kernels.token_loss_triton import on_device, warps

# Columns at a time; with 8 warps 8 logits of each model a thread, one load of 16 bytes each in 16 bits. Forward holds
# four sums for each: twice as many columns need more registers than leave room for two programs on a processor.
_FORWARD_BLOCK = 2048
_BACKWARD_BLOCK = 2048
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_FLOOR = tl.constexpr(torch.finfo(torch.float32).min / 4)  # in place of -inf, of which differences would be NaN
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _divergence_kernel(
    x_logits,  # [R, width] in, the student's, any float dtype
    y_logits,  # [R, width] in, the reference's, any float dtype
    labels,  # [R] in, int64, global ids
    counted,  # [R] in, uint8
    out,  # [7, T] out, float32, from the first of the R tokens on
    stride,  # T
    start,  # global id of column 0
    columns,  # columns of a row that count
    width,  # columns of a row, padding included
    inverse_c,  # 1 / temperature
    TEMPERED: tl.constexpr,  # whether the temperature is not 1
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(counted + row) != 0:
        x_row, y_row = x_logits + row * width, y_logits + row * width
        offsets = tl.arange(0, BLOCK)
        x_max = tl.full((), _LOWEST, tl.float32)
        y_max = tl.full((), _LOWEST, tl.float32)
        x_sum = tl.zeros((BLOCK,), tl.float32)
        xc_sum = tl.zeros((BLOCK,), tl.float32)
        y_sum = tl.zeros((BLOCK,), tl.float32)
        cross = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, columns, BLOCK):
            column = first + offsets
            x = tl.load(x_row + column, mask=column < width, other=-float("inf")).to(tl.float32)
            y = tl.load(y_row + column, mask=column < width, other=-float("inf")).to(tl.float32)
            x = tl.where(column < columns, x, -float("inf"))
            y = tl.where(column < columns, y, -float("inf"))
            x_top = tl.maximum(x_max, tl.max(x, axis=0))
            y_top = tl.maximum(y_max, tl.max(y, axis=0))
            # By how much the exponents of earlier blocks fall; finite, also where they held nothing.
            x_fall = tl.maximum((x_max - x_top) * inverse_c, _FLOOR)
            y_fall = tl.maximum((y_max - y_top) * inverse_c, _FLOOR)
            y_scale = tl.exp2(y_fall * _LOG2_E)
            x, y = x - x_top, y - y_top
            y_term = tl.exp2(y * inverse_c * _LOG2_E)
            difference = tl.maximum(y * inverse_c, _FLOOR) - tl.maximum(x * inverse_c, _FLOOR)
            cross = y_scale * (cross + y_sum * (y_fall - x_fall)) + difference * y_term
            y_sum = y_sum * y_scale + y_term
            x_sum = x_sum * tl.exp2((x_max - x_top) * _LOG2_E) + tl.exp2(x * _LOG2_E)
            if TEMPERED:
                xc_sum = xc_sum * tl.exp2(x_fall * _LOG2_E) + tl.exp2(x * inverse_c * _LOG2_E)
            x_max, y_max = x_top, y_top
        x_total = tl.sum(x_sum, axis=0)
        xc_total = x_total
        if TEMPERED:
            xc_total = tl.sum(xc_sum, axis=0)
        label = tl.load(labels + row) - start
        target = tl.load(x_row + label, mask=(label >= 0) & (label < columns), other=0.0).to(tl.float32)
        # Rows of the statistics as `kl_divergence` numbers them.
        tl.store(out + row, x_max)
        tl.store(out + stride + row, x_total)
        tl.store(out + 2 * stride + row, xc_total)
        tl.store(out + 3 * stride + row, target)
        tl.store(out + 4 * stride + row, y_max)
        tl.store(out + 5 * stride + row, tl.sum(y_sum, axis=0))
        tl.store(out + 6 * stride + row, tl.sum(cross, axis=0))


@triton.jit
def _divergence_gradient_kernel(
    x_logits,  # [R, width] in
    y_logits,  # [R, width] in
    out,  # [R, width] out, may be the student's logits
    labels,  # [R] in, int64, global ids
    counted,  # [R] in, uint8
    rows,  # [6, T] in, float32, from the first of the R tokens on: see `gradient`
    stride,  # T
    start,  # global id of column 0
    columns,  # columns of a row that count
    width,  # columns of a row, padding included
    inverse_c,  # 1 / temperature
    TEMPERED: tl.constexpr,  # whether the temperature is not 1
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    base = row * width
    if tl.load(counted + row) != 0:
        x = tl.load(x_logits + base + column, mask=column < width, other=-float("inf")).to(tl.float32)
        y = tl.load(y_logits + base + column, mask=column < width, other=-float("inf")).to(tl.float32)
        x = x - tl.load(rows + row)
        y = y - tl.load(rows + stride + row)
        gradient = tl.exp2(x * inverse_c * _LOG2_E) * tl.load(rows + 2 * stride + row)
        gradient -= tl.exp2(y * inverse_c * _LOG2_E) * tl.load(rows + 3 * stride + row)
        if TEMPERED:
            gradient += tl.exp2(x * _LOG2_E) * tl.load(rows + 4 * stride + row)
        is_label = column == tl.load(labels + row) - start
        gradient -= tl.where(is_label, tl.load(rows + 5 * stride + row), 0.0)
        gradient = tl.where(column < columns, gradient, 0.0)
        tl.store(out + base + column, gradient.to(out.dtype.element_ty), mask=column < width)
    else:
        zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
        tl.store(out + base + column, zeros, mask=column < width)


def statistics(
    x: Tensor, y: Tensor, labels: Tensor, counted: Tensor, out: Tensor, shard: vs.VocabShard, *, temperature: float
) -> None:
    """Writes the statistics of R tokens; those that do not count keep what is there.

    Args:
        x, y: [R, width] logits of student and reference, contiguous, any float dtypes.
        labels: [R] int64.
        counted: [R] bool.
        out: [7, R] float32, columns of a larger tensor.
        shard: this rank's columns, of which there is at least one.
        temperature: c.
    """
    block = min(_FORWARD_BLOCK, triton.next_power_of_2(shard.columns))
    with on_device(x):
        _divergence_kernel[(x.shape[0],)](
            x,
            y,
            labels,
            counted.view(torch.uint8),
            out,
            out.stride(0),
            shard.start,
            shard.columns,
            x.shape[1],
            1.0 / temperature,
            TEMPERED=temperature != 1,
            BLOCK=block,
            num_warps=warps(block),
        )


def gradient(
    x: Tensor,
    y: Tensor,
    out: Tensor,
    labels: Tensor,
    counted: Tensor,
    rows: Tensor,
    shard: vs.VocabShard,
    *,
    temperature: float,
) -> None:
    """Writes the gradient of x [R, width] to ``out``, which may be x itself.

    Args:
        x, y, labels, counted, shard, temperature: as in :func:`statistics`.
        rows: [6, R] float32, columns of a larger tensor: maximum of x, maximum of y, factor of p(x/c), of p(y/c), of
            p(x) (none where c is 1: it is in that of p(x/c)), and what the label's element loses.
    """
    width = x.shape[1]
    block = min(_BACKWARD_BLOCK, triton.next_power_of_2(width))
    with on_device(x):
        _divergence_gradient_kernel[(x.shape[0], triton.cdiv(width, block))](
            x,
            y,
            out,
            labels,
            counted.view(torch.uint8),
            rows,
            rows.stride(0),
            shard.start,
            shard.columns,
            width,
            1.0 / temperature,
            TEMPERED=temperature != 1,
            BLOCK=block,
            num_warps=warps(block),
        )
    torch.autograd.graph.increment_version(out)
