"""Packing: every token is predicted once a pass, samples never change, damage is refused."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remit_megatron.data.indexed import IndexedTokens, token_dtype
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.packing import PackedDataset
from remit_megatron.data.shuffle import Permutation, keyed_order, mix64, mix64_array, stream_key
from remit_megatron.data.writer import DatasetWriter
from remit_megatron.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

PINNED_SAMPLES = [
    [35, 36, 37, 38, 18, 19, 20, 21, 22, 23, 24],
    [24, 27, 28, 29, 30, 31, 32, 33, 34, 5, 6],
    [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
    [16, 17, 0, 1, 2, 3, 4, 39, 40, 41, 42],
]
PINNED_IDENTITY = "34818c8f56e56eb861eefe3348b6663c113126f172e12c0b35db157195a8a4e7"
PINNED_ORDER = [4, 1, 5, 3, 0, 2]
PINNED_PERMUTATION = [979810, 989542, 776750, 233791]


def write_corpus(prefix: Path, documents: list[list[int]], *, digest: str = "d" * 64, vocab_size: int = 1000) -> Path:
    dtype = token_dtype(vocab_size)
    with DatasetWriter(prefix, dtype=dtype, overwrite=True) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=dtype), np.array([len(document)], dtype=np.int32))
        writer.commit(tokenizer_digest=digest, vocab_size=vocab_size, eod_id=0, skipped=0, inputs=("test",))
    return prefix


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, so that a token names its place."""
    starts = np.cumsum([0, *lengths])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    sequence_length=st.integers(1, 24),
    packing_seed=st.integers(0, 2**31),
)
def test_every_token_is_a_label_once(tmp_path_factory, lengths, sequence_length, packing_seed):
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "c", numbered(lengths))
    total = sum(lengths)
    if total < sequence_length + 1:
        with pytest.raises(UserError, match=rf"{total} tokens.*{sequence_length + 1}"):
            PackedDataset(prefix, sequence_length=sequence_length, packing_seed=packing_seed)
        return
    data = PackedDataset(prefix, sequence_length=sequence_length, packing_seed=packing_seed)
    samples = [data[i] for i in range(len(data))]
    labels = np.concatenate([sample[1:] for sample in samples])
    assert len(set(labels)) == len(labels) == len(data) * sequence_length
    assert all(left[-1] == right[0] for left, right in pairwise(samples))
    # The stream is the documents, whole and unbroken, and only its end is missing.
    stream = [samples[0][0], *labels]
    documents = {document[0]: document for document in numbered(lengths)}
    rebuilt: list[int] = []
    while len(rebuilt) < len(stream):
        rebuilt += documents.pop(stream[len(rebuilt)])
    assert rebuilt[: len(stream)] == stream
    assert data.dropped_tokens == total - len(stream) < sequence_length
    with pytest.raises(IndexError):
        data[len(data)]


def test_samples_are_pinned_for_ever(tmp_path):
    """A score cache names samples by number: if these numbers change, every cache in the world is void."""
    prefix = write_corpus(tmp_path / "c", numbered([5, 1, 9, 3, 7, 2, 8, 4, 6]))
    data = PackedDataset(prefix, sequence_length=10, packing_seed=0)
    assert [list(data[i]) for i in range(len(data))] == PINNED_SAMPLES
    assert data.identity == PINNED_IDENTITY
    assert mix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 from seed 0
    assert list(keyed_order(6, key=stream_key("documents", 1))) == PINNED_ORDER
    permutation = Permutation(1_000_000, key=stream_key("samples", 7, "x", 0))
    assert [permutation(i) for i in range(4)] == PINNED_PERMUTATION


def test_identity_follows_contents_not_names(tmp_path):
    corpus = numbered([30, 40, 50])
    base = PackedDataset(write_corpus(tmp_path / "a", corpus), sequence_length=8)
    moved = PackedDataset(write_corpus(tmp_path / "elsewhere" / "b", corpus), sequence_length=8)
    assert base.identity == moved.identity
    corpus[1][3] += 1
    others = [
        PackedDataset(tmp_path / "a", sequence_length=9),
        PackedDataset(tmp_path / "a", sequence_length=8, packing_seed=1),
        PackedDataset(write_corpus(tmp_path / "c", corpus), sequence_length=8),
    ]
    assert len({base.identity, *(other.identity for other in others)}) == 4


