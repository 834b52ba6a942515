"""The score cache: round trips, error bounds, several processes, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from remit_megatron.reference import CacheIdentity, ReferenceCache, cache_shard
from remit_megatron.reference import cache as cache_module
from remit_megatron.reference.cache_format import token_hash
from remit_megatron.reference.cache_shard import ShardKey, samples_per_shard
from remit_megatron.reference.score_work import WorkUnit
from remit_megatron.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
LENGTH = 16
IDENTITY = CacheIdentity(
    reference="a" * 64, tokenizer="b" * 64, sequence_length=LENGTH, packing_seed=3, document_mask=True, eod_id=0
)
PINNED = {
    "manifest.json": "e489281f5e731730",
    "dataset.json": "85a237e701b1c94f",
    "00000000.scores": "23a7605cb8677dc3",
}
DATASET, OTHER = "12" * 32, "34" * 32


def tokens_of(sample: int, *, length: int = LENGTH, dataset: str = DATASET) -> np.ndarray:
    return np.random.default_rng([sample, int(dataset[:2])]).integers(0, 2**31, length + 1)


def losses_of(sample: int, *, length: int = LENGTH, dataset: str = DATASET) -> np.ndarray:
    return np.random.default_rng([sample, int(dataset[:2]), 1]).uniform(0, 20, length).astype(np.float32)


def small_shards(monkeypatch: pytest.MonkeyPatch, samples: int = 4, *, length: int = LENGTH, size: int = 2) -> None:
    monkeypatch.setattr(cache_shard, "SHARD_BYTES", samples * length * size)


def make(directory: Path, *, samples: int = 10, dtype: str | None = None, **changes) -> ReferenceCache:
    identity = dataclasses.replace(IDENTITY, **changes)
    cache = ReferenceCache.open(directory, identity=identity, dtype=dtype, create=True)
    cache.add_dataset(DATASET, samples=samples, name="corpus")
    return cache


# Round trips.


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("length", [1, 7, 256])
def test_round_trip(tmp_path, monkeypatch, dtype, length):
    small_shards(monkeypatch, 3, length=length, size=2 if dtype == "uint16" else 4)
    cache = make(tmp_path / "cache", samples=11, dtype=dtype, sequence_length=length)
    written = {}
    for sample in (10, 0, 4, 3, 8):
        tokens, losses = tokens_of(sample, length=length), losses_of(sample, length=length)
        losses[0] = [np.nan, np.inf, -np.inf][sample % 3]
        cache.write(DATASET, sample, tokens, losses)
        written[sample] = tokens, losses
    for opened in (cache, ReferenceCache.open(tmp_path / "cache"), pickle.loads(pickle.dumps(cache))):
        assert (opened.identity, opened.dtype) == (cache.identity, dtype)
        assert opened.datasets() == {DATASET: ("corpus", 11)}
        for sample in range(11):
            if sample not in written:
                assert opened.read(DATASET, sample, tokens_of(sample, length=length)) is None
                continue
            tokens, losses = written[sample]
            found = opened.read(DATASET, sample, tokens)
            assert found.dtype == np.float32 and found.shape == (length,)
            assert np.isnan(found[0]) and np.isfinite(found[1:]).all()
            if dtype == "float32":
                assert found[1:].tobytes() == losses[1:].tobytes()
            else:
                assert np.abs(found[1:].astype(np.float64) - losses[1:]).max(initial=0) <= 2**-12
            assert opened.read_scores(DATASET, sample).tobytes() == found.tobytes()
        assert np.flatnonzero(opened.completeness(DATASET)).tolist() == sorted(written)
        assert opened.damaged == 0
    assert sorted(path.name for path in (tmp_path / "cache" / DATASET).iterdir()) == [
        "00000000.scores",
        "00000001.scores",
        "00000002.scores",
        "00000003.scores",
        "dataset.json",
    ]


def test_completeness_of_some_samples_opens_only_their_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    cache = make(tmp_path / "cache", samples=22)
    for sample in (0, 5, 6, 21):
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
    cache.close()
    opened: list[int] = []
    original = cache_shard.Shard.__init__

    def noted(self, path: Path, key: ShardKey) -> None:
        opened.append(key.index)
        original(self, path, key)

    monkeypatch.setattr(cache_shard.Shard, "__init__", noted)
    asked = np.array([21, 6, 20, 5, 6, 4])
    assert cache.completeness(DATASET, asked).tolist() == [True, True, False, True, True, False]
    assert opened == [1, 5]
    assert cache.completeness(DATASET, np.array([], dtype=np.int64)).tolist() == []
    assert np.flatnonzero(cache.completeness(DATASET)).tolist() == [0, 5, 6, 21]


def test_completeness_of_some_samples_of_a_large_data_set_costs_no_map_of_it(tmp_path, monkeypatch):
    """Whichever way it is found, it is the same; a few samples of twelve million take a few kilobytes."""
    small_shards(monkeypatch, 1000)
    cache = make(tmp_path / "cache", samples=12_200_000)
    generator = np.random.default_rng(0)
    scored = generator.choice(5000, size=300, replace=False)
    for sample in scored.tolist():
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
    few, many = generator.integers(0, 5000, 40), generator.integers(0, 5000, 3_000_000)
    tracemalloc.start()
    found = cache.completeness(DATASET, few)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tolist() == np.isin(few, scored).tolist() and 0 < found.sum() < 40
    assert peak < 100_000
    np.testing.assert_array_equal(cache.completeness(DATASET, many), np.isin(many, scored))


def test_a_piece_of_work_asks_for_its_own_samples_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    cache = make(tmp_path / "cache", samples=22)
    cache.add_dataset(OTHER, samples=9, name="other")
    for dataset, sample in ((DATASET, 3), (DATASET, 17), (OTHER, 8)):
        cache.write(dataset, sample, tokens_of(sample, dataset=dataset), losses_of(sample, dataset=dataset))
    asked: list[tuple[str, list[int]]] = []
    original = ReferenceCache.completeness

    def noted(self, dataset: str, samples: np.ndarray) -> np.ndarray:
        asked.append((dataset, samples.tolist()))
        return original(self, dataset, samples)

    monkeypatch.setattr(ReferenceCache, "completeness", noted)
    unit = WorkUnit("piece", [(1, 8), (0, 17), (1, 0), (0, 2), (0, 3)])
    assert unit.missing(cache, (DATASET, OTHER)) == [(1, 0), (0, 2)]
    assert asked == [(DATASET, [17, 2, 3]), (OTHER, [8, 0])]


def test_error_bounds(tmp_path):
    """2^-12 in the loss over the whole range, and less than 1.3e-4 in a weight of any student."""
    length = 1 << 16
    cache = make(tmp_path / "cache", sequence_length=length)
    losses = np.linspace(0, 65534 / 2048, length, dtype=np.float32)
    cache.write(DATASET, 0, tokens_of(0, length=length), losses)
    stored = cache.read_scores(DATASET, 0)
    assert np.abs(stored.astype(np.float64) - losses).max() <= 2**-12
    # Reference losses as text has them: many small ones, a long tail. The mean moves too.
    generator = np.random.default_rng(0)
    losses = generator.gamma(0.6, 3.0, length).astype(np.float32)
    student = losses + generator.normal(0, 1.5, length)
    cache.write(DATASET, 1, tokens_of(1, length=length), losses)

    def weights(reference: np.ndarray) -> np.ndarray:
        delta = student - reference.astype(np.float64)
        return 2 / (1 + np.exp(-(delta - delta.mean())))

    assert losses.max() < 65534 / 2048
    error = np.abs(weights(cache.read_scores(DATASET, 1)) - weights(losses)).max()
    assert 1e-5 < error < 1.3e-4, error


def test_what_fixed_point_cannot_hold_is_clipped(tmp_path):
    cache = make(tmp_path / "cache", sequence_length=8)
    losses = np.array([-1e-6, -3.0, 31.9995, 32.0, 1e30, np.nan, np.inf, -np.inf], dtype=np.float32)
    cache.write(DATASET, 0, tokens_of(0, length=8), losses)
    top = 65534 / 2048
    expected = np.array([0, 0, top, top, top, np.nan, np.nan, np.nan], dtype=np.float32)
    assert np.array_equal(cache.read_scores(DATASET, 0), expected, equal_nan=True)


def test_float32_is_kept_bit_for_bit(tmp_path):
    cache = make(tmp_path / "cache", sequence_length=6, dtype="float32")
    losses = np.array([-0.0, -1e-7, 1e-42, 123.456, np.inf, np.nan], dtype=np.float32)
    cache.write(DATASET, 0, tokens_of(0, length=6), losses)
    found = cache.read_scores(DATASET, 0)
    assert found[:4].tobytes() == losses[:4].tobytes() and np.isnan(found[4:]).all()


def test_size_on_disk(tmp_path):
    """2.1 bytes a token or less at a sequence length of 256, all in all."""
    samples = 4000
    cache = make(tmp_path / "cache", samples=samples, sequence_length=256)
    for sample in range(samples):
        cache.write(DATASET, sample, tokens_of(sample, length=256), losses_of(sample, length=256))
    cache.close()
    files = [path.stat() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    tokens = samples * 256
    assert 2 * tokens < sum(file.st_size for file in files) <= 2.1 * tokens
    assert sum(file.st_blocks * 512 for file in files) <= 2.1 * tokens


def read_by_the_document(directory: Path, dataset: str, sample: int) -> tuple[bytes, list[float]]:
    """Token hash and scores of a sample, by ``docs/score_cache.md`` alone."""

    def blake(data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=8).digest()

    manifest = json.loads((directory / "manifest.json").read_text())
    digest = manifest.pop("digest")
    assert hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest() == digest
    length, size = manifest["identity"]["sequence_length"], {"uint16": 2, "float32": 4}[manifest["dtype"]]
    samples = json.loads((directory / dataset / "dataset.json").read_text())["samples"]
    per_shard = max(1, 2**28 // (size * length))
    shard = sample // per_shard
    content = (directory / dataset / f"{shard:08d}.scores").read_bytes()
    count = min(per_shard, samples - shard * per_shard)
    fields = struct.unpack_from("<8sII32s32sQQII", content)
    assert fields == (
        *(b"REMITSCO", 1, 4096, bytes.fromhex(digest), bytes.fromhex(dataset)),
        *(shard * per_shard, count, length, {2: 1, 4: 2}[size]),
    )
    assert not any(content[104:4088]) and content[4088:4096] == blake(content[:4088])
    place = sample - shard * per_shard
    assert content[4096 + place] == 1
    entries = (4096 + count + 4095) // 4096 * 4096
    assert len(content) == entries + count * (16 + size * length)
    entry = content[entries + place * (16 + size * length) :][: 16 + size * length]
    tokens, scores = entry[:8], entry[16:]
    assert entry[8:16] == blake(bytes.fromhex(dataset) + struct.pack("<Q", sample) + tokens + scores)
    if size == 4:
        return tokens, list(struct.unpack(f"<{length}f", scores))
    codes = struct.unpack(f"<{length}H", scores)
    return tokens, [math.nan if code == 65535 else code / 2048 for code in codes]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_the_format_is_the_documented_one(tmp_path, dtype):
    length = 1 << 19  # 256 samples a shard in uint16
    cache = make(tmp_path / "cache", samples=258, dtype=dtype, sequence_length=length)
    tokens, losses = tokens_of(257, length=length), losses_of(257, length=length)
    losses[7] = np.nan
    cache.write(DATASET, 257, tokens, losses)
    cache.close()
    found, scores = read_by_the_document(tmp_path / "cache", DATASET, 257)
    assert found == hashlib.blake2b(b"".join(struct.pack("<I", token) for token in tokens), digest_size=8).digest()
    assert math.isnan(scores[7])
    assert np.nanmax(np.abs(np.array(scores) - losses)) <= (2**-12 if dtype == "uint16" else 0)


def test_the_format_has_not_changed(tmp_path):
    """Caches outlive programs: these digests change with the format version only."""
    cache = make(tmp_path / "cache")
    cache.write(DATASET, 4, np.arange(LENGTH + 1), np.arange(LENGTH, dtype=np.float32))
    cache.close()
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file()
    }
    assert found == PINNED


def test_shards_hold_about_256_mib():
    for length in (1, 256, 1000, 4096, 32768):
        for dtype, size in (("uint16", 2), ("float32", 4)):
            assert 0.99 < samples_per_shard(length, dtype) * length * size / 2**28 <= 1
    assert samples_per_shard(1 << 29, "uint16") == 1
    key = ShardKey("00" * 32, DATASET, 2, samples_per_shard(4096, "uint16") * 2 + 5, 4096, "uint16")
    assert (key.first, key.count) == (65536, 5)


def test_writing_again_replaces(tmp_path):
    cache = make(tmp_path / "cache")
    reader = ReferenceCache.open(tmp_path / "cache")
    for losses in (losses_of(1), losses_of(2)):
        cache.write(DATASET, 1, tokens_of(1), losses)
        assert np.abs(reader.read(DATASET, 1, tokens_of(1)) - losses).max() <= 2**-12
    assert reader.completeness(DATASET).sum() == 1


# Use.


def test_needs_neither_torch_nor_megatron():
    code = (
        "import sys, remit_megatron.reference.cache\n"
        "sys.exit(any(name.split('.')[0] in ('torch', 'megatron', 'transformers') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_tokens_that_changed_are_refused(tmp_path):
    cache = make(tmp_path / "cache")
    cache.write(DATASET, 1, tokens_of(1), losses_of(1))
    other = tokens_of(1)
    other[-1] += 1
    with pytest.raises(UserError) as refused:
        cache.read(DATASET, 1, other)
    text = str(refused.value)
    assert token_hash(other).hex() in text and token_hash(tokens_of(1)).hex() in text and "sample 1 of corpus" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reference", "c" * 64),
        ("tokenizer", "c" * 64),
        ("sequence_length", 17),
        ("packing_seed", 4),
        ("document_mask", False),
        ("eod_id", 7),
        ("eod_id", None),
    ],
)
@pytest.mark.parametrize("create", [False, True])
def test_another_identity_is_refused_with_both_values(tmp_path, field, value, create):
    make(tmp_path / "cache").close()
    with pytest.raises(UserError) as refused:
        ReferenceCache.open(tmp_path / "cache", identity=dataclasses.replace(IDENTITY, **{field: value}), create=create)
    assert refused.value.field == f"{tmp_path / 'cache'} ({field})"
    assert refused.value.found == getattr(IDENTITY, field) and str(value) in refused.value.expected
    assert "\n" not in str(refused.value)


def test_every_field_of_the_identity_has_such_a_test():
    marks = test_another_identity_is_refused_with_both_values.pytestmark
    tested = {value[0] for mark in marks for value in mark.args[1] if mark.args[0] == ("field", "value")}
    assert tested == {field.name for field in dataclasses.fields(CacheIdentity)}


def test_another_dtype_is_refused_with_both_values(tmp_path):
    make(tmp_path / "cache").close()
    with pytest.raises(UserError, match=r"\(dtype\): found uint16; expected float32"):
        ReferenceCache.open(tmp_path / "cache", identity=IDENTITY, dtype="float32", create=True)
    with pytest.raises(UserError, match="found int8; expected uint16 or float32"):
        ReferenceCache.open(tmp_path / "cache", dtype="int8")


def test_a_text_that_changed_is_refused_with_both_identities(tmp_path):
    cache = make(tmp_path / "cache")
    cache.add_dataset(DATASET, samples=10, name="corpus")
    cache.add_dataset(DATASET, samples=10, name="another name of the same text")
    cache.add_dataset(OTHER, samples=5, name="other")
    with pytest.raises(UserError) as refused:
        cache.add_dataset("56" * 32, samples=10, name="corpus")
    assert DATASET in str(refused.value) and "56" * 32 in str(refused.value) and "data set corpus" in str(refused.value)
    assert cache.datasets() == {DATASET: ("corpus", 10), OTHER: ("other", 5)}
    with pytest.raises(UserError, match=r"found 10 samples; expected 11"):
        cache.add_dataset(DATASET, samples=11, name="corpus")


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: found no such file"):
        ReferenceCache.open(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    cache = make(tmp_path / "cache")
    assert cache.read(OTHER, 0, tokens_of(0)) is None
    with pytest.raises(UserError, match=f"no data set {OTHER}.*it has corpus"):
        cache.completeness(OTHER)
    assert not cache.completeness(DATASET).any()
    with pytest.raises(IndexError, match="sample 10 of 10"):
        cache.read(DATASET, 10, tokens_of(0))
    with pytest.raises(IndexError, match="sample -1 of 10"):
        cache.write(DATASET, -1, tokens_of(0), losses_of(0))


def test_misuse(tmp_path):
    cache = make(tmp_path / "cache")
    with pytest.raises(ValueError, match="identity: found None"):
        ReferenceCache.open(tmp_path / "cache", create=True)
    with pytest.raises(ValueError, match="add_dataset before write"):
        cache.write(OTHER, 0, tokens_of(0), losses_of(0))
    with pytest.raises(ValueError, match="64 hexadecimal"):
        cache.read("../elsewhere", 0, tokens_of(0))
    with pytest.raises(ValueError, match=r"tokens: found int64 \(16,\)"):
        cache.write(DATASET, 0, tokens_of(0)[1:], losses_of(0))
    with pytest.raises(ValueError, match="tokens: found float64"):
        cache.read(DATASET, 0, tokens_of(0).astype(float))
    with pytest.raises(ValueError, match="below 2"):
        cache.write(DATASET, 0, tokens_of(0) + 2**32, losses_of(0))
    with pytest.raises(ValueError, match=r"losses: found shape \(15,\)"):
        cache.write(DATASET, 0, tokens_of(0), losses_of(0)[1:])
    with pytest.raises(ValueError, match="samples: found 0"):
        cache.add_dataset(OTHER, samples=0, name="other")
    with pytest.raises(ValueError, match="document_mask"):
        dataclasses.replace(IDENTITY, document_mask=1)
    assert not cache.completeness(DATASET).any()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder with room"):
        make(tmp_path / "file")


def test_open_shards_are_bounded(tmp_path, monkeypatch):
    """Ten times as many shards as may be open: all is read, and files do not pile up."""
    small_shards(monkeypatch, 1)
    monkeypatch.setattr("remit_megatron.reference.cache._open_shards", lambda: 4)
    before = len(os.listdir("/proc/self/fd"))
    cache = make(tmp_path / "cache", samples=40)
    for sample in range(40):
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
    for sample in np.random.default_rng(0).permutation(40):
        assert np.abs(cache.read(DATASET, int(sample), tokens_of(sample)) - losses_of(sample)).max() <= 2**-12
    assert len(os.listdir("/proc/self/fd")) <= before + 8
    cache.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert cache.read(DATASET, 3, tokens_of(3)) is not None


@pytest.mark.parametrize(
    ("soft_limit", "expected"),
    [(256, 64), (1024, 128), (4096, 512), (1 << 20, 1024), (resource.RLIM_INFINITY, 1024)],
)
def test_how_many_shards_may_be_open(monkeypatch, soft_limit, expected):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft_limit, resource.RLIM_INFINITY))
    assert cache_module._open_shards() == expected


def test_a_shard_that_is_put_away_is_synced_by_the_next_flush(tmp_path, monkeypatch):
    """Writes in random order sync nothing; a flush syncs every file that was written, open or not, and each once."""
    small_shards(monkeypatch, 1)
    monkeypatch.setattr(cache_module, "_open_shards", lambda: 4)
    cache = make(tmp_path / "cache", samples=20)
    for sample in range(20):
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
    cache.flush()
    synced: list[int] = []
    original = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    generator = np.random.default_rng(0)
    written = generator.permutation(20)[:15].tolist()
    for sample in generator.permutation(written * 2).tolist():
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
    cache.forget(DATASET, written[0])
    for sample in range(20):
        cache.read_scores(DATASET, sample)
    assert not synced
    shards = [tmp_path / "cache" / DATASET / f"{sample:08d}.scores" for sample in written]
    shards[1].unlink()
    cache.flush()
    assert sorted(synced) == sorted(path.stat().st_ino for path in shards if path.exists())
    synced.clear()
    cache.close()
    assert not synced


def test_a_sync_that_fails_is_tried_again(tmp_path, monkeypatch):
    small_shards(monkeypatch, 1)
    monkeypatch.setattr(cache_module, "_open_shards", lambda: 2)
    cache = make(tmp_path / "cache", samples=6)
    for sample in range(6):
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
    original, calls = os.fsync, []

    def fails(descriptor: int) -> None:
        calls.append(os.fstat(descriptor).st_ino)
        if len(calls) == 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match="Input/output error"):
        cache.flush()
    cache.flush()
    everything = {path.stat().st_ino for path in (tmp_path / "cache" / DATASET).glob("*.scores")}
    assert set(calls) == everything and len(calls) == 7


# Several processes.

_WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from remit_megatron.reference import cache_shard
from tests.unit.reference.test_cache import DATASET, IDENTITY, losses_of, make, tokens_of
cache_shard.SHARD_BYTES = {shard}
start, step, samples = map(int, sys.argv[2:])
while not Path(sys.argv[1] + ".go").exists():
    time.sleep(0.001)
cache = make(Path(sys.argv[1]), samples=samples)
for sample in range(start, samples, step):
    cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
cache.close()
"""


