"""Document boundaries for packed attention."""

from __future__ import annotations

import torch

from remit_megatron.models.batch import document_ids_of
from remit_megatron.models.packing import document_boundaries


def test_every_sequence_and_every_document_begins_a_piece():
    tokens = torch.tensor([[5, 6, 0, 7, 8, 0], [9, 0, 0, 4, 4, 4], [1, 2, 3, 4, 5, 6]])
    boundaries = document_boundaries(document_ids_of(tokens, eod_id=0))
    assert boundaries.tolist() == [0, 3, 6, 8, 9, 12, 18]
    assert boundaries.dtype == torch.int32


def test_one_document_per_sequence():
    assert document_boundaries(torch.zeros(3, 4, dtype=torch.int64)).tolist() == [0, 4, 8, 12]


def test_packed_parameters():
    import patches

    patches.apply()
    from remit_megatron.models.packing import packed_sequences

    packed = packed_sequences(torch.tensor([[0, 0, 1, 1, 1, 2]]))
    assert packed.qkv_format == "thd" and packed.max_seqlen_q == 3
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 2, 5, 6]