def test_cached_index_is_shared_repaired_and_checked(tmp_path):
    prefix, cache = write_corpus(tmp_path / "c", numbered([11, 3, 20, 9, 2] * 20)), tmp_path / "cache"
    plain = [PackedDataset(prefix, sequence_length=16)[i].tolist() for i in range(56)]

    def opened(**arguments) -> list[list[int]]:
        data = PackedDataset(prefix, sequence_length=16, cache_dir=cache, **arguments)
        assert isinstance(data._starts, np.memmap)
        return [data[i].tolist() for i in range(56)]

    assert opened() == plain
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 2
    assert opened() == plain
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    # Another sequence length shares the index; another packing seed does not.
    PackedDataset(prefix, sequence_length=5, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2
    PackedDataset(prefix, sequence_length=5, packing_seed=3, cache_dir=cache)
    assert len(list(cache.iterdir())) == 4
    order = next(path for path in files if "order" in path.name)
    order.write_bytes(order.read_bytes()[:100])
    assert opened() == plain
    values = np.load(order)
    np.save(order, np.roll(values, 1))
    assert opened(verify=True) == plain


def test_pickle_opens_again(tmp_path):
    data = PackedDataset(
        write_corpus(tmp_path / "c", numbered([50] * 40)), sequence_length=16, cache_dir=tmp_path / "i"
    )
    packed = pickle.dumps(data)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert again.identity == data.identity and (again[7] == data[7]).all()


def test_refusals(tmp_path):
    prefix = write_corpus(tmp_path / "c", numbered([50] * 4))
    with pytest.raises(UserError, match="nothing") as caught:
        PackedDataset(tmp_path / "absent", sequence_length=4)
    assert caught.value.field == str(tmp_path / "absent")
    with pytest.raises(UserError, match=r"dddddddddddddddd.*eeeeeeeeeeeeeeee"):
        PackedDataset(prefix, sequence_length=4, tokenizer_digest="e" * 64)
    PackedDataset(prefix, sequence_length=4, tokenizer_digest="d" * 64)
    data, index, manifest = (Path(f"{prefix}.{kind}") for kind in ("bin", "idx", "json"))
    for path in (data, index):
        whole = path.read_bytes()
        path.write_bytes(whole[:-2])
        with pytest.raises(
            UserError, match=rf"c.{path.suffix[1:]}: found {len(whole) - 2} bytes; expected {len(whole)} "
        ):
            PackedDataset(prefix, sequence_length=4)
        path.unlink()
        with pytest.raises(UserError, match="No such file"):
            PackedDataset(prefix, sequence_length=4)
        flipped = bytearray(whole)
        flipped[-3] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="SHA-256"):
            PackedDataset(prefix, sequence_length=4, verify=True)
        path.write_bytes(whole)
    PackedDataset(prefix, sequence_length=4, verify=True)
    content = manifest.read_text()
    for damaged in (
        "{",
        "[]",
        "{}",
        json.dumps(json.loads(content) | {"format_version": 2}),
        content.replace("size", "s"),
    ):
        manifest.write_text(damaged)
        with pytest.raises(UserError, match=r"c\.json"):
            PackedDataset(prefix, sequence_length=4)
    manifest.unlink()
    with pytest.raises(UserError, match=r"no c\.json beside c\.bin and c\.idx"):
        PackedDataset(prefix, sequence_length=4)


def test_index_of_another_kind_is_refused(tmp_path):
    prefix = write_corpus(tmp_path / "c", numbered([5, 6]))
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    for damaged in (whole[:20], b"X" + whole[1:], whole[:17] + b"\x07" + whole[18:], whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"c\.idx"):
            IndexedTokens(prefix)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 4096, 4097, 5000, 131_073])
