"""Packed documents for Transformer Engine, which takes boundaries where our own attention takes a mask."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import pad


def packed_sequences(document_ids: Tensor) -> PackedSeqParams:
    """Boundaries of the documents of a microbatch whose rows are laid end to end, [b, s] -> [1, b s].

    Args:
        document_ids: [b, s] integers, equal within a document; a new row always begins a new document.

    Returns:
        ``thd`` parameters for GPTModel. Positions then count from each document's start, which rotary embeddings do not
        notice within a document.
    """
    rows, length = document_ids.shape
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    boundaries = pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=rows * length).to(torch.int32)
    longest = int(boundaries.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
