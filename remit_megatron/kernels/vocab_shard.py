"""The vocabulary over tensor-parallel ranks: who owns which columns, and how statistics of the shards become a loss.

Legend: T tokens (all leading axes flattened), V columns of this rank's shard, tp ranks of the tensor-parallel group.

Every rank reduces its own columns to three numbers per token,

    maximum = max_v x[t, v]     total = sum_v exp(x[t, v] - maximum)     target = x[t, label], or 0 if that is not ours

and these, 12 bytes a token, are all that travels. A maximum and a sum cannot share an all-reduce, and the usual way
out (all-reduce the maximum, then all-reduce the sums taken against it) needs two dependent collectives and holds the
second pass over the logits back until the first has arrived. One all-gather of [tp, 3, T] carries the same
information at once: each rank rescales the totals to the common maximum itself. All ranks combine the same numbers in
the same order, so their losses are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

MAXIMUM, TOTAL, TARGET = 0, 1, 2  # rows of the statistics
_LOWEST = torch.finfo(torch.float32).min  # in place of -inf: (-inf) - (-inf) is NaN


@dataclass(frozen=True)
class VocabShard:
    """The columns of one rank: local column j is token id ``start + j``; from ``columns`` on they are padding."""

    start: int
    columns: int
    vocab_size: int


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of a process group; None stands for a group of this process alone."""
    return 1 if group is None else dist.get_world_size(group)


def vocab_shard(
    width: int, *, tp_group: dist.ProcessGroup | None, vocab_size: int | None, vocab_start: int | None = None
) -> VocabShard:
    """Describes this rank's shard.

    Args:
        width: columns that the shard has in memory, padding included.
        tp_group: ranks that hold the vocabulary together, in order; None for one rank.
        vocab_size: true size of the vocabulary; None if no column of any shard is padding.
        vocab_start: global id of the first column; None for equal shards in rank order.

    Raises:
        ValueError: the shards cannot hold the vocabulary.
    """
    size = group_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    if vocab_start is None:
        start = rank * width
        if vocab_size is None:
            vocab_size = size * width
        elif not 0 < vocab_size <= size * width:
            raise ValueError(f"vocab_size: found {vocab_size}; expected 1 to {size * width} ({size} shards of {width})")
    else:
        start = vocab_start
        if vocab_size is None:
            raise ValueError("vocab_size: found None; expected the size of the vocabulary, as vocab_start is given")
    return VocabShard(start=start, columns=min(max(vocab_size - start, 0), width), vocab_size=vocab_size)


def counted_tokens(
    labels: Tensor, *, vocab_size: int, ignore_index: int | None, loss_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Flattens the labels and tells which tokens count.

    On the CPU a bad label raises here. On another device the check is queued with the other work and does not wait
    for it: a bad label stops the process with a device-side assertion that carries the same text, at the next
    synchronization.

    Args:
        labels: [...] int64 global token ids.
        vocab_size: labels of counted tokens must lie in [0, vocab_size).
        ignore_index: label of tokens that do not count; None if there is no such label.
        loss_mask: [...] any dtype, 0 where a token does not count, or None.

    Returns:
        labels [T] int64 and counted [T] bool.

    Raises:
        ValueError: dtype or shape is wrong, or a counted label is out of range (CPU).
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: found {labels.dtype}; expected torch.int64")
    flat_labels = labels.reshape(-1)
    counted = torch.ones_like(flat_labels, dtype=torch.bool) if ignore_index is None else flat_labels != ignore_index
    if loss_mask is not None:
        if loss_mask.shape != labels.shape:
            raise ValueError(f"loss_mask: found shape {tuple(loss_mask.shape)}; expected {tuple(labels.shape)}")
        counted &= loss_mask.reshape(-1) != 0
    bad = counted & ((flat_labels < 0) | (flat_labels >= vocab_size))
    expected = f"expected 0 to {vocab_size - 1}"
    if ignore_index is not None:
        expected += f", or {ignore_index} for a token that does not count"
    if labels.device.type == "cpu":
        if bool(bad.any()):
            position = int(bad.nonzero()[0, 0])
            raise ValueError(f"labels: found {int(flat_labels[position])} at flat position {position}; {expected}")
    else:
        torch.ops.aten._assert_async.msg(~bad.any(), f"labels: found a token id out of range; {expected}")
    return flat_labels, counted


def equal_chunk(tokens: int, at_most: int) -> int:
    """Size of the chunks into which tokens are cut: as few chunks as ``at_most`` allows, all but equally large.

    A last chunk of a few rows would read the whole output weight for them. Multiples of 128 rows fill the tiles of a
    matrix product, where chunks are that large.
    """
    at_most = max(1, at_most)
    if at_most >= 128:
        at_most -= at_most % 128
    size = -(-tokens // max(1, -(-tokens // at_most)))
    return max(1, min(-(-size // 128) * 128, at_most) if at_most >= 128 else size)


def new_statistics(tokens: int, device: torch.device) -> Tensor:
    """[3, T] float32 statistics of a shard without columns, which is also what rows that are never read keep."""
    statistics = torch.zeros(3, tokens, dtype=torch.float32, device=device)
    statistics[MAXIMUM] = _LOWEST
    return statistics


def combine_statistics(
    statistics: Tensor, counted: Tensor, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes the loss from the shards' statistics; the only collective of the whole computation.

    Args:
        statistics: [3, T] float32 of this rank's columns.
        counted: [T] bool, equal on all ranks.
        tp_group: None for one rank.

    Returns:
        loss [T] (0 where not counted), maximum [T] and total [T] over the whole vocabulary, all float32: the softmax is
        ``exp(x - maximum) / total``. Kept as two numbers because their sum, the log-sum-exp, loses digits where
        logits are large.
    """
    size, tokens = group_size(tp_group), statistics.shape[1]
    if size == 1 or tokens == 0:
        maximum, total, target = statistics.unbind(0)
    else:
        gathered = statistics.new_empty(size * 3, tokens)
        dist.all_gather_into_tensor(gathered, statistics, group=tp_group)
        shards = gathered.view(size, 3, tokens)
        maximum = shards[:, MAXIMUM].amax(0)
        # A shard without columns has total 0 and the lowest maximum: 0 * exp(lowest - maximum) is 0, never NaN.
        total = (shards[:, TOTAL] * (shards[:, MAXIMUM] - maximum).exp_()).sum(0)
        target = shards[:, TARGET].sum(0)  # zero on all ranks but the owner of the label
    loss = torch.where(counted, total.log() - (target - maximum), 0.0)
    return loss, maximum, total
