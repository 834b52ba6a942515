"""Forward Kullback-Leibler divergence of vocabulary-parallel logits from a reference that is given by hidden states.

Legend: T tokens (all leading axes flattened), V columns of this rank's shard, h the reference's hidden size, x logits
of the student, y of the reference, c the temperature, r the share of next-token prediction, g a token's incoming
gradient, p = softmax over the whole vocabulary.

    kl[t]    = sum_v p(y/c)[v] * (log p(y/c)[v] - log p(x/c)[v])                 natural logarithms
    nll[t]   = -log p(x)[label]
    loss[t]  = (1 - r) * c^2 * kl[t] + r * nll[t]
    dx[t, v] = g[t] * ((1 - r) * c * (p(x/c)[v] - p(y/c)[v]) + r * (p(x)[v] - (v is the label)))

The reference's logits never exist as a whole: those of a few tokens at a time are computed from its final hidden
states, in forward and again in backward (two products with the output weight in place of a buffer as large as the
student's logits). Forward keeps six numbers per token; backward writes the gradient over the student's logits. There
is one collective, in forward: an all-gather of seven numbers per token and rank (`_combine`).

All sums are of values taken against the maxima, and kl is the sum of differences of such values: models that agree
have a divergence of exactly 0, and large logits cost no digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.kernels import vocab_shard as vs
from remit_megatron.kernels.token_loss import Impl, TorchBackend, select_backend

# Bytes of one float32 block; three of them exist at once, and one in the dtype of the hidden states.
_BLOCK_BYTES = {"cpu": 8 << 20}
_BLOCK_BYTES_ELSEWHERE = 64 << 20

_LOWEST = torch.finfo(torch.float32).min
_FLOOR = _LOWEST / 4  # in place of -inf, of which differences would be NaN

# Rows of the statistics of a shard.
_X_MAX, _X_TOTAL, _X_TOTAL_C, _X_LABEL, _Y_MAX, _Y_TOTAL_C, _CROSS = range(7)


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    *,
    temperature: float = 1.0,
    ntp_weight: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    loss_mask: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """(1 - r) c^2 KL(p_ref || p_student) + r NLL of each token, and the NLL beside it, in nats.

    Gradients reach the logits only. As with `token_loss`, backward overwrites the logits with their gradient, unless
    they are an autograd leaf.

    Args:
        logits: [..., V] float32, bfloat16 or float16, contiguous; this rank's columns of the vocabulary.
        labels: [...] int64, global token ids, equal on all ranks of ``tp_group``.
        reference_hidden: [..., h] the reference's final hidden states, after the last norm; equal on all ranks.
        reference_weight: [V, h] this rank's rows of the reference's output weight, in the dtype of the hidden states;
            the reference's logits are rounded to that dtype, as a model's are.
        temperature: c, above 0.
        ntp_weight: r, 0 to 1.
        tp_group: ranks that hold the vocabulary, in rank order; None for one rank.
        vocab_size: true size of the vocabulary. Columns and rows from there on are padding: they enter no softmax and
            get gradient 0. Default: all count.
        vocab_start: global id of this rank's first column, for shards of unequal width. Default: equal shards.
        chunk_tokens: tokens whose reference logits exist at once. Default: as many as fit 8 MiB in float32 on a CPU,
            64 MiB elsewhere.
        ignore_index: tokens with this label get loss 0 and gradient 0.
        loss_mask: [...] any dtype; tokens with 0 get loss 0 and gradient 0, whatever else they hold. It does not scale.
        impl: as in `token_loss`; Triton reads each logit once forward and once backward.

    Returns:
        [...] float32, differentiable; and [...] float32 negative log-likelihood, without gradient.

    Raises:
        ValueError: a dtype, shape, label or setting is wrong (labels of a GPU: see `token_loss`).
        RuntimeError: backward with ``create_graph=True``, or a second backward.
    """
    _check(logits, labels, reference_hidden, reference_weight, temperature, ntp_weight, chunk_tokens)
    shard = vs.vocab_shard(logits.shape[-1], tp_group=tp_group, vocab_size=vocab_size, vocab_start=vocab_start)
    flat_labels, counted = vs.counted_tokens(
        labels, vocab_size=shard.vocab_size, ignore_index=ignore_index, loss_mask=loss_mask
    )
    hidden = reference_hidden.detach().reshape(-1, reference_hidden.shape[-1])
    compiled = select_backend(impl, logits.device) is not TorchBackend
    budget = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES_ELSEWHERE)
    # torch's operations hold float32 blocks, the kernels only the product.
    element = hidden.element_size() if compiled else 4
    step = chunk_tokens or vs.equal_chunk(len(flat_labels), budget // (element * max(shard.columns, 1)))
    problem = _Problem(
        flat_labels,
        counted,
        hidden,
        reference_weight.detach(),
        shard,
        float(temperature),
        float(ntp_weight),
        max(1, min(step, len(flat_labels))),
        compiled,
    )
    loss, nll = _Distillation.apply(logits, problem, tp_group)
    return loss, nll


class _Problem(NamedTuple):
    """Everything about the tokens but the student's logits."""

    labels: Tensor  # [T]
    counted: Tensor  # [T]
    hidden: Tensor  # [T, h]
    weight: Tensor  # [V, h]
    shard: vs.VocabShard
    temperature: float
    ntp_weight: float
    step: int  # tokens of a block
    compiled: bool  # Triton's kernels instead of torch's operations

    def slices(self) -> list[slice]:
        """All tokens in blocks."""
        return [slice(first, first + self.step) for first in range(0, len(self.counted), self.step)]

    def products(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of tokens, each with the reference's logits [R, V] in the dtype of the hidden states; padding has
        some, too. One buffer serves all."""
        buffer = self.hidden.new_empty(self.step, self.weight.shape[0])
        for part in self.slices():
            hidden = self.hidden[part]
            yield part, torch.mm(hidden, self.weight.t(), out=buffer[: len(hidden)])

    def parts(self) -> list[slice] | tuple[Tensor, ...]:
        """The tokens in blocks: on a CPU those that count; elsewhere all of them, not to wait for the device."""
        if self.counted.device.type == "cpu" and not bool(self.counted.all()):
            return self.counted.nonzero().squeeze(-1).split(self.step)
        return self.slices()


class _Blocks:
    """Three float32 buffers [R, columns], and one for products in the dtype of the hidden states."""

    def __init__(self, problem: _Problem):
        self._problem = problem
        columns = problem.shard.columns
        self._projection = problem.weight[:columns].t()
        shape = (problem.step, columns)
        self._x, self._y, self._scratch = (problem.hidden.new_empty(shape, dtype=torch.float32) for _ in range(3))
        self._product = self._y if problem.hidden.dtype == torch.float32 else problem.hidden.new_empty(shape)

    def load(self, x: Tensor, part: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of student and reference of some tokens, and scratch of the same shape; all may be overwritten."""
        source, hidden = x[part, : self._problem.shard.columns], self._problem.hidden[part]
        rows = source.shape[0]
        product = torch.mm(hidden, self._projection, out=self._product[:rows])
        y = self._y[:rows]
        if product.dtype != torch.float32:
            y.copy_(product)
        return self._x[:rows].copy_(source), y, self._scratch[:rows]


def _shard_statistics(x: Tensor, problem: _Problem) -> Tensor:
    """[7, T] float32 of this rank's columns; rows that are never read keep those of a shard without columns."""
    out = torch.zeros(7, len(problem.labels), dtype=torch.float32, device=x.device)
    out[_X_MAX] = out[_Y_MAX] = _LOWEST
    if problem.shard.columns == 0 or len(problem.labels) == 0:
        return out
    c = problem.temperature
    if problem.compiled:
        from remit_megatron.kernels import kl_divergence_triton as kernels

        for part, y in problem.products():
            tokens = (problem.labels[part], problem.counted[part], out[:, part])
            kernels.statistics(x[part], y, *tokens, problem.shard, temperature=c)
        return out
    blocks = _Blocks(problem)
    for part in problem.parts():
        a, b, scratch = blocks.load(x, part)
        column = problem.labels[part] - problem.shard.start
        owned = problem.counted[part] & (column >= 0) & (column < problem.shard.columns)
        label = a.gather(1, column.clamp(0, problem.shard.columns - 1).unsqueeze(1)).squeeze(1)
        out[_X_LABEL, part] = torch.where(owned, label, 0.0)
        x_max, y_max = (logits.amax(1).clamp_(min=_LOWEST) for logits in (a, b))
        out[_X_MAX, part], out[_Y_MAX, part] = x_max, y_max
        out[_X_TOTAL, part] = torch.exp(a.sub_(x_max.unsqueeze(1)), out=scratch).sum(1)
        if c == 1:
            out[_X_TOTAL_C, part] = out[_X_TOTAL, part]
        else:
            out[_X_TOTAL_C, part] = torch.exp(a.div_(c), out=scratch).sum(1)
        torch.exp(b.sub_(y_max.unsqueeze(1)).div_(c), out=scratch)
        out[_Y_TOTAL_C, part] = scratch.sum(1)
        # A logit of -inf in both models must not make (-inf) - (-inf), nor 0 * inf.
        difference = b.clamp_(min=_FLOOR).sub_(a.clamp_(min=_FLOOR))
        out[_CROSS, part] = difference.mul_(scratch).sum(1)
    return out


class _Softmaxes(NamedTuple):
    """What gives the distributions back: exp(x - x_max) / x_total and so on; all [T] float32."""

    x_max: Tensor
    x_total: Tensor
    x_total_c: Tensor
    y_max: Tensor
    y_total_c: Tensor


def _combine(statistics: Tensor, problem: _Problem, group: dist.ProcessGroup | None) -> tuple[Tensor, _Softmaxes]:
    """kl and nll, [2, T] and 0 where not counted, and the softmaxes, from the shards' statistics."""
    size, tokens = vs.group_size(group), statistics.shape[1]
    shards = statistics.unsqueeze(0)
    if size > 1 and tokens > 0:
        gathered = statistics.new_empty(size * 7, tokens)
        dist.all_gather_into_tensor(gathered, statistics, group=group)
        shards = gathered.view(size, 7, tokens)
    c = problem.temperature
    x_max, y_max = shards[:, _X_MAX].amax(0), shards[:, _Y_MAX].amax(0)
    x_below, y_below = shards[:, _X_MAX] - x_max, shards[:, _Y_MAX] - y_max
    # A shard without columns is infinitely far below: the clamp makes 0 * that 0.
    x_below_c, y_below_c = (x_below / c).clamp(min=_FLOOR), (y_below / c).clamp(min=_FLOOR)
    x_total = (shards[:, _X_TOTAL] * x_below.exp()).sum(0)
    x_total_c = (shards[:, _X_TOTAL_C] * x_below_c.exp()).sum(0)
    y_scale = y_below_c.exp()
    y_total_c = (shards[:, _Y_TOTAL_C] * y_scale).sum(0)
    # The differences were taken against each shard's own maxima.
    cross = (y_scale * (shards[:, _CROSS] + shards[:, _Y_TOTAL_C] * (y_below_c - x_below_c))).sum(0)
    kl = cross / y_total_c - (y_total_c / x_total_c).log()
    nll = x_total.log() - (shards[:, _X_LABEL].sum(0) - x_max)
    both = torch.where(problem.counted, torch.stack((kl, nll)), 0.0)
    return both, _Softmaxes(x_max, x_total, x_total_c, y_max, y_total_c)


def _write_gradient(x: Tensor, out: Tensor, incoming: Tensor, problem: _Problem, softmaxes: _Softmaxes) -> None:
    """Writes the gradient of x [T, V] to ``out``, which may be x itself."""
    if problem.compiled and problem.shard.columns > 0 and len(problem.labels) > 0:
        _write_gradient_compiled(x, out, incoming, problem, softmaxes)
        return
    shard, counted, c, r = problem.shard, problem.counted, problem.temperature, problem.ntp_weight
    if shard.columns < x.shape[1]:
        out[:, shard.columns :].zero_()
    if shard.columns == 0 or len(problem.labels) == 0:
        return
    if counted.device.type == "cpu":
        out.index_fill_(0, (~counted).nonzero().squeeze(-1), 0.0)
    g = torch.where(counted, incoming, 0.0)
    kl_scale, nll_scale = g * ((1 - r) * c), g * r
    blocks = _Blocks(problem)
    for part in problem.parts():
        a, b, scratch = blocks.load(x, part)
        x_max, x_total, x_total_c, y_max, y_total_c = (t[part].unsqueeze(1) for t in softmaxes)
        kl_row, nll_row = kl_scale[part].unsqueeze(1), nll_scale[part].unsqueeze(1)
        a.sub_(x_max)
        if r > 0 and c != 1:
            torch.exp(a, out=scratch).mul_(nll_row / x_total)
            a.div_(c).exp_().mul_(kl_row / x_total_c).add_(scratch)
        else:  # one softmax serves both terms
            a.div_(c).exp_().mul_((kl_row + nll_row) / x_total_c)
        b.sub_(y_max).div_(c).exp_().mul_(kl_row / y_total_c)
        a.sub_(b)
        if r > 0:
            column = (problem.labels[part] - shard.start).unsqueeze(1)
            owned = (column >= 0) & (column < shard.columns)
            a.scatter_add_(1, column.clamp(0, shard.columns - 1), torch.where(owned, -nll_row, 0.0))
        if isinstance(part, slice):
            a.masked_fill_(~counted[part].unsqueeze(1), 0.0)
        out[part, : shard.columns] = a.to(out.dtype)


def _write_gradient_compiled(
    x: Tensor, out: Tensor, incoming: Tensor, problem: _Problem, softmaxes: _Softmaxes
) -> None:
    from remit_megatron.kernels import kl_divergence_triton as kernels

    c, r = problem.temperature, problem.ntp_weight
    g = torch.where(problem.counted, incoming, 0.0)
    kl, nll = g * ((1 - r) * c), g * r
    x_max, x_total, x_total_c, y_max, y_total_c = softmaxes
    # Without a temperature one softmax serves both terms.
    of_student = (kl + nll) / x_total if c == 1 else kl / x_total_c
    rows = torch.stack((x_max, y_max, of_student, kl / y_total_c, nll / x_total, nll))
    for part, y in problem.products():
        tokens = (problem.labels[part], problem.counted[part], rows[:, part])
        kernels.gradient(x[part], y, out[part], *tokens, problem.shard, temperature=c)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, problem: _Problem, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        statistics = _shard_statistics(logits.detach().view(len(problem.labels), -1), problem)
        (kl, nll), softmaxes = _combine(statistics, problem, group)
        c, r = problem.temperature, problem.ntp_weight
        loss = (1 - r) * c * c * kl + r * nll
        ctx.in_place, ctx.done, ctx.problem = not logits.is_leaf, False, problem
        ctx.save_for_backward(logits, *softmaxes)
        loss, nll = loss.view(logits.shape[:-1]), nll.view(logits.shape[:-1])
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only under create_graph=True
            raise RuntimeError(
                "distillation_loss: found backward with create_graph=True; expected one without (no double backward)"
            )
        if ctx.done:
            raise RuntimeError(
                "distillation_loss: found a second backward; expected one (it overwrites the logits with their"
                " gradient)"
            )
        logits, *softmaxes = ctx.saved_tensors
        ctx.done = ctx.in_place
        gradient = logits if ctx.in_place else torch.empty_like(logits)
        x = logits.detach().view(len(ctx.problem.labels), -1)
        incoming = grad_outputs[0].reshape(-1).float()
        _write_gradient(x, gradient.view_as(x), incoming, ctx.problem, _Softmaxes(*softmaxes))
        return gradient, None, None


def _check(
    logits: Tensor,
    labels: Tensor,
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    ntp_weight: float,
    chunk_tokens: int | None,
) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if logits.dtype not in floats:
        raise ValueError(f"logits: found {logits.dtype}; expected torch.float32, torch.bfloat16 or torch.float16")
    if hidden.dtype not in floats or weight.dtype != hidden.dtype:
        raise ValueError(
            f"reference_hidden, reference_weight: found {hidden.dtype}, {weight.dtype}; expected the same one of"
            " float32, bfloat16, float16"
        )
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: found shape {tuple(labels.shape)}; expected {tuple(logits.shape[:-1])}, as logits")
    if not logits.is_contiguous():
        raise ValueError(f"logits: found strides {logits.stride()}; expected a contiguous tensor")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"reference_hidden: found shape {tuple(hidden.shape)}; expected {(*labels.shape, 'h')}")
    if weight.shape != (logits.shape[-1], hidden.shape[-1]):
        expected = (logits.shape[-1], hidden.shape[-1])
        raise ValueError(f"reference_weight: found shape {tuple(weight.shape)}; expected {expected}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: found {temperature}; expected a number above 0")
    if not 0 <= ntp_weight <= 1:
        raise ValueError(f"ntp_weight: found {ntp_weight}; expected a number from 0 to 1")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: found {chunk_tokens}; expected at least 1")
