"""The largest values of a distributed set, exactly, with ties broken by position.

A token's value (float32) and its place in the batch make one integer of 63 bits,

    key = (bits of the value, in an order that integers share) * 2^31 + (2^31 - 1 - order)

so that keys never repeat, the larger value has the larger key, and of equal values the earlier token has. "The k
largest" then means exactly k tokens, the same ones however the batch is spread over ranks and microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

ORDER_LIMIT = 1 << 31  # tokens that can be told apart
_DIGIT_BITS = 16
_NOT_VALID = -1  # below every key


def selection_keys(values: Tensor, order: Tensor, valid: Tensor) -> Tensor:
    """Keys as described above.

    Args:
        values: float32; NaN ranks with +inf, so that it is selected and shows, rather than being left out in silence.
        order: int64 of the same shape, 0 to ``ORDER_LIMIT`` - 1, without repetition.
        valid: bool of the same shape; others get the key -1, below all.
    """
    values = torch.where(values.isnan(), torch.inf, values.float()) + 0.0  # + 0: -0 and 0 are one value
    bits = values.view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits + ORDER_LIMIT, -1 - bits)
    return torch.where(valid, ordered * ORDER_LIMIT + (ORDER_LIMIT - 1 - order), _NOT_VALID)


def kept_count(valid: Tensor, share: float) -> Tensor:
    """How many of ``valid`` tokens (int64) a share keeps: rounded, half up, and at least one of any."""
    return (valid.double() * share + 0.5).floor().long().clamp(min=1).minimum(valid)


def select_rows(keys: Tensor, share: float, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Selects the largest keys of each row.

    Args:
        keys: [rows, n] of :func:`selection_keys`.
        share: share of a row's valid keys that is kept.
        group: ranks that hold other parts of the same rows, equally many keys each, or None; one all-gather.

    Returns:
        [rows, n] bool.
    """
    whole = keys
    if group is not None and dist.get_world_size(group) > 1:
        rows, width = keys.shape
        gathered = keys.new_empty(dist.get_world_size(group) * rows, width)
        dist.all_gather_into_tensor(gathered, keys.contiguous(), group=group)
        whole = gathered.view(-1, rows, width).movedim(0, 1).reshape(rows, -1)
    count = kept_count((whole >= 0).sum(1, keepdim=True), share)
    descending = whole.sort(dim=1, descending=True).values
    threshold = descending.gather(1, (count - 1).clamp(min=0))
    return (keys >= threshold) & (keys >= 0)


def select_global(keys: Sequence[Tensor], share: float, *, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Selects the largest keys of all tensors on all ranks, without gathering them.

    The threshold is found 16 bits at a time: a histogram of the next digit of those keys that agree with the threshold
    so far, added up over the ranks, says which digit the threshold has. Four rounds of an all-reduce of 512 KiB,
    whatever the size of the batch, and no wait for the device.

    Args:
        keys: of :func:`selection_keys`, any shapes, with no key twice on any rank; at least one tensor, which may be
            empty.
        share: share of all valid keys that is kept.
        group: ranks that hold the other keys, or None.

    Returns:
        For each tensor a bool of its shape.
    """
    device = keys[0].device
    prefix = torch.zeros((), dtype=torch.int64, device=device)
    wanted = None
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        histogram = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64, device=device)
        for part in keys:
            flat = part.reshape(-1)
            leading = flat >> shift
            candidate = (flat >= 0) & (leading >> _DIGIT_BITS == prefix)
            histogram.scatter_add_(0, leading & ((1 << _DIGIT_BITS) - 1), candidate.long())
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(histogram, group=group)
        at_least = histogram.flip(0).cumsum(0).flip(0)  # [d]: candidates whose digit is d or larger
        if wanted is None:
            wanted = kept_count(at_least[0], share)
        digit = ((at_least >= wanted).sum() - 1).clamp(min=0)
        wanted = wanted - (at_least[digit] - histogram[digit])
        prefix = prefix * (1 << _DIGIT_BITS) + digit
    return [(part >= prefix) & (part >= 0) for part in keys]
