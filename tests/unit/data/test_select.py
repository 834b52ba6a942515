"""`remit data select --method miniplm`: against a definition that sorts everything in memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from remit_megatron.cli import main
from remit_megatron.data.indexed import IndexedTokens
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.miniplm import HISTOGRAM_BINS, QUANTILES, Keep, Scores, difference_score
from remit_megatron.data.packing import PackedDataset
from remit_megatron.data.select import select_miniplm
from remit_megatron.reference import CacheIdentity, ReferenceCache
from remit_megatron.runtime.errors import UserError
from tests.unit.data.test_packing import write_corpus

ROOT = Path(__file__).resolve().parents[3]
LENGTH, EOD = 8, 0
IDENTITY = CacheIdentity(
    reference="", tokenizer="d" * 64, sequence_length=LENGTH, packing_seed=5, document_mask=False, eod_id=EOD
)
# Few values that are exact in the fixed point format, so that many samples have equal scores; and what is not finite.
VALUES = np.array([0.5, 1.0, 1.5, 2.0, np.nan, np.inf], dtype=np.float32)


class Source(NamedTuple):
    """Data sets with both caches of them, and what the caches hold."""

    prefixes: list[str]
    data: list[PackedDataset]
    teacher: Path
    reference: Path
    losses: list[dict[str, np.ndarray]]  # of each data set: float32 [samples, L] by "teacher" and "reference"


def make_source(
    folder: Path,
    *,
    sizes: tuple[int, ...] = (700, 90, 300),
    ties: bool = True,
    seed: int = 0,
    unscored: bool = True,
) -> Source:
    generator = np.random.default_rng(seed)
    prefixes, data, losses = [], [], []
    for number, size in enumerate(sizes):
        documents = []
        while sum(map(len, documents)) < size:
            length = int(generator.integers(1, 30))
            documents.append([*generator.integers(1, 900, length).tolist(), EOD])
        prefix = str(write_corpus(folder / f"corpus{number}", documents))
        prefixes.append(prefix)
        data.append(PackedDataset(prefix, sequence_length=LENGTH, packing_seed=5))
        shape, drawn = (len(data[-1]), LENGTH), {}
        for name in ("teacher", "reference"):
            values = generator.choice(VALUES, shape) if ties else generator.gamma(1, 2, shape)
            drawn[name] = values.astype(np.float32)
        losses.append(drawn)
    if unscored:
        losses[0]["teacher"][3] = np.nan  # a sample without a counted token
    for name in ("teacher", "reference"):
        identity = dataclasses.replace(IDENTITY, reference=name[0] * 8)
        with ReferenceCache.open(folder / name, identity=identity, dtype="float32", create=True) as cache:
            for number, dataset in enumerate(data):
                cache.add_dataset(dataset.identity, samples=len(dataset), name=f"corpus{number}")
                for sample in range(len(dataset)):
                    cache.write(dataset.identity, sample, dataset[sample], losses[number][name][sample])
    return Source(prefixes, data, folder / "teacher", folder / "reference", losses)


def definition(source: Source, kept: int, *, mask_eod_loss: bool = False) -> tuple[list[np.ndarray], list[float]]:
    """Tokens of the kept samples in corpus order, and all scores: everything in memory, one sort."""
    samples, scores = [], []
    for dataset, losses in zip(source.data, source.losses, strict=True):
        for number in range(len(dataset)):
            samples.append(dataset[number])
            teacher, reference = (losses[name][number].astype(np.float64) for name in ("teacher", "reference"))
            counts = np.isfinite(teacher) & np.isfinite(reference)
            if mask_eod_loss:
                counts &= samples[-1][:-1] != EOD
            difference = reference[counts].mean() - teacher[counts].mean() if counts.any() else -np.inf
            scores.append(float(difference))
    order = sorted(range(len(scores)), key=lambda number: (-scores[number], number))
    return [samples[number] for number in sorted(order[:kept])], scores


def select(source: Source, output: Path, keep: str, **options) -> dict:
    return select_miniplm(
        source.prefixes,
        teacher=source.teacher,
        reference=source.reference,
        keep=Keep.parse(keep),
        output=output,
        **options,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_selection_of_the_methods_authors(tmp_path, seed):
    """Their rule, as their repository thu-coai/MiniPLM has it (commit ac2302f): the mask of a sample is where its input
    is not the padding, which is the end of document; float32 means over it; torch.sort; the first int(ratio * N)."""
    source = make_source(tmp_path, ties=False, seed=seed, sizes=(3000, 900), unscored=False)
    samples = torch.tensor(np.stack([data[n] for data in source.data for n in range(len(data))]))
    mask = (samples[:, :-1] != EOD).float()
    means = {}
    for name in ("teacher", "reference"):
        losses = torch.from_numpy(np.concatenate([losses[name] for losses in source.losses]))
        means[name] = (losses * mask).sum(-1) / mask.sum(-1)
    _, order = torch.sort(means["reference"] - means["teacher"], descending=True)
    kept = order[: int(0.8 * len(order))].sort()[0]
    select(source, tmp_path / "out", "0.8", mask_eod_loss=True)
    wanted = samples[kept].numpy().astype(np.uint16)
    assert Path(f"{tmp_path / 'out'}.bin").read_bytes() == wanted.tobytes()
    # Without the option other samples are kept.
    select(source, tmp_path / "all", "0.8")
    assert Path(f"{tmp_path / 'all'}.bin").read_bytes() != wanted.tobytes()


@pytest.mark.parametrize("keep", ["0.8", "0.5", "0.07", "1.0", "2", "60", "133"])
@pytest.mark.parametrize("mask_eod_loss", [False, True])
def test_selection_is_the_definition(source, tmp_path, keep, mask_eod_loss):
    total = sum(map(len, source.data))
    kept = int(float(keep) * total) if "." in keep else int(keep)
    expected, scores = definition(source, kept, mask_eod_loss=mask_eod_loss)
    assert len(set(scores)) < 0.9 * len(scores), "a test of ties has ties"
    report = select(source, tmp_path / "out", keep, mask_eod_loss=mask_eod_loss)
    # One document for each kept sample, in corpus order.
    documents = IndexedTokens(tmp_path / "out")
    assert len(documents) == kept == report["kept"]
    for number, tokens in enumerate(expected):
        assert np.array_equal(documents.read(number), tokens)
    # Packed again: exactly these samples, whatever the packing seed.
    for seed in (5, 0):
        packed = PackedDataset(tmp_path / "out", sequence_length=LENGTH, packing_seed=seed, verify=True)
        assert len(packed) == kept and packed.dropped_tokens == 0
        assert all(np.array_equal(packed[number], tokens) for number, tokens in enumerate(expected))
    threshold = sorted(scores, reverse=True)[kept - 1]
    assert report["threshold"] == threshold
    assert report["kept_of_score_threshold"] == kept - sum(score > threshold for score in scores)


def test_scores_without_ties_in_fixed_point(tmp_path):
    """The 16-bit caches that `remit score` writes: the definition applied to what they hold."""
    source = make_source(tmp_path, sizes=(2000,), ties=False)
    held = {}
    for name in ("teacher", "reference"):
        identity = ReferenceCache.open(tmp_path / name).identity
        with ReferenceCache.open(tmp_path / f"{name}16", identity=identity, create=True) as cache:
            data = source.data[0]
            cache.add_dataset(data.identity, samples=len(data), name="corpus0")
            for sample in range(len(data)):
                cache.write(data.identity, sample, data[sample], source.losses[0][name][sample])
            held[name] = np.stack([cache.read_scores(data.identity, sample) for sample in range(len(data))])
    assert not np.array_equal(held["teacher"], source.losses[0]["teacher"])
    source = source._replace(losses=[held], teacher=tmp_path / "teacher16", reference=tmp_path / "reference16")
    select(source, tmp_path / "out", "0.8")
    expected, _ = definition(source, int(0.8 * len(source.data[0])))
    packed = PackedDataset(tmp_path / "out", sequence_length=LENGTH)
    assert [packed[number].tolist() for number in range(len(packed))] == [tokens.tolist() for tokens in expected]


def test_ends_of_documents_are_those_of_the_data(tmp_path):
    """Masking by ends that the data does not have is refused; and what is selected from such data has none either."""
    source = make_source(tmp_path, sizes=(300, 90))
    manifest = Path(f"{source.prefixes[1]}.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"eod_id": None}))
    select(source, tmp_path / "spelled", "0.5", mask_eod_loss=True)  # its documents end in the token all the same
    assert read_manifest(tmp_path / "spelled").eod_id == EOD
    tokens = np.memmap(f"{source.prefixes[1]}.bin", dtype=np.uint16, mode="r+")
    tokens[tokens == EOD] = 7
    found = f"--mask-eod-loss: found given with {source.prefixes[1]}, built without end-of-document tokens"
    with pytest.raises(UserError) as caught:
        select(source, tmp_path / "out", "0.5", mask_eod_loss=True)
    assert str(caught.value).startswith(found)


def test_order_of_the_data_is_the_order_of_the_output(source, tmp_path):
    turned = source._replace(prefixes=source.prefixes[::-1], data=source.data[::-1], losses=source.losses[::-1])
    select(turned, tmp_path / "out", "70")
    expected, _ = definition(turned, 70)
    documents = IndexedTokens(tmp_path / "out")
    assert [documents.read(number).tolist() for number in range(70)] == [tokens.tolist() for tokens in expected]


def test_the_command_its_manifest_and_its_report(source, tmp_path, capsys):
    words = ["data", "select", "--method", "miniplm", "--teacher", source.teacher, "--reference", source.reference]
    words += ["--keep", "0.8", "--data", *source.prefixes, "--output", tmp_path / "out"]
    words += ["--cache-dir", tmp_path / "index"]
    assert main(list(map(str, words))) == 0
    printed = capsys.readouterr()
    total = sum(map(len, source.data))
    kept = int(0.8 * total)
    assert f"{kept} of {total} samples kept, {kept * (LENGTH + 1)} tokens" in printed.out
    assert f"scores: {total}/{total} samples (100%)" in printed.err
    assert f"writing: {kept}/{kept} samples (100%)" in printed.err
    manifest = read_manifest(tmp_path / "out", verify=True)
    assert (manifest.sample_length, manifest.inputs) == (LENGTH, ("corpus0", "corpus1", "corpus2"))
    assert (manifest.tokenizer_digest, manifest.eod_id, manifest.vocab_size) == ("d" * 64, EOD, 1000)
    report = json.loads((tmp_path / "out.selection.json").read_text())
    _, scores = definition(source, kept)
    finite = np.array([score for score in scores if np.isfinite(score)])
    distribution = report["scores"]
    assert (report["method"], report["keep"], report["kept"]) == ("miniplm", 0.8, kept)
    assert (report["teacher"], report["reference"]) == ("t" * 8, "r" * 8)
    assert distribution["samples"] == total
    assert distribution["samples_without_counted_tokens"] == total - len(finite) >= 1
    assert distribution["mean"] == pytest.approx(finite.mean(), abs=1e-12)
    assert distribution["std"] == pytest.approx(finite.std(), abs=1e-12)
    for share in QUANTILES:
        assert distribution["quantiles"][f"{share:g}"] == pytest.approx(np.quantile(finite, share), abs=1e-12)
    edges, counts = distribution["histogram"]["edges"], distribution["histogram"]["counts"]
    assert len(counts) == HISTOGRAM_BINS and counts == np.histogram(finite, bins=edges)[0].tolist()
    assert sum(counts) == len(finite)
    assert [entry["samples"] for entry in report["data"]] == list(map(len, source.data))
    assert sum(entry["kept"] for entry in report["data"]) == kept
    assert [entry["identity"] for entry in report["data"]] == [dataset.identity for dataset in source.data]
    # The same again: refused, and with --overwrite the same bytes.
    before = [(tmp_path / f"out.{ending}").read_bytes() for ending in ("bin", "idx", "json", "selection.json")]
    assert main(list(map(str, words))) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*map(str, words), "--overwrite"]) == 0
    assert before == [(tmp_path / f"out.{ending}").read_bytes() for ending in ("bin", "idx", "json", "selection.json")]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out.bin", "out.idx", "out.json", "out.selection.json", "index"}


def test_all_kept_with_a_sample_that_counts_nothing(source, tmp_path):
    report = select(source, tmp_path / "out", "1.0")
    assert report["threshold"] == -np.inf
    assert json.loads((tmp_path / "out.selection.json").read_text())["threshold"] is None


@pytest.mark.parametrize("name", ["teacher", "reference"])
def test_samples_without_a_score_are_not_selected(tmp_path, name):
    """Of a model that is broken the first samples of the corpus would be kept, as if they had been chosen."""
    source = make_source(tmp_path, sizes=(300,), ties=False, unscored=False)
    number = len(source.data[0])
    identity = dataclasses.replace(IDENTITY, reference="broken")
    with ReferenceCache.open(tmp_path / "broken", identity=identity, dtype="float32", create=True) as cache:
        dataset = source.data[0]
        cache.add_dataset(dataset.identity, samples=number, name="corpus0")
        for sample in range(number):  # the first two are whole
            losses = source.losses[0][name][sample] if sample < 2 else np.full(LENGTH, np.nan, np.float32)
            cache.write(dataset.identity, sample, dataset[sample], losses)
    broken = source._replace(**{name: tmp_path / "broken"})
    with pytest.raises(UserError) as refused:
        select(broken, tmp_path / "out", "0.8")
    assert f"--keep: found 2 of {number} samples with a finite score in both caches; expected at least 99%" in str(
        refused.value
    )
    assert not list(tmp_path.glob("out*"))
    assert select(broken, tmp_path / "two", "2")["kept"] == 2
    assert select(broken, tmp_path / "all", "1.0")["kept"] == number  # nothing is chosen


def test_difference_score():
    nan = np.nan
    reference, teacher = np.array([1.0, 2.0, nan, 4.0]), np.array([0.5, nan, 1.0, 1.5])
    assert difference_score(reference, teacher) == 2.5 - 1.0
    assert difference_score(reference, teacher, np.array([True, True, True, False])) == 0.5
    assert difference_score(reference, teacher, np.array([False, True, True, False])) == -np.inf
    # float64: float32 sums of these would differ.
    big = np.full(4096, 1e4, dtype=np.float32)
    assert difference_score(big + np.float32(2**-9), big) == 2**-9 * np.round(2**9 * ((1e4 + 2**-9) - 1e4))


@pytest.mark.parametrize(
    ("text", "samples", "kept"),
    [("0.8", 10, 8), ("0.8", 99, 79), ("1.0", 7, 7), (".5", 3, 1), ("2", 5, 2), ("5", 5, 5)],
)
def test_how_much_is_kept(text, samples, kept):
    assert Keep.parse(text).of(samples) == kept


@pytest.mark.parametrize("text", ["1", "0", "-3", "1.5", "0.0", "80%", "nan", "inf", "", "1e-1", "-0.5"])
def test_what_keep_does_not_understand(text):
    with pytest.raises(UserError, match=r"--keep: .*expected a share with a point"):
        Keep.parse(text)


@pytest.mark.parametrize(("text", "samples"), [("0.1", 9), ("10", 9)])
def test_nothing_or_more_than_all(text, samples):
    with pytest.raises(UserError, match="expected what keeps 1 to 9"):
        Keep.parse(text).of(samples)


def test_selection_over_blocks_is_the_sort(tmp_path):
    """Ties that end in the middle of a block, at its end, and over many blocks."""
    generator = np.random.default_rng(3)
    for _ in range(200):
        count = int(generator.integers(1, 60))
        scores = Scores(count, directory=tmp_path)
        scores.in_order[:] = generator.choice([-np.inf, -1.5, 0.0, 0.25, 3.0], count)
        scores.sort()
        kept = int(generator.integers(1, count + 1))
        order = sorted(range(count), key=lambda number: (-scores.in_order[number], number))
        threshold, ties = scores.threshold(kept)
        found: list[int] = []
        block = int(generator.integers(1, 9))
        for start in range(0, count, block):
            numbers, ties = scores.selected(start, min(start + block, count), threshold, ties)
            found += numbers.tolist()
        assert found == sorted(order[:kept]) and ties == 0
    assert not list(tmp_path.iterdir())


# What is refused.


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokenizer", "e" * 64), ("sequence_length", 9), ("packing_seed", 6), ("document_mask", True), ("eod_id", 3)],
)
def test_caches_that_differ(source, tmp_path, field, value):
    identity = dataclasses.replace(IDENTITY, reference="r" * 8, **{field: value})
    ReferenceCache.open(tmp_path / "reference", identity=identity, create=True).close()
    with pytest.raises(UserError) as refused:
        select(source._replace(reference=tmp_path / "reference"), tmp_path / "out", "0.8")
    text = str(refused.value)
    assert f"--reference ({field})" in text and str(value) in text and str(getattr(IDENTITY, field)) in text
    assert not (tmp_path / "out.json").exists()


def test_one_model_as_both(source, tmp_path):
    with pytest.raises(UserError, match="scores of the model rrrrrrrr; expected a cache of another model"):
        select(source._replace(teacher=source.reference), tmp_path / "out", "0.8")


def test_scores_that_are_missing_or_damaged(tmp_path):
    source = make_source(tmp_path, sizes=(200,))
    identity = source.data[0].identity
    with pytest.raises(UserError, match="twice"):
        select(source._replace(prefixes=source.prefixes * 2), tmp_path / "out", "0.8")
    other = str(write_corpus(tmp_path / "other", [list(range(1, 40))]))
    with pytest.raises(UserError, match=r"other: found no scores of it in .*teacher; expected one of .*corpus0"):
        select(source._replace(prefixes=[other]), tmp_path / "out", "0.8")
    shard = source.teacher / identity / "00000000.scores"
    content = shard.read_bytes()
    shard.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    last = len(source.data[0]) - 1
    with pytest.raises(UserError, match=rf"teacher: found a damaged score of sample {last} of corpus0"):
        select(source, tmp_path / "out", "0.8")
    shard.write_bytes(content[:4100] + b"\0" + content[4101:])
    with pytest.raises(UserError, match=rf"found {last} of {last + 1} samples scored in .*teacher; expected all"):
        select(source, tmp_path / "out", "0.8")
    shard.write_bytes(content)
    write_corpus(tmp_path / "corpus0", [list(range(1, 100))])
    with pytest.raises(UserError, match=rf"corpus0: found identity .*; expected {identity}, .*the text changed"):
        select(source, tmp_path / "out", "0.8")
    assert not list(tmp_path.glob("*out*"))


def test_a_data_set_that_is_no_selection_of_this_length(source, tmp_path):
    """Read with another sequence length it is text; a manifest that lies is refused."""
    select(source, tmp_path / "out", "20")
    selected = PackedDataset(tmp_path / "out", sequence_length=LENGTH)
    as_text = PackedDataset(tmp_path / "out", sequence_length=LENGTH - 1)
    assert len(as_text) == (20 * (LENGTH + 1) - 1) // (LENGTH - 1)
    manifest = tmp_path / "out.json"
    content = json.loads(manifest.read_text())
    del content["sample_length"]
    manifest.write_text(json.dumps(content))
    packed = PackedDataset(tmp_path / "out", sequence_length=LENGTH)
    assert packed.identity != selected.identity and len(packed) > len(selected)
    manifest.write_text(json.dumps({**content, "sample_length": LENGTH - 1}))
    with pytest.raises(UserError, match="expected documents of 8 tokens each, as sample_length says"):
        PackedDataset(tmp_path / "out", sequence_length=LENGTH - 1)


_SELECT_MANY = """
import resource, sys
sys.path.insert(0, {root!r})
import numpy as np
from remit_megatron.data.miniplm import Scores