def test_permutation_is_one(count):
    permutation = Permutation(count, key=stream_key("x", count))
    elements = list(map(permutation, range(count)))
    assert sorted(elements) == list(range(count))
    assert permutation.elements(0, count).tolist() == elements
    assert permutation.elements(count // 3, count // 2).tolist() == elements[count // 3 : count // 2]
    assert sorted(keyed_order(count, key=5)) == list(range(count))


def test_permutations_look_random():
    # All 24 orders of four elements, over 4,800 keys: chi-squared, 23 degrees of freedom; 49.7 has probability 0.001.
    counts = Counter(tuple(map(Permutation(4, key=stream_key("u", key)), range(4))) for key in range(4800))
    assert len(counts) == math.factorial(4)
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7
    # The network: positions and elements uncorrelated, neighbors not kept, and no order like another key's.
    size = 20_000
    orders = [np.array([Permutation(size, key=stream_key("v", key))(i) for i in range(size)]) for key in range(2)]
    for values in orders:
        assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < 4 / math.sqrt(size)
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / math.sqrt(size)
        assert np.count_nonzero(np.abs(np.diff(values)) == 1) < 12  # expected 2
    assert np.count_nonzero(orders[0] == orders[1]) < 8  # expected 1


def test_mix_of_array_and_integer_agree():
    values = np.array([0, 1, 2**63, 2**64 - 1, 123456789], dtype=np.uint64)
    assert mix64_array(values).tolist() == [mix64(int(value)) for value in values]


_MEGATRON = """
import sys
import patches; patches.apply()
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
for vocab_size in map(int, sys.argv[2:]):
    read = IndexedDataset(f"{sys.argv[1]}/ours{vocab_size}")
    builder = IndexedDatasetBuilder(f"{sys.argv[1]}/theirs{vocab_size}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in range(len(read)):
        tokens = read.get(document)
        assert list(tokens) == [(document * 7919 + i) % vocab_size for i in range(1 + document % 13)], document
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{sys.argv[1]}/theirs{vocab_size}.idx")
"""


def test_files_are_megatrons_byte_for_byte(tmp_path):
    corpora = {}
    for vocab_size in (65_499, 65_500):
        corpora[vocab_size] = [[(n * 7919 + i) % vocab_size for i in range(1 + n % 13)] for n in range(200)]
        ours = write_corpus(tmp_path / f"ours{vocab_size}", corpora[vocab_size], vocab_size=vocab_size)
        assert read_manifest(ours).dtype == ("uint16" if vocab_size < 65_500 else "int32")
    command = [sys.executable, "-c", _MEGATRON, str(tmp_path), *map(str, corpora)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for vocab_size, documents in corpora.items():
        for kind in ("bin", "idx"):
            theirs = (tmp_path / f"theirs{vocab_size}.{kind}").read_bytes()
            assert (tmp_path / f"ours{vocab_size}.{kind}").read_bytes() == theirs, (vocab_size, kind)
        read = IndexedTokens(tmp_path / f"theirs{vocab_size}")
        assert [read.read(i).tolist() for i in range(len(read))] == documents


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [("starts", 20, 1), ("starts", 20, -1), ("starts", 3, 10**9), ("starts", 30, -(10**9)), ("order", 7, 10**6),
     ("order", 7, -50), ("order", 7, 1)],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_data_is_noticed(tmp_path, name, place, value):
    """A file in data.cache_dir with one number changed: samples are right, or refused."""
    prefix = write_corpus(tmp_path / "c", numbered([*range(1, 41)]))
    options = {"sequence_length": 16, "cache_dir": tmp_path / "index"}
    data = PackedDataset(prefix, **options)
    right = [data[sample].tolist() for sample in range(len(data))]
    (path,) = (tmp_path / "index").glob(f"packing-*.{name}.npy")
    array = np.load(path)
    array[place] += value
    np.save(path, array)
    data, refused = PackedDataset(prefix, **options), 0
    for sample, expected in enumerate(right):
        try:
            assert data[sample].tolist() == expected
        except UserError as error:
            refused += 1
            assert f"remove packing-*.npy in {tmp_path / 'index'}" in str(error)
    assert refused
