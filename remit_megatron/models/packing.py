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


def packed_sequences(document_ids: Tensor) -> PackedSeqParams:
    """Megatron's description of a microbatch whose sequences have been laid end to end ([1, b * s] tokens).

    The longest piece is read on the host, as Transformer Engine wants it: one wait for the device per microbatch.

    Args:
        document_ids: see :func:`document_boundaries`.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    boundaries = document_boundaries(document_ids)
    longest = int((boundaries[1:] - boundaries[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
