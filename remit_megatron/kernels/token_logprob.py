"""Log-probability of each label from hidden states and the vocabulary-parallel output weight, without gradient.

For the frozen reference, which needs one number per token and nothing else. The logits of a few tokens at a time are
computed, reduced to three numbers per token (`remit_megatron.kernels.vocab_shard`) and overwritten by those of the
next few; the ranks exchange these numbers once, after the last block. So the logits are never gathered, and memory is
that of one block, however long the sequence.

Legend: T tokens (all leading axes flattened), h hidden size, V rows of this rank's shard of the output weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.kernels import vocab_shard as vs
from remit_megatron.kernels.token_loss import Impl, select_backend

# Bytes of one block of logits. Large enough for the matrix product to run at its full rate, small beside the
# activations of a layer.
_BLOCK_BYTES = {"cpu": 32 << 20}
_BLOCK_BYTES_ELSEWHERE = 256 << 20


@torch.no_grad()
def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    loss_mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """log p(label), in nats, of the distribution softmax(hidden @ weight.T).

    The products are rounded to the dtype of ``hidden``, as the logits of a model are; everything after them is float32.

    Args:
        hidden: [..., h] final hidden states, after the last norm; equal on all ranks of ``tp_group`` (gathered
            before, where the model runs sequence parallel).
        weight: [V, h] this rank's rows of the output (or tied embedding) weight, in the dtype of ``hidden``.
        labels: [...] int64, global token ids, equal on all ranks of ``tp_group``.
        tp_group: ranks that hold the vocabulary, in rank order; None for one rank.
        vocab_size: true size of the vocabulary; rows of the weight from there on are padding and are left out.
            Default: all rows count.
        vocab_start: global id of this rank's first row, for shards of unequal height. Default: equal shards.
        chunk_tokens: tokens whose logits exist at once. Extra memory is at most ``chunk_tokens * V`` logits, as many
            hidden states, and what `token_loss` needs. Default: as many as fit 32 MiB of logits on a CPU, 256 MiB
            elsewhere.
        ignore_index: tokens with this label get 0. On a CPU they cost nothing.
        loss_mask: [...] any dtype; tokens with 0 get 0, likewise.
        impl: as in `token_loss`.

    Returns:
        [...] float32, without gradient.

    Raises:
        ValueError: a dtype, shape or label is wrong; on labels of a GPU see `token_loss`.
    """
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden, weight: found {hidden.dtype}, {weight.dtype}; expected the same one of float32, bfloat16, float16"
        )
    if hidden.ndim == 0 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: found shape {tuple(weight.shape)}; expected [V, {hidden.shape[-1]}]")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: found shape {tuple(labels.shape)}; expected {tuple(hidden.shape[:-1])}, as hidden")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: found {chunk_tokens}; expected at least 1")
    shard = vs.vocab_shard(weight.shape[0], tp_group=tp_group, vocab_size=vocab_size, vocab_start=vocab_start)
    flat_labels, counted = vs.counted_tokens(
        labels, vocab_size=shard.vocab_size, ignore_index=ignore_index, loss_mask=loss_mask
    )
    statistics = vs.new_statistics(flat_labels.shape[0], hidden.device)
    if shard.columns > 0 and flat_labels.shape[0] > 0:
        backend = select_backend(impl, hidden.device)
        flat_hidden, projection = hidden.reshape(-1, hidden.shape[-1]), weight[: shard.columns].t()
        step = min(chunk_tokens or _default_chunk(shard.columns, hidden, len(flat_labels)), len(flat_labels))
        logits = hidden.new_empty(step, shard.columns)
        for part in _parts(counted, step):
            rows = flat_hidden[part]
            block = torch.mm(rows, projection, out=logits[: rows.shape[0]])
            statistics[:, part] = backend.statistics(block, flat_labels[part], counted[part], shard)
    loss, _, _ = vs.combine_statistics(statistics, counted, tp_group)
    return loss.neg_().view(labels.shape)


def _parts(counted: Tensor, step: int) -> list[slice] | tuple[Tensor, ...]:
    """The tokens in parts of at most ``step``: on a CPU those that count; elsewhere all, not to wait for the device."""
    if counted.device.type == "cpu" and not bool(counted.all()):
        return counted.nonzero().squeeze(-1).split(step)
    return [slice(first, first + step) for first in range(0, counted.shape[0], step)]


def _default_chunk(columns: int, hidden: Tensor, tokens: int) -> int:
    budget = _BLOCK_BYTES.get(hidden.device.type, _BLOCK_BYTES_ELSEWHERE)
    return vs.equal_chunk(tokens, budget // (columns * hidden.element_size()))
