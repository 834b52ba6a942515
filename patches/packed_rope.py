"""Unfused rotary embeddings of packed sequences in one piece, however many documents there are.

Target    megatron-core 0.19.2, megatron.core.models.common.embeddings.rope_utils._apply_rotary_pos_emb_thd
Why       Megatron rotates one document after the other, and reads their lengths on the host in every layer, twice: 92,
          456 and 1,704 kernel launches for 1, 8 and 32 documents in two layers, and four waits for the device a layer.
          Multi-latent attention (Youtu-LLM) has no fused rotary embedding of its kind, and takes this path with
          Transformer Engine too.
Test      tests/unit/models/test_packed_rope.py::test_operations_do_not_grow_with_documents
Upstream  not reported; the code is the same on main at d98e8a6
Drop when _apply_rotary_pos_emb_thd has neither a loop over documents nor a read on the host

Each token's row of the frequencies is looked up by its position in its document, which is computed on the device and
kept for the layers that follow; the numbers are the same, bit for bit. Context parallelism keeps Megatron's way.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from patches import Patch

# The last boundaries, how many tokens they are of, and the positions: all layers of a microbatch share them.
_last: tuple[weakref.ref[Any], int, Any] | None = None


def document_positions(boundaries: Any, tokens: int) -> Any:
    """[n + 1] int32 boundaries to [tokens] int32, the position of each token in its document. Reads nothing back."""
    import torch

    global _last
    if _last is not None and _last[0]() is boundaries and _last[1] == tokens:
        return _last[2]
    token = torch.arange(tokens, dtype=boundaries.dtype, device=boundaries.device)
    document = torch.searchsorted(boundaries, token, right=True) - 1
    positions = token - boundaries.index_select(0, document)
    _last = (weakref.ref(boundaries), tokens, positions)
    return positions


def _install() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    original = rope_utils._apply_rotary_pos_emb_thd
    rotate = rope_utils._apply_rotary_pos_emb_bshd

    @functools.wraps(original)
    def _apply_rotary_pos_emb_thd(
        t,
        cu_seqlens,
        freqs,
        rotary_interleaved=False,
        mla_rotary_interleaved=False,
        mscale=1.0,
        cp_group=None,
        multi_latent_attention=None,
    ):
        if cp_group is None or cp_group.size() > 1 or multi_latent_attention is not None:
            return original(
                t,
                cu_seqlens,
                freqs,
                rotary_interleaved,
                mla_rotary_interleaved,
                mscale,
                cp_group,  # pyright: ignore[reportArgumentType]
                multi_latent_attention,
            )
        if freqs.size(0) != t.size(0):  # as many rows as tokens: those of the whole, or of a single document
            freqs = freqs.index_select(0, document_positions(cu_seqlens, t.size(0)))
        return rotate(
            t.unsqueeze(1),
            freqs,
            rotary_interleaved=rotary_interleaved,
            mla_rotary_interleaved=mla_rotary_interleaved,
            mscale=mscale,
        ).squeeze(1)

    rope_utils._apply_rotary_pos_emb_thd = _apply_rotary_pos_emb_thd


PATCH = Patch(
    name="packed_rope",
    target="megatron.core.models.common.embeddings.rope_utils._apply_rotary_pos_emb_thd",
    package="megatron-core",
    versions=("0.19.2",),
    why="unfused rotary embeddings of packed sequences launch kernels for every document, and wait for the device",
    test="tests/unit/models/test_packed_rope.py::test_operations_do_not_grow_with_documents",
    upstream="not reported; the code is the same on main at d98e8a6",
    drop_when="_apply_rotary_pos_emb_thd has neither a loop over documents nor a read on the host",
    install=_install,
    note="under context parallelism Megatron's loop stays; data.document_mask with Transformer Engine refuses it",
)
