"""Root-mean-square norms over vectors that tensor parallelism has split, several vectors of a token at once.

Legend: T tokens (all leading axes flattened), w channels of a vector on this rank, h of the whole vector, x a vector, c
its weight, g the gradient that comes back, j over all ranks, i over this one's channels.

    r     = (sum_j x[t, j]^2 / h + eps)^(-1/2)
    y[i]  = c[i] (r x[i])                                                     rounded once, to the dtype of x
    dx[i] = r (c[i] g[i] - r x[i] / h * sum_j c[j] g[j] r x[j])
    dc[i] = sum_t g[t, i] r x[t, i]

The weight is each rank's own part, so its gradient travels nowhere. What does is one number of each vector and token,
on the way there and on the way back; those of all vectors travel together, so that the ranks wait for each other twice
a layer. Kept for backward are x and the sums of squares. Arithmetic is in float32 at least, in the order of
transformers' ``Olmo2RMSNorm``.

This file holds the definition in torch's operations, for CPUs. The Triton kernels around the two reductions are in
`remit_megatron.kernels.rms_norm_triton`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.kernels import vocab_shard as vs
from remit_megatron.kernels.token_loss import Impl, TorchBackend, select_backend

# (h, eps) of each vector.
Sizes = tuple[tuple[int, float], ...]
# Sums a tensor over the ranks, in place; None where there is one rank.
Reduction = Callable[[Tensor], Any] | None


def rms_norms(
    vectors: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    sizes: Sequence[tuple[int, float]],
    tp_group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    """Norms of several vectors of the same tokens, each over all its heads on all ranks, with one reduction for all.

    Args:
        vectors: [..., n, d] of each, n heads of d channels on this rank; the leading axes are equal. float32, bfloat16
            or float16 (torch's operations take float64, too); of any strides, as views of one product have them.
        weights: [n * d] of each, this rank's part, any float dtype.
        sizes: channels of the whole vector on all ranks, and what is added to its mean square, of each.
        tp_group: the ranks that hold the vectors, in order; None for one rank.
        impl: "torch", "triton", or "auto": triton on CUDA for one or two vectors, torch elsewhere.

    Returns:
        [..., n, d] of each, contiguous, in its vector's dtype; differentiable once, in vectors and weights.

    Raises:
        ValueError: shapes do not fit, or Triton is asked for what its kernels do not take.
        RuntimeError: backward with ``create_graph=True``.
    """
    _check(vectors, weights, sizes)
    group = None if vs.group_size(tp_group) == 1 else tp_group
    backend = backend_of(vectors, impl)
    return _RMSNorms.apply(tuple(sizes), group, backend, *vectors, *weights)  # pyright: ignore[reportReturnType]


class Backend(Protocol):
    """What an implementation provides; see `TorchNorms`."""

    @staticmethod
    def rows(vectors: Sequence[Tensor]) -> list[Tensor]: ...

    @staticmethod
    def forward(
        rows: Sequence[Tensor], weights: Sequence[Tensor], sizes: Sizes, reduce: Reduction
    ) -> tuple[list[Tensor], Tensor]: ...

    @staticmethod
    def backward(
        incoming: Sequence[Tensor],
        rows: Sequence[Tensor],
        weights: Sequence[Tensor],
        squares: Tensor,
        sizes: Sizes,
        reduce: Reduction,
    ) -> tuple[list[Tensor], list[Tensor]]: ...


class TorchNorms:
    """The definition, operation by operation."""

    @staticmethod
    def rows(vectors: Sequence[Tensor]) -> list[Tensor]:
        """[..., n, d] -> [T, w] of each, as the other functions take them and backward keeps them."""
        return [x.flatten(-2).flatten(0, -2) for x in vectors]

    @staticmethod
    def forward(
        rows: Sequence[Tensor], weights: Sequence[Tensor], sizes: Sizes, reduce: Reduction
    ) -> tuple[list[Tensor], Tensor]:
        """[T, w] of each -> outputs of as many numbers, in the dtypes of the rows, and [vectors, T] sums of squares
        over all ranks."""
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in rows]
        squares = torch.stack([x.square().sum(-1) for x in wide])
        if reduce is not None:
            reduce(squares)
        parts = zip(rows, wide, weights, _scales(squares, sizes), strict=True)
        return [(x_wide * scale * weight).to(x.dtype) for x, x_wide, weight, scale in parts], squares

    @staticmethod
    def backward(
        incoming: Sequence[Tensor],
        rows: Sequence[Tensor],
        weights: Sequence[Tensor],
        squares: Tensor,
        sizes: Sizes,
        reduce: Reduction,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of vectors, as many numbers as the rows, and of weights, each in its dtype.

        Args:
            incoming: [T, w] of each.
            squares: as forward gave them.
        """
        scales = _scales(squares, sizes)
        units = [x.to(scale.dtype) * scale for x, scale in zip(rows, scales, strict=True)]
        wide = [gradient.to(scale.dtype) for gradient, scale in zip(incoming, scales, strict=True)]
        of_weights = [
            (gradient * unit).sum(0).to(weight.dtype)
            for gradient, unit, weight in zip(wide, units, weights, strict=True)
        ]
        weighted = [gradient * weight for gradient, weight in zip(wide, weights, strict=True)]
        inner = torch.stack([(one * unit).sum(-1) for one, unit in zip(weighted, units, strict=True)])
        if reduce is not None:
            reduce(inner)
        of_vectors = [
            (scale * (one - unit * (product.unsqueeze(-1) / size))).to(x.dtype)
            for x, scale, one, unit, product, (size, _) in zip(rows, scales, weighted, units, inner, sizes, strict=True)
        ]
        return of_vectors, of_weights


def _scales(squares: Tensor, sizes: Sizes) -> list[Tensor]:
    """r of each vector, [T, 1]."""
    return [torch.rsqrt(square / size + eps).unsqueeze(-1) for square, (size, eps) in zip(squares, sizes, strict=True)]


class _RMSNorms(torch.autograd.Function):
    """Written out, it keeps only x and one number per vector for the backward pass; composed of operations of autograd
    and Megatron's mappings it keeps several float32 copies of x."""

    @staticmethod
    def forward(
        ctx: Any, sizes: Sizes, group: dist.ProcessGroup | None, backend: type[Backend], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        vectors, weights = tensors[: len(sizes)], tensors[len(sizes) :]
        rows, reduce = backend.rows(vectors), _reduction(group)
        outputs, squares = backend.forward(rows, weights, sizes, reduce)
        ctx.save_for_backward(*rows, *weights, squares)
        ctx.sizes, ctx.reduce, ctx.backend = sizes, reduce, backend
        return tuple(output.view(x.shape) for output, x in zip(outputs, vectors, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only under create_graph=True
            raise RuntimeError(
                "rms_norms: found backward with create_graph=True; expected one without (no double backward)"
            )
        *saved, squares = ctx.saved_tensors
        rows, weights = saved[: len(ctx.sizes)], saved[len(ctx.sizes) :]
        incoming = [gradient.flatten(-2).flatten(0, -2) for gradient in gradients]
        of_vectors, of_weights = ctx.backend.backward(incoming, rows, weights, squares, ctx.sizes, ctx.reduce)
        shaped = [one.view(gradient.shape) for one, gradient in zip(of_vectors, gradients, strict=True)]
        return None, None, None, *shaped, *of_weights


def _reduction(group: dist.ProcessGroup | None) -> Reduction:
    return None if group is None else partial(dist.all_reduce, group=group)


def backend_of(vectors: Sequence[Tensor], impl: Impl) -> type[Backend]:
    """The implementation by its public name; "auto" by device and by what the kernels take.

    Raises:
        ValueError: there is no such one, or it cannot run, or Triton's kernels do not take the vectors.
    """
    if select_backend(impl, vectors[0].device) is TorchBackend:
        return TorchNorms
    from remit_megatron.kernels import rms_norm_triton

    refused = rms_norm_triton.refusal(vectors)
    if refused is None:
        return rms_norm_triton.TritonNorms
    if impl == "triton":
        raise ValueError(refused)
    return TorchNorms


def _check(vectors: Sequence[Tensor], weights: Sequence[Tensor], sizes: Sequence[tuple[int, float]]) -> None:
    if not vectors or not len(vectors) == len(weights) == len(sizes):
        counts = f"{len(vectors)}, {len(weights)} and {len(sizes)}"
        raise ValueError(f"vectors, weights, sizes: found {counts} of them; expected as many of each, at least one")
    for x, weight in zip(vectors, weights, strict=True):
        if x.ndim < 3 or x.shape[:-2] != vectors[0].shape[:-2]:
            expected = [*(vectors[0].shape[:-2] or "T"), "n", "d"]
            raise ValueError(f"vectors: found shape {list(x.shape)}; expected {expected}")
        if weight.shape != (x.shape[-2] * x.shape[-1],):
            expected = [x.shape[-2] * x.shape[-1]]
            raise ValueError(f"weights: found shape {list(weight.shape)}; expected {expected}")
