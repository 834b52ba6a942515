"""Documents as packed sequences: what a layer costs does not depend on their number, the numbers are those of a mask.

The core attention stands in for Transformer Engine's, which needs a GPU: it takes [t, heads, channels] and boundaries.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import patches

patches.apply()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from remit_megatron.conversion.processes import process_groups  # noqa: E402
from remit_megatron.models.attention import ScaledDotProductAttention, document_attention_mask  # noqa: E402
from remit_megatron.models.batch import to_batch  # noqa: E402
from remit_megatron.models.build import build_chunks, default_arguments, model_config  # noqa: E402
from remit_megatron.models.packing import packed_sequences  # noqa: E402
from tests.families import hf_values  # noqa: E402

TOKENS = 64


class Operations(TorchDispatchMode):
    """Counts what is dispatched to a kernel; views and allocations launch none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))

    def reads(self) -> int:
        """Values that the host waits for."""
        return self.found["aten._local_scalar_dense.default"]


class Alone:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def documents(count: int, sequences: int = 2) -> torch.Tensor:
    """[sequences, TOKENS] ids of so many documents, of which the first is longer where they do not fill it evenly."""
    return (torch.arange(TOKENS) * count // TOKENS).expand(sequences, TOKENS)


def attention_of_packed(self: Any, query: Any, key: Any, value: Any, *_: Any, packed_seq_params: Any, **__: Any) -> Any:
    boundaries = packed_seq_params.cu_seqlens_q
    token = torch.arange(len(query), dtype=boundaries.dtype)
    piece = torch.searchsorted(boundaries, token, right=True)
    mask = (piece[:, None] != piece[None, :]) | (token[None, :] > token[:, None])
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return self._attend(q, k, v, mask=~mask)[0].transpose(0, 1).flatten(1)


@pytest.fixture
def packed_attention(monkeypatch):
    monkeypatch.setattr(ScaledDotProductAttention, "forward", attention_of_packed)


def chunk_of(case: str, groups: Any) -> Any:
    torch.manual_seed(0)
    (chunk,) = build_chunks(model_config(hf_values(case), default_arguments()), groups, initialize=True)
    return chunk.train().requires_grad_(True)


def step(chunk: Any, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Forward and backward of a microbatch as packed sequences; logits [b, s, V]."""
    item = {"tokens": ids, "labels": ids, "loss_mask": torch.ones(ids.shape), "document_ids": numbers}
    batch = to_batch(item, device=torch.device("cpu"), eod_id=-1, packed=True)
    positions = batch.position_ids.reshape(1, -1)
    logits = chunk(batch.tokens.view(1, -1), positions, None, packed_seq_params=batch.packed)
    logits.square().mean().backward()
    return logits.detach().view(*ids.shape, -1)


@pytest.mark.parametrize(
    "case", ["llama-gqa_6_2_tied", "smollm3-gqa_4_2_tied", "olmo2-mha_untied", "youtu-narrow_values_tied"]
)
def test_operations_do_not_grow_with_documents(case, packed_attention):
    found = {}
    with process_groups(alone=True) as groups:
        chunk = chunk_of(case, groups)
        ids = torch.arange(2 * TOKENS).view(2, TOKENS) % 50
        for count in (2, 8, 32):
            step(chunk, ids, documents(count))  # Megatron keeps the frequencies of every length of a document
            with Operations() as operations:
                step(chunk, ids, documents(count))
            found[count] = operations
    assert found[2].found.total() == found[8].found.total() == found[32].found.total()
    # The longest document, and where a boolean of the host is asked for it: once a microbatch, not in every layer.
    assert found[32].reads() == found[2].reads() <= 2


def test_megatrons_own_operations_grow(monkeypatch):
    """The count can fail: without the patch there are more with every document, and reads in every layer."""
    original = rope_utils._apply_rotary_pos_emb_thd.__wrapped__
    freqs, query = torch.rand(TOKENS, 1, 1, 8), torch.rand(2 * TOKENS, 3, 8)
    totals, reads = {}, {}
    for function in (original, rope_utils._apply_rotary_pos_emb_thd):
        for count in (2, 32):
            boundaries = packed_sequences(documents(count)).cu_seqlens_q
            with Operations() as operations:
                function(query, boundaries, freqs, cp_group=Alone())
            totals[function, count], reads[function, count] = operations.found.total(), operations.reads()
    assert totals[original, 32] > 5 * totals[original, 2] and reads[original, 2] > 0
    ours = rope_utils._apply_rotary_pos_emb_thd
    assert totals[ours, 32] == totals[ours, 2] and reads[ours, 32] == 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_the_numbers_are_megatrons(interleaved, count):
    original = rope_utils._apply_rotary_pos_emb_thd.__wrapped__
    generator = torch.Generator().manual_seed(count)
    boundaries = packed_sequences(documents(count)).cu_seqlens_q
    longest = int((boundaries[1:] - boundaries[:-1]).max())
    freqs = torch.rand(longest, 1, 1, 8, generator=generator) * 9
    settings: dict[str, Any] = {"mla_rotary_interleaved": interleaved, "mscale": 1.5, "cp_group": Alone()}
    results = []
    for function in (original, rope_utils._apply_rotary_pos_emb_thd):
        query = torch.rand(2 * TOKENS, 3, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
        found = function(query, boundaries, freqs, **settings)
        found.square().sum().backward()
        results.append((found.detach(), query.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    "case", ["smollm3-gqa_4_2_tied", "youtu-narrow_values_tied", "youtu-six_heads_wide_values_untied"]
)
def test_logits_are_those_of_an_explicit_mask(case, monkeypatch):
    """Packed sequences restart positions with every document, a mask does not: rotations are relative."""
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) * 7 % 50
    numbers = documents(5)
    with process_groups(alone=True) as groups:
        chunk = chunk_of(case, groups)
        positions = torch.arange(TOKENS).expand_as(ids)
        expected = chunk(ids, positions, document_attention_mask(numbers)).detach()
        monkeypatch.setattr(ScaledDotProductAttention, "forward", attention_of_packed)
        found = step(chunk, ids, numbers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
