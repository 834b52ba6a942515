"""Blends: proportions, whole epochs, random access, and what a configuration may say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remit_megatron.data.blend import BlendedDataset, BlendEntry, BlendOrder, open_blend, parse_blend, summarize_blend
from remit_megatron.data.blend_file import read_blend_file, write_blend_file
from remit_megatron.data.packing import PackedDataset
from remit_megatron.data.writer import DatasetWriter
from remit_megatron.runtime.errors import UserError

EOD = 0


def write_corpus(prefix: Path, *, first: int, documents: int, length: int = 10, eod_id: int | None = EOD) -> str:
    """Documents first, first, ..., first, end of document; the next document counts one higher."""
    with DatasetWriter(prefix, dtype=np.dtype("<u2")) as writer:
        for number in range(documents):
            tokens = np.full(length, first + number, dtype=np.uint16)
            tokens[-1] = EOD
            writer.append(tokens, np.array([length], dtype=np.int32))
        writer.commit(tokenizer_digest="d" * 64, vocab_size=60000, eod_id=eod_id, skipped=0, inputs=("test",))
    return str(prefix)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("corpora")
    return [write_corpus(root / f"c{k}", first=1 + 1000 * k, documents=4 + 9 * k) for k in range(3)]


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
@example(weights=[1.0] * 3)
@example(weights=[0.5, 0.25, 0.225, 0.025])
@example(weights=[0.7, 0.28, 0.019, 0.001])
@example(weights=[0.9] + [0.005] * 11)
def test_proportions_hold_at_every_moment(weights):
    order = BlendOrder(weights)
    shares = np.array(weights) / math.fsum(weights)
    assert order.deviation < (1 if len(weights) <= 4 else 2)
    counts = np.zeros(len(weights), dtype=np.int64)
    for index in range(600):
        dataset, before = order(index)
        assert before == counts[dataset]
        counts[dataset] += 1
        assert np.abs(counts - shares * (index + 1)).max() <= order.deviation + 1e-9


def test_proportions_hold_far_out():
    weights = [0.6, 0.3, 0.1]
    order = BlendOrder(weights)
    for dataset, weight in enumerate(weights):
        index = next(i for i in range(10**12, 10**12 + 100) if order(i)[0] == dataset)
        assert abs(order(index)[1] - weight * index) <= 1


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(0.05, 1), min_size=3, max_size=3), seed=st.integers(1, 99), length=st.integers(3, 15))
def test_every_sample_once_an_epoch(corpora, weights, seed, length):
    datasets = [PackedDataset(prefix, sequence_length=length) for prefix in corpora]
    blend = BlendedDataset(datasets, weights, num_samples=400, seed=seed, eod_id=EOD)
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for index in range(len(blend)):
        dataset, sample = blend.locate(index)
        drawn[dataset].append(sample)
    for number, samples in drawn.items():
        size = len(datasets[number])
        for start in range(0, len(samples), size):
            epoch = samples[start : start + size]
            assert len(set(epoch)) == len(epoch)
            if len(epoch) == size:
                assert sorted(epoch) == list(range(size))


@pytest.mark.parametrize(("first", "last"), [(0, 5), (3, 11), (0, 200), (150, 190), (7, 7)])
def test_samples_between_are_those_that_are_located(corpora, first, last):
    for weights in ([1.0, 2.0, 3.5], [5.0, 0.2, 1.0]):
        blend = open_blend(list(zip(weights, corpora, strict=True)), sequence_length=7, num_samples=200, seed=3)
        located: list[list[int]] = [[], [], []]
        for index in range(first, last):
            dataset, sample = blend.locate(index)
            if sample not in located[dataset]:
                located[dataset].append(sample)
        found = blend.samples_between(first, last)
        assert blend.order.counts(200) == [
            sum(blend.locate(i)[0] == dataset for i in range(200)) for dataset in range(3)
        ]
        for expected, samples, dataset in zip(located, found, blend.datasets, strict=True):
            assert sorted(samples.tolist()) == sorted(expected)
            assert samples.tolist() == expected or len(samples) == len(dataset)


def test_item(corpora):
    datasets = [PackedDataset(prefix, sequence_length=16) for prefix in corpora]
    blend = BlendedDataset(datasets, [2, 1, 1], num_samples=50, seed=3, eod_id=EOD, mask_eod_loss=True)
    plain = BlendedDataset(datasets, [2, 1, 1], num_samples=50, seed=3, eod_id=EOD)
    for index in range(50):
        item = blend[index]
        assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
            "tokens": (torch.int64, (16,)),
            "labels": (torch.int64, (16,)),
            "loss_mask": (torch.float32, (16,)),
            "dataset_id": (torch.int64, ()),
            "sample_id": (torch.int64, ()),
        }
        sample = datasets[int(item["dataset_id"])][int(item["sample_id"])]
        assert item["tokens"].tolist() == sample[:-1].tolist() and item["labels"].tolist() == sample[1:].tolist()
        assert ((item["loss_mask"] == 0) == (item["tokens"] == EOD)).all() and (item["tokens"] == EOD).any()
        assert (plain[index]["loss_mask"] == 1).all()
        item["tokens"].fill_(7)  # neither the labels nor a later reading may notice
        assert (item["labels"] != 7).any() and blend[index]["tokens"].tolist() == sample[:-1].tolist()
    with pytest.raises(IndexError):
        blend[50]
    with pytest.raises(IndexError):
        blend[-1]


def test_order_follows_the_seed_and_nothing_else(corpora):
    def places(seed: int, *, num_samples: int = 120, weights=(1, 1, 1), which=(0, 1, 2)) -> list[tuple[int, int]]:
        datasets = [PackedDataset(corpora[k], sequence_length=7) for k in which]
        blend = BlendedDataset(datasets, weights, num_samples=num_samples, seed=seed, eod_id=EOD)
        return [blend.locate(i) for i in range(num_samples)]

    base = places(1)
    assert places(1) == base and places(1, num_samples=60) == base[:60]
    assert places(1, weights=(5, 5, 5)) == base
    assert places(2) != base
    # A data set's own order does not depend on its company.
    alone = [sample for _, sample in places(1, which=(2,), weights=(1,))]
    among = [sample for dataset, sample in base if dataset == 2]
    assert among == alone[: len(among)]
    # Epochs differ in their order.
    size = len(PackedDataset(corpora[2], sequence_length=7))
    assert alone[:size] != alone[size : 2 * size]


def test_random_access_in_any_order_and_through_a_loader(corpora):
    blend = open_blend(parse_blend(corpora), sequence_length=5, num_samples=64, seed=1, eod_id=EOD)
    forward = [blend[i]["tokens"].tolist() for i in range(64)]
    again = open_blend(parse_blend(corpora), sequence_length=5, num_samples=64, seed=1, eod_id=EOD)
    assert [again[i]["tokens"].tolist() for i in reversed(range(64))] == forward[::-1]
    loader = torch.utils.data.DataLoader(blend, batch_size=4, num_workers=2)
    assert [row.tolist() for batch in loader for row in batch["tokens"]] == forward


def test_weights_by_size(corpora):
    blend = open_blend(parse_blend(corpora), sequence_length=5, num_samples=10, seed=1)
    tokens = np.array([4, 13, 22]) * 10
    assert np.allclose(blend.order.weights, tokens / tokens.sum())


def test_the_largest_weights_have_shares(corpora):
    assert BlendOrder([1e308, 1e308, 0.5e308]).weights == [0.4, 0.4, 0.2]
    assert BlendOrder([5e-324, 5e-324]).weights == [0.5, 0.5]


def test_a_blend_is_known_by_its_manifests(corpora):
    """Without an index, as with one."""
    entries = parse_blend(corpora)
    common = {"sequence_length": 5, "packing_seed": 3, "tokenizer_digest": "d" * 64, "eod_id": EOD}
    summary = summarize_blend(entries, **common)
    blend = open_blend(entries, num_samples=10, seed=1, **common)
    assert summary.datasets == [(dataset.prefix, dataset.identity) for dataset in blend.datasets]
    assert summary.weights == blend.order.weights
    for change, message in (
        ({"sequence_length": 50}, "40 tokens in all; expected at least 51"),
        ({"tokenizer_digest": "e" * 64}, "data of the tokenizer with digest dddd"),
        ({"eod_id": 5}, "end-of-document token 0; expected 5"),
    ):
        with pytest.raises(UserError, match=message):
            summarize_blend(entries, **common | change)
    with pytest.raises(UserError, match="the same contents"):
        summarize_blend([*entries, entries[0]], **common)


def test_parse_blend():
    assert parse_blend("a") == [BlendEntry(None, "a")]
    assert parse_blend(["a", "b"]) == [BlendEntry(None, "a"), BlendEntry(None, "b")]
    assert parse_blend([[7, "a"], (0.5, "b")]) == [BlendEntry(7.0, "a"), BlendEntry(0.5, "b")]
    for value, message in [
        (None, r"data\.train: found nothing"),
        ([], r"data\.train: found \[\]"),
        (3, r"data\.train: found 3"),
        ([[0.7, "a"], [-1, "b"]], r"data\.train\[1\]: found weight -1; expected a finite number greater than 0"),
        ([[0, "a"]], r"data\.train\[0\]: found weight 0"),
        ([[math.nan, "a"]], r"data\.train\[0\]: found weight nan"),
        ([[math.inf, "a"]], r"data\.train\[0\]: found weight inf"),
        ([["0.5", "a"]], r"data\.train\[0\]: found weight '0.5'"),
        ([[True, "a"]], r"data\.train\[0\]: found weight True"),
        ([["a", 0.5]], r"data\.train\[0\]"),
        ([[0.5, "a", "b"]], r"data\.train\[0\]"),
        ([[0.5, "a"], "b"], r"data\.train\[1\]: found b, without a weight"),
        ([[0.5, ""]], r"data\.train\[0\]: found an empty prefix"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_blend(value)
    with pytest.raises(UserError, match=r"data\.valid\[0\]"):
        parse_blend([5], field="data.valid")


def test_refusals(corpora, tmp_path):
    datasets = [PackedDataset(prefix, sequence_length=5) for prefix in corpora[:2]]
    for weight in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match="greater than 0"):
            BlendedDataset(datasets, [1, weight], num_samples=4, seed=1, eod_id=EOD)
    with pytest.raises(UserError, match="the same contents"):
        BlendedDataset([datasets[0]] * 2, [1, 2], num_samples=4, seed=1, eod_id=EOD)
    with pytest.raises(UserError, match="mask_eod_loss"):
        BlendedDataset(datasets, [1, 2], num_samples=4, seed=1, eod_id=None, mask_eod_loss=True)
    with pytest.raises(UserError, match="end-of-document token 0; expected 5"):
        open_blend([(1.0, corpora[0])], sequence_length=5, num_samples=4, seed=1, eod_id=5)
    without = write_corpus(tmp_path / "n", first=3, documents=5, eod_id=None)
    assert len(open_blend([(1.0, without)], sequence_length=5, num_samples=4, seed=1, eod_id=5)) == 4


def test_memory_does_not_grow_with_samples(corpora):
    import tracemalloc

    tracemalloc.start()
    blend = open_blend(parse_blend(corpora), sequence_length=5, num_samples=12_000_000, seed=1, eod_id=EOD)
    before = tracemalloc.get_traced_memory()[0]
    for index in range(0, 12_000_000, 30_011):
        blend[index]
    assert tracemalloc.get_traced_memory()[0] - before < 100_000
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_names_and_weights_come_back_from_a_blend_file(tmp_path):
    """Whatever they look like to YAML: a number, nothing, a date, a yes."""
    names = ["2024", "null", "1e5", "yes", "2024-01-01", "0x1F", "1_000", "plain", "a+b", "ümlaut #1"]
    weights = [1e-05, 2.5e-7, 1.0, 0.1, 3.0, 1e-12, 7.0, 0.25, 5e-9, 1 / 3]
    write_blend_file(tmp_path / "blend.yaml", list(zip(weights, names, strict=True)))
    found = read_blend_file(tmp_path / "blend.yaml")
    assert [prefix for _, prefix in found] == [str(tmp_path / name) for name in names]
    assert [weight for weight, _ in found] == [weight / math.fsum(weights) for weight in weights]


@pytest.mark.parametrize("weight", [1e308, 1e-308, 5e-324, 10**400])
def test_weights_that_no_sum_holds_are_refused(tmp_path, weight):
    with pytest.raises(UserError, match=r"data\.train\[1\]: found weight .*; expected a finite number greater than 0"):
        parse_blend([[1.0, "a"], [weight, "b"]])
    if isinstance(weight, float):
        (tmp_path / "blend.yaml").write_text(f"blend:\n- [1.0, a]\n- [{weight!r}, b]\n")
        with pytest.raises(UserError, match=r"blend\[1\]: found .*; expected \[weight, prefix\] with a weight above 0"):
            read_blend_file(tmp_path / "blend.yaml")
    order = BlendOrder([1e50, 1e-50, 1e-50, 1e50])
    assert order.counts(1000) == [500, 0, 0, 500]