def start_writer(directory: Path, *, start: int, step: int, samples: int, shard_samples: int) -> subprocess.Popen:
    code = _WRITER.format(root=str(ROOT), shard=shard_samples * LENGTH * 2)
    arguments = [str(directory), str(start), str(step), str(samples)]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)


def test_several_processes_fill_one_cache_and_a_reader_sees_it(tmp_path, monkeypatch):
    """Neighbors in every shard are written by different processes, which also race to make manifest and shards."""
    samples, writers, per_shard = 1200, 4, 50
    small_shards(monkeypatch, per_shard)
    directory = tmp_path / "cache"
    processes = [
        start_writer(directory, start=number, step=writers, samples=samples, shard_samples=per_shard)
        for number in range(writers)
    ]
    reader = make(directory, samples=samples)
    assert not reader.completeness(DATASET).any()
    assert reader.read(DATASET, 0, tokens_of(0)) is None
    Path(f"{directory}.go").touch()
    seen = set()
    while any(process.poll() is None for process in processes):
        for sample in np.flatnonzero(reader.completeness(DATASET))[::17]:
            found = reader.read(DATASET, int(sample), tokens_of(sample))
            assert found is not None and np.abs(found - losses_of(sample)).max() <= 2**-12
            seen.add(int(sample))
    for process in processes:
        assert process.communicate()[1] == "" and process.returncode == 0
    assert reader.completeness(DATASET).all() and reader.damaged == 0
    for sample in range(samples):
        assert np.abs(reader.read(DATASET, sample, tokens_of(sample)) - losses_of(sample)).max() <= 2**-12
    assert not [path for path in directory.rglob("*") if path.name.endswith(".tmp")]
    assert len(list((directory / DATASET).glob("*.scores"))) == math.ceil(samples / per_shard)


