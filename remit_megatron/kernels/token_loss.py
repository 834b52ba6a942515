"""Per-token negative log-likelihood of vocabulary-parallel logits, differentiable with any incoming gradient per token.

Legend: T tokens (all leading axes flattened), V columns of this rank's shard, x logits, M and S the maximum and the
sum of exp(x - M) over the whole vocabulary, g the incoming gradient of a token.

    loss[t]   = log S[t] - (x[t, label] - M[t])                                            natural logarithm
    dx[t, v]  = g[t] / S[t] * exp(x[t, v] - M[t])                for v other than the label
    dx[t, v]  = g[t] * expm1(-loss[t])                           for the label: p - 1 without the cancellation

Forward reads the logits once and keeps two numbers per token; backward reads them a second time and writes the
gradient over them. There is one collective, in forward (`remit_megatron.kernels.vocab_shard`), and none in backward.

This file holds the torch implementation. It works on blocks of whole rows, one after the other, in a buffer that
stays in the caches of the cores: on a CPU every pass but the first and the last then runs at the speed of the cache,
and nothing of the size of the logits is ever allocated. The Triton kernels are in
`remit_megatron.kernels.token_loss_triton`; both are tested against `reference_token_loss`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.kernels import vocab_shard as vs

Impl = Literal["auto", "torch", "triton"]

# Elements of the float32 buffer. CPU: 1 MiB for each thread, up to 4 MiB. It then stays in a core's L2 (2 MiB where
# this was measured: on one thread 0.5 to 1 MiB is fastest and 4 MiB takes a third longer), while every block costs a
# few barriers among OpenMP's threads, so that it should not be much smaller either. Elsewhere the torch path only
# serves as the truth, and a few large launches beat many small ones.
_BUFFER_ELEMENTS = {"cpu": 1 << 18}
_BUFFER_THREADS = 4
_BUFFER_ELEMENTS_ELSEWHERE = 1 << 24


def token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    ignore_index: int = -100,
    loss_mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Negative log-likelihood of each label, in nats.

    Backward overwrites the logits with their gradient (in their dtype) and returns that same storage: the step needs
    no second tensor of that size. The output projection does not need its output in backward, so nothing is lost
    there; any other operation that kept the logits for its own backward is stopped by autograd's version check.
    Logits that are an autograd leaf keep their values and get a gradient of their own. Without gradients
    (``torch.no_grad``, or logits that need none) nothing is kept.

    Args:
        logits: [..., V] float32, bfloat16 or float16, contiguous; this rank's columns of the vocabulary.
        labels: [...] int64, global token ids, equal on all ranks of ``tp_group``.
        tp_group: ranks that hold the vocabulary, in rank order; None for one rank.
        vocab_size: true size of the vocabulary. Columns from there on are padding: they never enter the softmax and
            get gradient 0. They may fill whole shards. Default: all columns count.
        vocab_start: global id of this rank's first column, for shards of unequal width. Default: equal shards.
        ignore_index: tokens with this label get loss 0 and gradient 0.
        loss_mask: [...] any dtype; tokens with 0 get loss 0 and gradient 0, whatever their logits, label and incoming
            gradient hold. It does not scale anything.
        impl: "torch", "triton", or "auto": triton on CUDA, torch elsewhere.

    Returns:
        [...] float32.

    Raises:
        ValueError: a dtype, shape or label is wrong. Labels on a GPU are checked without waiting for the device;
            there a bad one ends the process with a device-side assertion.
        RuntimeError: backward with ``create_graph=True``, or a second backward.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits: found {logits.dtype}; expected torch.float32, torch.bfloat16 or torch.float16")
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: found shape {tuple(labels.shape)}; expected {tuple(logits.shape[:-1])}, as logits")
    if not logits.is_contiguous():
        raise ValueError(
            f"logits: found strides {logits.stride()} for shape {tuple(logits.shape)}; expected a contiguous tensor"
            " (transpose the labels and the loss instead)"
        )
    shard = vs.vocab_shard(logits.shape[-1], tp_group=tp_group, vocab_size=vocab_size, vocab_start=vocab_start)
    flat_labels, counted = vs.counted_tokens(
        labels, vocab_size=shard.vocab_size, ignore_index=ignore_index, loss_mask=loss_mask
    )
    backend = select_backend(impl, logits.device)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _TokenLoss.apply(logits, flat_labels, counted, shard, tp_group, backend)
    return _forward(logits.detach(), flat_labels, counted, shard, tp_group, backend)[0]


def reference_token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """The plain definition in float64, for tests: unsharded logits [..., V] to [...] float64, differentiable."""
    counted = labels != ignore_index
    if loss_mask is not None:
        counted = counted & (loss_mask != 0)
    # Out of the way before the softmax: 0 * NaN of a masked row would be NaN in the gradient.
    x = logits.double()[..., :vocab_size].masked_fill(~counted.unsqueeze(-1), 0.0)
    log_probability = torch.log_softmax(x, dim=-1).gather(-1, labels.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, -log_probability, 0.0)


class Backend(Protocol):
    """What an implementation provides: see `TorchBackend` for the meaning of the arguments."""

    @staticmethod
    def statistics(x: Tensor, labels: Tensor, counted: Tensor, shard: vs.VocabShard) -> Tensor: ...

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
    ) -> None: ...


class TorchBackend:
    """Row statistics and gradient of one shard in plain torch operations."""

    @staticmethod
    def statistics(x: Tensor, labels: Tensor, counted: Tensor, shard: vs.VocabShard) -> Tensor:
        """Reduces the valid columns of x [T, V] to [3, T] float32; rows that do not count are not read."""
        out = vs.new_statistics(x.shape[0], x.device)
        if shard.columns == 0:
            return out
        buffer, blocks = _blocks(x, counted, shard.columns)
        for rows in blocks:
            block = x[rows, : shard.columns]  # a view for a slice, a copy for an index
            work = buffer[: block.shape[0]]
            if block.dtype != torch.float32:
                block = work.copy_(block)
            # A row of -inf only (all of these columns masked by the model) must not become (-inf) - (-inf).
            maximum = block.amax(-1).clamp_(min=torch.finfo(torch.float32).min)
            torch.sub(block, maximum.unsqueeze(-1), out=work)
            out[vs.MAXIMUM, rows] = maximum
            out[vs.TOTAL, rows] = work.exp_().sum(-1)
        owned, column = _owned_labels(labels, counted, shard)
        out[vs.TARGET, owned] = x[owned, column].float()
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
        """Writes the gradient of x [T, V] to ``out``, which may be x itself.

        Args:
            maximum: [T] float32, M.
            row_scale: [T] float32, g / S.
            label_gradient: [T] float32, the gradient at the label.
        """
        if shard.columns < x.shape[1]:
            out[:, shard.columns :].zero_()
        if shard.columns == 0:
            return
        out.index_fill_(0, (~counted).nonzero().squeeze(-1), 0.0)
        buffer, blocks = _blocks(x, counted, shard.columns)
        for rows in blocks:
            block = x[rows, : shard.columns]
            direct = x.dtype == torch.float32 and isinstance(rows, slice)
            work = out[rows, : shard.columns] if direct else buffer[: block.shape[0]]
            if block.dtype != torch.float32:
                block = work.copy_(block)
            torch.sub(block, maximum[rows].unsqueeze(-1), out=work)
            work.exp_().mul_(row_scale[rows].unsqueeze(-1))
            if not direct:
                out[rows, : shard.columns] = work.to(out.dtype) if isinstance(rows, Tensor) else work
        owned, column = _owned_labels(labels, counted, shard)
        out[owned, column] = label_gradient[owned].to(out.dtype)


def _blocks(x: Tensor, counted: Tensor, columns: int) -> tuple[Tensor, Iterator[slice | Tensor]]:
    """A float32 buffer [R, columns], and the counted rows in blocks of at most R: a slice or an index."""
    elements = _BUFFER_ELEMENTS.get(x.device.type, _BUFFER_ELEMENTS_ELSEWHERE)
    if x.device.type == "cpu":
        elements *= min(torch.get_num_threads(), _BUFFER_THREADS)
    block_rows = max(1, min(elements // columns, x.shape[0]))
    index = counted.nonzero().squeeze(-1)
    count = index.shape[0]

    def blocks() -> Iterator[slice | Tensor]:
        first_rows, last_rows = index[::block_rows].tolist(), index[block_rows - 1 :: block_rows].tolist()
        if len(last_rows) < len(first_rows):
            last_rows.append(int(index[-1]))
        for number, (first, last) in enumerate(zip(first_rows, last_rows, strict=True)):
            begin = number * block_rows
            end = min(begin + block_rows, count)
            yield slice(first, last + 1) if last - first == end - begin - 1 else index[begin:end]

    buffer = torch.empty(min(block_rows, count), columns, dtype=torch.float32, device=x.device)
    return buffer, blocks()


def _owned_labels(labels: Tensor, counted: Tensor, shard: vs.VocabShard) -> tuple[Tensor, Tensor]:
    """Counted rows whose label is in this shard, and the label's local column."""
    column = labels - shard.start
    owned = (counted & (column >= 0) & (column < shard.columns)).nonzero().squeeze(-1)
    return owned, column[owned]


