"""The tables of weights: both directions are inverse under every tensor-parallel size; a shard reads only its part."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from remit_megatron.models.mapping import QKV, WHOLE, Direct, GatedMLP, Shape, TensorRank, Vocabulary, Weight
from remit_megatron.runtime.errors import UserError

KINDS: dict[str, Weight] = {
    "column": Direct("a", "m", split="column"),
    "row": Direct("a", "m", split="row"),
    "replicated": Direct("a", "m"),
    "qkv": QKV(("q", "k", "v"), "m"),
    "gated": GatedMLP(("g", "u"), "m"),
    "vocabulary": Vocabulary("e", "m"),
}


class Counting:
    """A lazy tensor that counts the elements read."""

    def __init__(self, tensor: Tensor):
        self._tensor, self.shape, self.read = tensor, tensor.shape, 0

    def __getitem__(self, index) -> Tensor:
        part = self._tensor[index]
        self.read += part.numel()
        return part


def hf_tensors(weight: Weight, full: Sequence[int], shape: Shape) -> list[Tensor]:
    """Distinct numbers in the shapes that the kind asks for."""
    tensors, start = [], 1
    for size in weight.hf_shapes(full, shape):
        count = torch.Size(size).numel()
        tensors.append(torch.arange(start, start + count, dtype=torch.float64).reshape(size))
        start += count
    return tensors


@given(
    kind=st.sampled_from(sorted(KINDS)),
    size=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([1, 2, 4, 8]),
    per_group=st.integers(1, 3),
    head=st.sampled_from([4, 12]),
    hidden=st.sampled_from([4, 8]),
    missing=st.integers(0, 9),
)
def test_shards_write_back_what_was_read(kind, size, groups, per_group, head, hidden, missing):
    weight = KINDS[kind]
    heads = groups * per_group
    rows = (heads + 2 * groups) * head if kind == "qkv" else 24
    shape = Shape(heads=heads, groups=groups, vocab_size=24 - missing)
    full = (rows, hidden)
    originals = hf_tensors(weight, full, shape)
    shards = [weight.read(originals, TensorRank(rank, size), full, shape) for rank in range(size)]
    for shard in shards:
        assert weight.full_shape(shard.shape, size) == full
    for back, original in zip(weight.write(shards, shape), originals, strict=True):
        assert torch.equal(back, original)
    # Shards of one whole parameter are what Megatron would cut it into, but for the gated kind, which cuts each half.
    whole = weight.read(originals, WHOLE, full, shape)
    assert whole.shape == full
    if kind in ("column", "qkv", "vocabulary"):
        assert torch.equal(torch.cat(shards), whole)


def test_qkv_is_interleaved_by_group():
    shape = Shape(heads=4, groups=2, vocab_size=0)
    q, k, v = (torch.arange(n)[:, None].float() + base for n, base in ((4, 0), (2, 10), (2, 20)))
    found = KINDS["qkv"].read([q, k, v], WHOLE, (8, 1), shape).flatten().tolist()
    assert found == [0, 1, 10, 20, 2, 3, 11, 21]


def test_gated_shard_holds_both_halves():
    gate, up = torch.arange(4)[:, None].float(), torch.arange(4)[:, None].float() + 10
    found = KINDS["gated"].read([gate, up], TensorRank(1, 2), (8, 1), Shape(1, 1, 0)).flatten().tolist()
    assert found == [2, 3, 12, 13]


def test_vocabulary_pads_with_zeros_and_a_shard_may_be_all_padding():
    shape = Shape(heads=1, groups=1, vocab_size=3)
    rows = torch.arange(1.0, 4.0)[:, None]
    shards = [
        KINDS["vocabulary"].read([rows], TensorRank(rank, 4), (8, 1), shape).flatten().tolist() for rank in range(4)
    ]
    assert shards == [[1, 2], [3, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("kind", ["column", "row", "qkv", "gated", "vocabulary"])
def test_a_rank_reads_its_part_only(kind):
    weight, shape, full = KINDS[kind], Shape(heads=4, groups=2, vocab_size=16), (16, 4)
    lazy = [Counting(tensor) for tensor in hf_tensors(weight, full, shape)]
    weight.read(lazy, TensorRank(1, 2), full, shape)
    assert sum(tensor.read for tensor in lazy) == 16 * 4 // 2


def test_uneven_split_is_refused():
    with pytest.raises(UserError, match="tensor_model_parallel_size"):
        KINDS["column"].read([torch.zeros(10, 2)], TensorRank(0, 4), (10, 2), Shape(1, 1, 0))