def test_forked_workers_read(tmp_path):
    """As data loader workers do: the object is made before the fork."""
    cache = make(tmp_path / "cache", samples=64)
    for sample in range(64):
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
    cache.read(DATASET, 0, tokens_of(0))
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            good = False
            try:
                good = all(
                    np.abs(cache.read(DATASET, sample, tokens_of(sample)) - losses_of(sample)).max() <= 2**-12
                    for sample in range(number, 64, 2)
                )
            finally:
                os._exit(0 if good else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert cache.read(DATASET, 5, tokens_of(5)) is not None


_WALK = """
import sys
import numpy as np
from pathlib import Path
sys.path.insert(0, {root!r})
from remit_megatron.reference import ReferenceCache
from tests.unit.reference.test_cache import DATASET, tokens_of

def memory():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return np.array([int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon")]) / 1024

cache = ReferenceCache.open({directory!r})
tokens = tokens_of(0, length=4096)
order = np.random.default_rng(0).permutation({samples}).tolist()
for sample in order[:300]:
    cache.read(DATASET, sample, tokens)
before, peak = memory(), np.zeros(2)
for number, sample in enumerate(order):
    assert cache.read(DATASET, sample, tokens) is not None
    if number % 50 == 0:
        peak = np.maximum(peak, memory() - before)
print(*peak)
"""


def test_memory_of_a_reader_stays_flat(tmp_path):
    """A walk over 128 MiB of scores."""
    samples = 16384
    cache = make(tmp_path / "cache", samples=samples, sequence_length=4096)
    tokens, losses = tokens_of(0, length=4096), losses_of(0, length=4096)
    for sample in range(samples):
        cache.write(DATASET, sample, tokens, losses)
    code = _WALK.format(root=str(ROOT), directory=str(tmp_path / "cache"), samples=samples)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    resident, anonymous = map(float, result.stdout.split())
    assert anonymous < 2, f"{anonymous} MiB of anonymous memory"
    assert resident < 40, f"{resident} MiB resident"
