"""Documents as packed sequences: how Transformer Engine's attention is told what belongs together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def document_boundaries(document_ids: Tensor) -> Tensor:
    """Where documents begin in the sequences of a microbatch laid end to end.

    Args:
        document_ids: [b, s] integers, equal within a document, never decreasing along a sequence.

    Returns:
        [n + 1] int32: the positions in b * s tokens where each of the n pieces begins, and b * s. Every sequence begins
        a piece, also where the first document of the next sequence has the same number.
    """
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero().squeeze(1)
    return torch.cat((starts, starts.new_tensor([document_ids.numel()]))).to(torch.int32)


def packed_sequences(document_ids: Tensor, device: torch.device | None = None) -> PackedSeqParams:
    """Megatron's description of a microbatch whose sequences have been laid end to end ([1, b * s] tokens).

    The longest piece is a number of the host, as Transformer Engine wants it. From ids on the CPU, as a data loader has
    them, nothing waits for a GPU.

    Args:
        document_ids: see :func:`document_boundaries`.
        device: of the model; default: where the ids are.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    boundaries = document_boundaries(document_ids)
    longest = int((boundaries[1:] - boundaries[:-1]).max())
    if device is not None and device != boundaries.device:
        pinned = boundaries.pin_memory() if device.type == "cuda" else boundaries
        boundaries = pinned.to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pad_between_seqs=False,  # else Transformer Engine may compare boundaries to find out
    )