def select_backend(impl: str, device: torch.device) -> type[Backend]:
    """The implementation by its public name; "auto" by device. ValueError where there is no such or it cannot run."""
    installed = importlib.util.find_spec("triton") is not None
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and installed else "torch"
    if impl == "torch":
        return TorchBackend
    if impl == "triton":
        if not installed:
            raise ValueError("impl: found 'triton'; expected 'torch', as the package triton is not installed")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"impl: found 'triton' for tensors on {device}; expected 'torch', or TRITON_INTERPRET=1")
        from remit_megatron.kernels.token_loss_triton import TritonBackend

        return TritonBackend
    raise ValueError(f"impl: found {impl!r}; expected 'auto', 'torch' or 'triton'")


def _forward(
    logits: Tensor,
    labels: Tensor,
    counted: Tensor,
    shard: vs.VocabShard,
    tp_group: dist.ProcessGroup | None,
    backend: type[Backend],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss in the shape of the leading axes, maximum [T] and total [T]."""
    statistics = backend.statistics(logits.view(len(labels), logits.shape[-1]), labels, counted, shard)
    loss, maximum, total = vs.combine_statistics(statistics, counted, tp_group)
    return loss.view(logits.shape[:-1]), maximum, total


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        counted: Tensor,
        shard: vs.VocabShard,
        tp_group: dist.ProcessGroup | None,
        backend: type[Backend],
    ) -> Tensor:
        ctx.shard, ctx.backend, ctx.in_place, ctx.done = shard, backend, not logits.is_leaf, False
        loss, maximum, total = _forward(logits, labels, counted, shard, tp_group, backend)
        ctx.save_for_backward(logits, labels, counted, loss, maximum, total)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only under create_graph=True
            raise RuntimeError(
                "token_loss: found backward with create_graph=True; expected one without (no double backward)"
            )
        if ctx.done:
            raise RuntimeError(
                "token_loss: found a second backward; expected one (it overwrites the logits with their gradient)"
            )
        logits, labels, counted, loss, maximum, total = ctx.saved_tensors
        ctx.done = ctx.in_place
        incoming = grad_outputs[0].reshape(-1).float()
        x = logits.view(len(labels), logits.shape[-1])
        gradient = logits if ctx.in_place else torch.empty_like(logits)
        ctx.backend.gradient(
            x,
            x if ctx.in_place else gradient.view_as(x),
            labels,
            counted,
            ctx.shard,
            maximum=maximum,
            row_scale=incoming / total,
            label_gradient=incoming * torch.expm1(-loss.view(-1)),
        )
        return gradient, None, None, None, None, None
