"""Output layer and weighted loss together, a few whole sequences at a time: a microbatch's logits never exist.

Legend: b sequences (all leading axes flattened), s tokens of each, h hidden size, V rows of this rank's shard of the
output weight, w the weight of a token in the loss, g the incoming gradient of the loss (one number).

For each chunk of sequences

    logits = hidden @ weight.T                               in one buffer, which the next chunk overwrites
    L, softmax statistics                                    as `token_loss`: one read, one collective
    loss += weighting(L), w = d loss / d L                   whatever the caller makes of whole sequences
    logits <- w * (softmax - label)                          in place
    d hidden = logits @ weight,  d weight += logits.T @ hidden

all in forward, where the logits are at hand; backward multiplies both gradients by g, which is right because the loss
is linear in g. Nothing is computed twice: three products, as with logits. What is kept from forward to backward is
what backward returns, [b, s, h] and [V, h].

The chunks are whole sequences since a token's weight may depend on all losses of its sequence, and these are known
only when all its logits have been.

The gradient of the hidden states is a sum over the shards of the vocabulary. It is taken here, as Megatron's
``ColumnParallelLinear`` does, with one all-reduce for a chunk, which runs beside the products of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.kernels import vocab_shard as vs
from remit_megatron.kernels.token_loss import Backend, Impl, select_backend

Weighting = Callable[[Tensor, slice], Tensor]

# Bytes of one chunk's logits, where a sequence does not take more: a thousand tokens and more, since every chunk costs
# a pass over the gradient of the weight beside its products.
_CHUNK_BYTES = 256 << 20
# Bytes of one product on its way into the gradient of the weight, where that is kept in another dtype.
_PRODUCT_BYTES = 16 << 20


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weighting: Weighting,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    chunk_sequences: int | None = None,
    ignore_index: int = -100,
    loss_mask: Tensor | None = None,
    reduce_hidden_grad: bool = True,
    weight_grad_dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum of ``weighting`` over chunks of whole sequences, of the labels' losses under softmax(hidden @ weight.T).

    The logits are rounded to the dtype of ``hidden`` and so are their gradients, as a model's are. Without gradients
    (``torch.no_grad``, or neither input needs one) only the losses are computed. The hidden states must be finite,
    those of masked tokens included: 0 times NaN is NaN in a product.

    Args:
        hidden: [..., s, h] float32 or bfloat16, final hidden states after the last norm; equal on all ranks of
            ``tp_group`` (gathered before, where the model runs sequence parallel). Any strides: Megatron's [s, b, h] is
            passed as ``hidden.transpose(0, 1)``. float16 is refused: its gradients need the loss scale, which is
            known in backward only.
        weight: [V, h] this rank's rows of the output (or tied embedding) weight, in the dtype of ``hidden``.
        labels: [..., s] int64, global token ids, equal on all ranks of ``tp_group``.
        weighting: called once for each chunk, in order, as ``weighting(losses, sequences)`` with [c, s] float32
            natural-logarithm losses (0 where a token does not count) and the slice of the b sequences that they are;
            gives a [] sum. Its gradient by the losses is each token's weight. It runs once, in forward, with gradients
            enabled if any is wanted; what it returns must not depend on ``hidden`` or ``weight`` but through
            the losses. Under context parallelism it may use collectives, as ranks have equally many chunks.
        tp_group: ranks that hold the vocabulary, in rank order; None for one rank.
        vocab_size: true size of the vocabulary; rows of the weight from there on are padding, enter no softmax and get
            gradient 0. Default: all rows count.
        vocab_start: global id of this rank's first row, for shards of unequal height. Default: equal shards.
        chunk_sequences: sequences whose logits exist at once, 1 or more. Default: as many as fit 256 MiB of logits, and
            at least one.
        ignore_index: tokens with this label get loss 0 and gradient 0.
        loss_mask: [..., s] any dtype; tokens with 0 get loss 0 and gradient 0. It does not scale.
        reduce_hidden_grad: sum the gradient of ``hidden`` over ``tp_group``. False where what made ``hidden`` does it
            in its own backward, such as sequence parallelism's gather (all-gather forward, reduce-scatter backward).
        weight_grad_dtype: dtype in which the gradient of the weight is added up over the chunks: float32, or that of
            the weight, which halves the buffer and rounds once more with each chunk. Autograd gets it in the dtype
            of the weight: the two exist side by side at the end of backward. With a single chunk nothing is added up.
        impl: as in `token_loss`.

    Returns:
        [] float32 sum, differentiable; and [..., s] float32 losses, without gradient.

    Raises:
        ValueError: a dtype, shape, label or setting is wrong, or ``weighting`` gave no scalar (labels of a GPU: see
            `token_loss`).
        RuntimeError: backward with ``create_graph=True``, or a second backward.
    """
    _check(hidden, weight, labels, chunk_sequences, weight_grad_dtype)
    shard = vs.vocab_shard(weight.shape[0], tp_group=tp_group, vocab_size=vocab_size, vocab_start=vocab_start)
    flat_labels, counted = vs.counted_tokens(
        labels, vocab_size=shard.vocab_size, ignore_index=ignore_index, loss_mask=loss_mask
    )
    length = labels.shape[-1]
    sequence_bytes = max(1, length * shard.columns * hidden.element_size())
    problem = _Problem(
        labels=flat_labels.view(-1, length) if length else flat_labels.view(0, 0),
        counted=counted.view(-1, length) if length else counted.view(0, 0),
        weighting=weighting,
        shard=shard,
        group=tp_group,
        backend=select_backend(impl, hidden.device),
        chunk=chunk_sequences or max(1, _CHUNK_BYTES // sequence_bytes),
        reduce=reduce_hidden_grad and vs.group_size(tp_group) > 1,
        weight_grad_dtype=weight_grad_dtype,
    )
    sequences = hidden.reshape(*problem.labels.shape, hidden.shape[-1])
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss_sum, losses = _LinearTokenLoss.apply(sequences, weight, problem)
    else:
        loss_sum, losses = _run(sequences.detach(), weight.detach(), problem, None)
    return loss_sum, losses.view(labels.shape)


@dataclass(frozen=True)
class _Problem:
    """Everything but hidden states and weight."""

    labels: Tensor  # [b, s]
    counted: Tensor  # [b, s]
    weighting: Weighting
    shard: vs.VocabShard
    group: dist.ProcessGroup | None
    backend: type[Backend]
    chunk: int  # sequences
    reduce: bool
    weight_grad_dtype: torch.dtype

    def chunks(self) -> Iterator[slice]:
        total = self.labels.shape[0]
        return (slice(first, min(first + self.chunk, total)) for first in range(0, total, self.chunk))


class _Gradients:
    """The gradients that are wanted, filled chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, problem: _Problem, *, of_hidden: bool, of_weight: bool):
        columns = problem.shard.columns
        self._weight, self._problem = weight[:columns], problem
        # Contiguous whatever the strides of `hidden`: a chunk of it is then one matrix.
        self.hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if of_hidden else None
        self.weight: Tensor | None = None
        if of_weight:
            # Nothing is added up over a single chunk: its product is the gradient.
            dtype = weight.dtype if len(problem.labels) <= problem.chunk else problem.weight_grad_dtype
            self.weight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            self.weight[columns if len(problem.labels) else 0 :].zero_()
        self._works: list[Any] = []

    def add(self, sequences: slice, rows: Tensor, logits_grad: Tensor) -> None:
        """One chunk: its hidden states [c * s, h] and the gradient of its logits [c * s, columns]."""
        if self.hidden is not None:
            part = torch.mm(logits_grad, self._weight, out=self.hidden[sequences].view(rows.shape))
            if self._problem.reduce:
                self._works.append(dist.all_reduce(part, group=self._problem.group, async_op=True))
        if self.weight is not None:
            total = self.weight[: self._problem.shard.columns]
            self._add_to_weight(total, rows, logits_grad, first_chunk=sequences.start == 0)

    @staticmethod
    def _add_to_weight(total: Tensor, rows: Tensor, logits_grad: Tensor, *, first_chunk: bool) -> None:
        if total.dtype == rows.dtype and first_chunk:
            torch.mm(logits_grad.t(), rows, out=total)
        elif total.dtype == rows.dtype:
            total.addmm_(logits_grad.t(), rows)
        else:
            step = max(1, _PRODUCT_BYTES // (rows.shape[1] * rows.element_size()))
            for first in range(0, total.shape[0], step):
                part = total[first : first + step]
                product = torch.mm(logits_grad[:, first : first + step].t(), rows)
                part.copy_(product) if first_chunk else part.add_(product)

    def finish(self) -> None:
        """Waits for what the chunks have begun."""
        for work in self._works:
            work.wait()
        self._works.clear()


def _run(hidden: Tensor, weight: Tensor, problem: _Problem, gradients: _Gradients | None) -> tuple[Tensor, Tensor]:
    """Loss [] and losses [b, s] of hidden [b, s, h]; fills ``gradients``."""
    count, length = problem.labels.shape
    losses = torch.zeros(count, length, dtype=torch.float32, device=hidden.device)
    sums = []
    columns = problem.shard.columns
    projection = weight[:columns].t()
    buffer = hidden.new_empty(min(problem.chunk, count) * length, columns)
    for sequences in problem.chunks():
        rows = hidden[sequences].reshape(-1, hidden.shape[-1])
        labels, counted = problem.labels[sequences].reshape(-1), problem.counted[sequences].reshape(-1)
        shard = problem.shard
        logits = torch.mm(rows, projection, out=buffer[: rows.shape[0]])
        statistics = problem.backend.statistics(logits, labels, counted, shard)
        loss, maximum, total = vs.combine_statistics(statistics, counted, problem.group)
        losses[sequences] = loss.view(-1, length)
        loss_sum, incoming = _apply(problem.weighting, losses[sequences], sequences, gradients is not None)
        sums.append(loss_sum)
        if gradients is None:
            continue
        incoming = incoming.reshape(-1)
        problem.backend.gradient(
            logits,
            logits,
            labels,
            counted,
            shard,
            maximum=maximum,
            row_scale=incoming / total,
            label_gradient=incoming * torch.expm1(-loss),
        )
        gradients.add(sequences, rows, logits)
    if gradients is not None:
        gradients.finish()
    return torch.stack(sums).sum() if sums else losses.sum(), losses


def _apply(weighting: Weighting, losses: Tensor, sequences: slice, differentiate: bool) -> tuple[Tensor, Tensor]:
    """The chunk's sum [] float32, and its gradient by the losses [c, s] float32 (zeros where none is wanted)."""
    with torch.set_grad_enabled(differentiate):
        leaf = losses.clone().requires_grad_(differentiate)
        loss_sum = weighting(leaf, sequences)
        if not isinstance(loss_sum, Tensor) or loss_sum.ndim != 0:
            found = f"shape {tuple(loss_sum.shape)}" if isinstance(loss_sum, Tensor) else type(loss_sum).__name__
            raise ValueError(f"weighting: found {found}; expected a tensor of shape ()")
        if not loss_sum.requires_grad:  # a constant, of no token that counts
            return loss_sum.float(), torch.zeros_like(losses)
        (incoming,) = torch.autograd.grad(loss_sum, leaf, allow_unused=True, materialize_grads=True)
    return loss_sum.detach().float(), incoming.float()


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        gradients = _Gradients(hidden, weight, problem, of_hidden=of_hidden, of_weight=of_weight)
        loss_sum, losses = _run(hidden, weight, problem, gradients)
        ctx.gradients, ctx.weight_dtype = (gradients.hidden, gradients.weight), weight.dtype
        ctx.mark_non_differentiable(losses)
        return loss_sum, losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only under create_graph=True
            raise RuntimeError(
                "linear_token_loss: found backward with create_graph=True; expected one without (no double backward)"
            )
        if ctx.gradients is None:
            raise RuntimeError("linear_token_loss: found a second backward; expected one (it gives its gradients away)")
        (of_hidden, of_weight), ctx.gradients = ctx.gradients, None
        incoming = grad_outputs[0]
        # On a GPU to look at the number would be to wait for it.
        if incoming.device.type != "cpu" or incoming != 1:
            for gradient in (of_hidden, of_weight):
                if gradient is not None:
                    gradient.mul_(incoming)
        return of_hidden, None if of_weight is None else of_weight.to(ctx.weight_dtype), None


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_sequences: int | None, weight_grad_dtype: torch.dtype
) -> None:
    if hidden.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden, weight: found {hidden.dtype}, {weight.dtype}; expected the same one of float32, bfloat16"
        )
    if hidden.ndim < 2 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden, weight: found shapes {tuple(hidden.shape)}, {tuple(weight.shape)}; expected [..., s, h], [V, h]"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: found shape {tuple(labels.shape)}; expected {tuple(hidden.shape[:-1])}, as hidden")
    if chunk_sequences is not None and chunk_sequences < 1:
        raise ValueError(f"chunk_sequences: found {chunk_sequences}; expected at least 1")
    if weight_grad_dtype not in (torch.float32, weight.dtype):
        raise ValueError(f"weight_grad_dtype: found {weight_grad_dtype}; expected torch.float32 or {weight.dtype}")
