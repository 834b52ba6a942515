"""Triton kernels of `remit_megatron.kernels.token_loss`: one read of the logits forward, one read and write backward.

Forward, one program for a row: blocks of columns from left to right, with a running maximum m and a vector of running
sums taken against it; when a block raises m, the sums are rescaled. So maximum and sum come out of a single read, and
there is one exp per logit (two, one for each lane's own maximum, would be bound by the exponentials instead of the
memory). The label's logit is one more element.

Backward, one program for a block of a row: exp(x - M) * g / S, the label's element replaced, written over what was
read.

Rows that do not count: no logit is read, forward leaves the statistics of an empty shard, backward writes zeros.
Padding columns are dropped after the load, not by its mask: the width of a shard is a multiple of 16 nearly always, the
size of the vocabulary hardly ever, and under a mask that may end anywhere Triton does not load 16 bytes at a time.
Offsets are 64-bit: tokens times vocabulary passes 2^31 at 8192 x 262144.

With TRITON_INTERPRET=1 in the environment before the first import these kernels run on the CPU, for tests.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false
# The body of a kernel is Triton's language, not Python's: Triton compiles it.

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from remit_megatron.kernels import vocab_shard as vs

_FORWARD_BLOCK = 8192  # columns at a time; with 8 warps 32 logits a thread
_BACKWARD_BLOCK = 4096
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LOG2_E = tl.constexpr(1.4426950408889634)
_MAXIMUM, _TOTAL, _TARGET = tl.constexpr(vs.MAXIMUM), tl.constexpr(vs.TOTAL), tl.constexpr(vs.TARGET)


@triton.jit
def _statistics_kernel(
    logits,  # [T, width] in, any float dtype
    labels,  # [T] in, int64, global ids
    counted,  # [T] in, uint8
    out,  # [3, T] out, float32
    tokens,
    start,  # global id of column 0
    columns,  # columns of a row that count
    width,  # columns of a row, padding included
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.full((), _LOWEST, tl.float32)
    total = tl.zeros((), tl.float32)
    target = tl.zeros((), tl.float32)
    if tl.load(counted + row) != 0:
        x_row = logits + row * width
        offsets = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, columns, BLOCK):
            column = first + offsets
            x = tl.load(x_row + column, mask=column < width, other=-float("inf")).to(tl.float32)
            x = tl.where(column < columns, x, -float("inf"))
            # Never below the lowest finite number, so that (-inf) - maximum is -inf and not NaN.
            raised = tl.maximum(maximum, tl.max(x, axis=0))
            # Subtract before scaling: M * log2(e) alone would be rounded to far more than the difference can bear.
            sums = sums * tl.exp2((maximum - raised) * _LOG2_E) + tl.exp2((x - raised) * _LOG2_E)
            maximum = raised
        total = tl.sum(sums, axis=0)
        label = tl.load(labels + row) - start
        target = tl.load(x_row + label, mask=(label >= 0) & (label < columns), other=0.0).to(tl.float32)
    tl.store(out + _MAXIMUM * tokens + row, maximum)
    tl.store(out + _TOTAL * tokens + row, total)
    tl.store(out + _TARGET * tokens + row, target)


@triton.jit
def _gradient_kernel(
    logits,  # [T, width] in
    out,  # [T, width] out, may be the logits
    labels,  # [T] in, int64, global ids
    counted,  # [T] in, uint8
    maximum,  # [T] in, float32, M
    row_scale,  # [T] in, float32, g / S
    label_gradient,  # [T] in, float32
    start,  # global id of column 0
    columns,  # columns of a row that count
    width,  # columns of a row, padding included
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    base = row * width
    if tl.load(counted + row) != 0:
        inside = column < columns
        x = tl.load(logits + base + column, mask=column < width, other=-float("inf")).to(tl.float32)
        gradient = tl.exp2((x - tl.load(maximum + row)) * _LOG2_E) * tl.load(row_scale + row)
        gradient = tl.where(column == tl.load(labels + row) - start, tl.load(label_gradient + row), gradient)
        # The padding is set, not multiplied: 0 * NaN would be NaN where the incoming gradient is not finite.
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(out + base + column, gradient.to(out.dtype.element_ty), mask=column < width)
    else:
        zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
        tl.store(out + base + column, zeros, mask=column < width)


class TritonBackend:
    """Row statistics and gradient of one shard; arguments as `remit_megatron.kernels.token_loss.TorchBackend`."""

    @staticmethod
    def statistics(x: Tensor, labels: Tensor, counted: Tensor, shard: vs.VocabShard) -> Tensor:
        tokens, width = x.shape
        if tokens == 0 or shard.columns == 0:
            return vs.new_statistics(tokens, x.device)
        out = torch.empty(3, tokens, dtype=torch.float32, device=x.device)
        block = min(_FORWARD_BLOCK, triton.next_power_of_2(shard.columns))
        with on_device(x):
            _statistics_kernel[(tokens,)](
                x,
                labels,
                counted.view(torch.uint8),
                out,
                tokens,
                shard.start,
                shard.columns,
                width,
                BLOCK=block,
                num_warps=warps(block),
            )
        return out

    @staticmethod
    def gradient(
        x: Tensor,
        out: Tensor,
        labels: Tensor,
        counted: Tensor,
        shard: vs.VocabShard,
        *,
        maximum: Tensor,
        row_scale: Tensor,
        label_gradient: Tensor,
    ) -> None:
        tokens, width = x.shape
        if tokens == 0 or width == 0:
            return
        block = min(_BACKWARD_BLOCK, triton.next_power_of_2(width))
        with on_device(x):
            _gradient_kernel[(tokens, triton.cdiv(width, block))](
                x,
                out,
                labels,
                counted.view(torch.uint8),
                maximum.contiguous(),
                row_scale,
                label_gradient,
                shard.start,
                shard.columns,
                width,
                BLOCK=block,
                num_warps=warps(block),
            )
        # Autograd does not see a kernel write: whoever saved the logits for its own backward must get an error.
        torch.autograd.graph.increment_version(out)


def warps(block: int) -> int:
    """8 warps for the full blocks, fewer where a thread would have less than a few elements."""
    return max(1, min(8, block // 256))


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Where a kernel on ``x`` must be launched."""
    # Triton launches on the current device, whatever device its arguments are on.
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