count = 8_000_000
generator = np.random.default_rng(0)
allocated = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (allocated + {room}, allocated + {room}))
scores = Scores(count, directory={directory!r})
for start in range(0, count, 1 << 18):
    stop = min(start + (1 << 18), count)
    scores.in_order[start:stop] = np.round(generator.normal(size=stop - start), 4)
scores.sort()
threshold, ties = scores.threshold(count // 2)
kept = 0
for start in range(0, count, 65536):
    numbers, ties = scores.selected(start, min(start + 65536, count), threshold, ties)
    kept += len(numbers)
scores.distribution()
assert kept == count // 2 and ties == 0
"""


def test_millions_of_samples_in_bounded_memory(tmp_path):
    """8 million scores are 64 MB; the process may not allocate as much as that, which an eighth of would not do."""
    for room, works in ((48 << 20, True), (8 << 20, False)):
        code = _SELECT_MANY.format(root=str(ROOT), room=room, directory=str(tmp_path))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert (result.returncode == 0) == works, result.stderr
        assert works or "MemoryError" in result.stderr


def test_the_output_is_none_of_the_data(source, tmp_path):
    for number in range(3):
        for kind in ("bin", "idx", "json"):
            (tmp_path / f"corpus{number}.{kind}").write_bytes(Path(f"{source.prefixes[number]}.{kind}").read_bytes())
    own = source._replace(prefixes=[str(tmp_path / f"corpus{number}") for number in range(3)])
    with pytest.raises(UserError, match=r"--output: found .*corpus1, which is one of --data; expected another prefix"):
        select(own, tmp_path / "corpus1", "0.5", overwrite=True)
    assert read_manifest(tmp_path / "corpus1", verify=True).sample_length is None


def test_a_selection_read_with_another_length_says_so(source, tmp_path, caplog):
    select(source, tmp_path / "out", "0.5")
    PackedDataset(tmp_path / "out", sequence_length=LENGTH)
    assert caplog.records == []
    PackedDataset(tmp_path / "out", sequence_length=LENGTH + 1)
    (record,) = caplog.records
    assert f"samples of sequence length {LENGTH}, packed as texts for {LENGTH + 1}" in record.getMessage()
