"""Damage to a score cache: each is refused in one line or reported as missing, can be repaired, and none is used."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from remit_megatron.reference import ReferenceCache, cache_shard
from remit_megatron.reference.cache_shard import ENTRY_HEADER_BYTES, HEADER_BYTES, ShardKey
from remit_megatron.runtime.errors import UserError
from tests.unit.reference.test_cache import (
    DATASET,
    IDENTITY,
    LENGTH,
    OTHER,
    ROOT,
    losses_of,
    make,
    small_shards,
    start_writer,
    tokens_of,
)

SEEDS = 24
PER_SHARD = 8
DATASETS = {DATASET: ("corpus", 20), OTHER: ("other", 16)}  # 3 shards (8, 8, 4) and 2
UNSCORED = {(DATASET, 3), (DATASET, 17), (OTHER, 8)}
EVERY = [(dataset, sample) for dataset, (_, samples) in DATASETS.items() for sample in range(samples)]
Files = dict[str, list[Path]]


def fill(directory: Path, places, **changes) -> ReferenceCache:
    identity = dataclasses.replace(IDENTITY, **changes)
    cache = ReferenceCache.open(directory, identity=identity, create=True)
    for dataset, (name, samples) in DATASETS.items():
        cache.add_dataset(dataset, samples=samples, name=name)
    for dataset, sample in places:
        cache.write(dataset, sample, tokens_of(sample, dataset=dataset), losses_of(sample, dataset=dataset))
    cache.close()
    return cache


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """The cache that each test damages a copy of, and beside it one of another reference with all the same samples."""
    folder = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch, PER_SHARD)
        fill(folder / "cache", [place for place in EVERY if place not in UNSCORED])
        fill(folder / "whole", EVERY)
        fill(folder / "foreign", EVERY, reference="e" * 64)
        fill(folder / "foreign_tokenizer", EVERY, tokenizer="e" * 64)
    return folder


@pytest.fixture
def damaged_copy(pristine, tmp_path, monkeypatch) -> Callable[[], Path]:
    small_shards(monkeypatch, PER_SHARD)
    numbers = itertools.count()

    def copy() -> Path:
        return Path(shutil.copytree(pristine / "cache", tmp_path / str(next(numbers)) / "cache"))

    return copy


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.scores"))


def key_of(shard: Path, directory: Path) -> ShardKey:
    cache = ReferenceCache.open(directory)
    dataset = shard.parent.name
    return ShardKey(cache._digest, dataset, int(shard.stem), DATASETS[dataset][1], LENGTH, "uint16")


def flip(path: Path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


class Outcome:
    """What a run sees of a cache: which reads were refused, which samples are missing, which were read.

    Every score that is read is compared with the truth, bit for bit, and samples that are ``unscored`` must have none.
    """

    def __init__(self, directory: Path, pristine: Path, *, unscored: set[tuple[str, int]] = UNSCORED):
        truth = ReferenceCache.open(pristine.parent / "whole")
        self.refused: list[UserError] = []
        self.missing: set[tuple[str, int]] = set()
        self.read: set[tuple[str, int]] = set()
        self.damaged = 0
        try:
            cache = ReferenceCache.open(directory, identity=IDENTITY, dtype="uint16")
        except UserError as error:
            self.refused.append(error)
            return
        for dataset, sample in EVERY:
            try:
                scores = cache.read(dataset, sample, tokens_of(sample, dataset=dataset))
            except UserError as error:
                self.refused.append(error)
                continue
            if scores is None:
                self.missing.add((dataset, sample))
                continue
            assert (dataset, sample) not in unscored, f"a score of sample {sample}, which has none"
            assert scores.tobytes() == truth.read_scores(dataset, sample).tobytes(), f"a wrong score of {sample}"
            self.read.add((dataset, sample))
        self.damaged = cache.damaged
        for error in self.refused:
            assert "\n" not in str(error) and str(directory) in error.field

    @property
    def noticed(self) -> bool:
        return bool(self.refused or self.missing - UNSCORED or self.damaged)


def repair(directory: Path, pristine: Path) -> None:
    """What a person and `remit score` do: remove the files that are named, then score what is missing."""
    for _ in range(10):
        outcome = Outcome(directory, pristine, unscored=set())
        if not outcome.refused and not outcome.missing:
            break
        for error in outcome.refused:
            path = Path(error.field.split(" (")[0])
            assert path.is_relative_to(directory) and path != directory
            path.unlink(missing_ok=True)
        with suppress(UserError):  # of files that have not been named yet
            fill(directory, outcome.missing)
    final = Outcome(directory, pristine, unscored=set())
    assert final.read == set(EVERY) and not final.refused and not final.damaged


def offset_in(section: str, key: ShardKey, generator: np.random.Generator, *, scored: bool = True) -> tuple[int, int]:
    """A random byte of a section of a shard, of a scored sample, and that sample's number."""
    places = [place for place in range(key.count) if ((key.dataset, key.first + place) in UNSCORED) != scored]
    place = int(generator.choice(places))
    sample = key.first + place
    start, size = {
        "map": (key.complete_at(sample), 1),
        "record": (key.entry_at(sample), ENTRY_HEADER_BYTES),
        "scores": (key.entry_at(sample) + ENTRY_HEADER_BYTES, key.entry_bytes - ENTRY_HEADER_BYTES),
    }[section]
    return start + int(generator.integers(size)), sample


# Each damages a copy. Returns what must be noticed: "refused", "missing", or either (None).
Damage = Callable[[Path, Path, np.random.Generator], str | None]


def flipped(section: str) -> Damage:
    def damage(directory: Path, _: Path, generator: np.random.Generator) -> str | None:
        bit = int(generator.integers(8))
        if section in ("manifest.json", "dataset.json"):
            path = generator.choice(sorted(directory.rglob(section)))
            content = path.read_bytes()
            # White space between the parts of JSON may become other white space: no damage.
            meaning = [i for i, byte in enumerate(content) if not chr(byte).isspace()]
            flip(path, int(generator.choice(meaning)), bit)
            return "refused"
        shard = generator.choice(shards(directory))
        if section == "header":
            flip(shard, int(generator.integers(HEADER_BYTES)), bit)
            return "refused"
        flip(shard, offset_in(section, key_of(shard, directory), generator)[0], bit)
        return "missing"

    return damage


def completed_by_a_flip(directory: Path, _: Path, generator: np.random.Generator) -> str:
    dataset, sample = sorted(UNSCORED)[int(generator.integers(len(UNSCORED)))]
    shard = directory / dataset / f"{sample // PER_SHARD:08d}.scores"
    flip(shard, HEADER_BYTES + sample % PER_SHARD, 0)
    return "missing"


def truncated(directory: Path, _: Path, generator: np.random.Generator) -> str:
    path = generator.choice([path for path in sorted(directory.rglob("*")) if path.is_file()])
    content = path.read_bytes().rstrip() if path.suffix == ".json" else path.read_bytes()
    path.write_bytes(content[: int(generator.integers(len(content)))])
    return "refused"


def lengthened(directory: Path, _: Path, generator: np.random.Generator) -> str:
    path = generator.choice([path for path in sorted(directory.rglob("*")) if path.is_file()])
    path.write_bytes(path.read_bytes() + generator.bytes(int(generator.integers(1, 5000))))
    return "refused"


def overwritten(directory: Path, _: Path, generator: np.random.Generator) -> None:
    """A block of zeros or of noise over the header, or over scores and what is behind them, as a bad disk leaves it."""
    shard = generator.choice(shards(directory))
    key, content = key_of(shard, directory), bytearray(shard.read_bytes())
    sample = offset_in("scores", key, generator)[1]
    start = int(generator.choice([generator.integers(100), key.entry_at(sample)]))
    size = min(int(generator.integers(LENGTH, 4096)), len(content) - start)
    content[start : start + size] = bytes(size) if generator.integers(2) else generator.bytes(size)
    shard.write_bytes(content)


def swapped(directory: Path, pristine: Path, generator: np.random.Generator) -> str:
    """Two shards change places: of one data set, of two, or with a cache of another reference or tokenizer."""
    first, second = generator.choice(shards(directory), 2, replace=False)
    if generator.integers(3) == 0:
        foreign = pristine.parent / str(generator.choice(["foreign", "foreign_tokenizer"]))
        shutil.copy(foreign / first.relative_to(directory), first)
    elif generator.integers(3) == 0:
        shutil.copy(first, second)
    else:
        first.rename(directory / "aside")
        second.rename(first)
        (directory / "aside").rename(second)
    return "refused"


def scores_moved(directory: Path, _: Path, generator: np.random.Generator) -> str:
    """Two samples of a shard change places."""
    shard = generator.choice(shards(directory))
    key, content = key_of(shard, directory), bytearray(shard.read_bytes())
    pair = [key.first + place for place in range(key.count) if (key.dataset, key.first + place) not in UNSCORED]
    pair = generator.choice(pair, 2, replace=False)
    one, other = (slice(key.entry_at(sample), key.entry_at(sample) + key.entry_bytes) for sample in pair)
    content[one], content[other] = content[other], content[one]
    shard.write_bytes(content)
    return "missing"


def folders_swapped(directory: Path, pristine: Path, generator: np.random.Generator) -> str:
    if generator.integers(2):
        (directory / DATASET).rename(directory / "aside")
        (directory / OTHER).rename(directory / DATASET)
        (directory / "aside").rename(directory / OTHER)
    else:
        dataset = str(generator.choice([DATASET, OTHER]))
        shutil.rmtree(directory / dataset)
        shutil.copytree(pristine.parent / "foreign" / dataset, directory / dataset)
    return "refused"


def stale_manifest(directory: Path, pristine: Path, generator: np.random.Generator) -> str:
    """The manifest of another cache: its identity differs; or the whole rest is another's, below a right manifest."""
    if generator.integers(2):
        shutil.copy(pristine.parent / "foreign" / "manifest.json", directory)
    else:
        shutil.rmtree(directory)
        shutil.copytree(pristine.parent / "foreign", directory)
        shutil.copy(pristine / "manifest.json", directory)
    return "refused"


def missing_file(directory: Path, _: Path, generator: np.random.Generator) -> None:
    path = generator.choice([path for path in sorted(directory.rglob("*")) if path.is_file()])
    path.unlink()


def torn_write(directory: Path, _: Path, generator: np.random.Generator) -> str:
    """A power cut after which the completeness byte has reached the disk, and of the rest a part."""
    dataset, sample = sorted(UNSCORED)[int(generator.integers(len(UNSCORED)))]
    shard = directory / dataset / f"{sample // PER_SHARD:08d}.scores"
    key, old = key_of(shard, directory), shard.read_bytes()
    fill(directory, [(dataset, sample)])
    content = bytearray(shard.read_bytes())
    start, size = key.entry_at(sample), key.entry_bytes
    lost = int(generator.integers(size))  # bytes from here on are the old ones
    content[start + lost : start + size] = old[start + lost : start + size]
    if content[start : start + size] == shard.read_bytes()[start : start + size]:
        content[start : start + size] = old[start : start + size]
    shard.write_bytes(content)
    return "missing"


DAMAGES: dict[str, Damage] = {
    "manifest": flipped("manifest.json"),
    "dataset record": flipped("dataset.json"),
    "header": flipped("header"),
    "map": flipped("map"),
    "record": flipped("record"),
    "scores": flipped("scores"),
    "map, 0 to 1": completed_by_a_flip,
    "truncation": truncated,
    "appended bytes": lengthened,
    "overwritten block": overwritten,
    "swapped shards": swapped,
    "moved scores": scores_moved,
    "swapped folders": folders_swapped,
    "stale manifest": stale_manifest,
    "missing file": missing_file,
    "torn write": torn_write,
}
REPAIRABLE = DAMAGES.keys() - {"stale manifest", "swapped folders"}  # these mean that somebody mixed two caches up


def test_there_are_enough_damages():
    assert SEEDS * len(DAMAGES) >= 200


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_noticed_and_never_used(damaged_copy, pristine, kind, caplog):
    caplog.set_level(logging.ERROR)
    for seed in range(SEEDS):
        directory = damaged_copy()
        generator = np.random.default_rng([seed, list(DAMAGES).index(kind)])
        expected = DAMAGES[kind](directory, pristine / "cache", generator)
        outcome = Outcome(directory, pristine / "cache")
        assert outcome.noticed, (kind, seed)
        if expected is not None:
            assert bool(outcome.refused) == (expected == "refused"), (kind, seed, outcome.refused)
        if kind in REPAIRABLE:
            repair(directory, pristine / "cache")


def test_an_undamaged_cache_gives_everything(damaged_copy, pristine):
    outcome = Outcome(damaged_copy(), pristine / "cache")
    assert not outcome.noticed
    assert outcome.missing == UNSCORED and outcome.read == set(EVERY) - UNSCORED


def test_a_damaged_sample_is_warned_of_once_and_counted(damaged_copy, caplog):
    directory = damaged_copy()
    shard = directory / DATASET / "00000000.scores"
    key = key_of(shard, directory)
    flip(shard, key.entry_at(0) + 25, 3)
    cache = ReferenceCache.open(directory)
    for _ in range(3):
        assert cache.read(DATASET, 0, tokens_of(0)) is None
    assert cache.damaged == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{directory}, sample 0 of corpus: damaged (its checksum differs), so it counts as missing"
    ]
    assert cache.completeness(DATASET)[0]
    assert np.flatnonzero(~cache.intact(DATASET)).tolist() == [0, 3, 17]
    cache.write(DATASET, 0, tokens_of(0), losses_of(0))
    assert cache.read(DATASET, 0, tokens_of(0)) is not None


def test_a_file_shortened_under_a_reader_is_refused(damaged_copy):
    directory = damaged_copy()
    cache = ReferenceCache.open(directory)
    assert cache.read(DATASET, 0, tokens_of(0)) is not None
    os.truncate(directory / DATASET / "00000000.scores", 5000)
    with pytest.raises(UserError, match=r"00000000\.scores: found 5000 bytes; expected \d+; remove the file"):
        cache.read(DATASET, 0, tokens_of(0))


def test_another_version_is_refused(damaged_copy, monkeypatch):
    directory = damaged_copy()
    monkeypatch.setattr("remit_megatron.reference.cache_format.FORMAT_VERSION", 2)
    with pytest.raises(UserError, match="version 1; expected format 'remit-scores', version 2"):
        ReferenceCache.open(directory)


def test_writers_killed_at_any_moment(tmp_path, monkeypatch):
    """SIGKILL: what is complete is right, everything else is missing, and the next writer goes on."""
    samples, per_shard = 1500, 60
    small_shards(monkeypatch, per_shard)
    directory = tmp_path / "cache"
    cache = make(directory, samples=samples)
    Path(f"{directory}.go").touch()
    for delay in (0.0, 0.003, 0.01, 0.02):
        before = int(cache.completeness(DATASET).sum())
        process = start_writer(directory, start=before, step=1, samples=samples, shard_samples=per_shard)
        deadline = time.monotonic() + 60
        while cache.completeness(DATASET).sum() == before:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        complete = ReferenceCache.open(directory, identity=IDENTITY).completeness(DATASET)
        assert before < complete.sum() < samples
        for sample in range(before, min(samples, int(complete.sum()) + 5)):
            scores = cache.read(DATASET, sample, tokens_of(sample))
            assert (scores is not None) == complete[sample]
            assert scores is None or np.abs(scores - losses_of(sample)).max() <= 2**-12
    for sample in np.flatnonzero(~cache.completeness(DATASET)).tolist():
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
    assert cache.completeness(DATASET).all()
    assert all(cache.read(DATASET, sample, tokens_of(sample)) is not None for sample in range(samples))
    assert cache.damaged == 0


_KILLED_WHILE_MAKING = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from remit_megatron.runtime import files
from tests.unit.reference.test_cache import DATASET, losses_of, make, tokens_of
cache = make(Path({directory!r}))
os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cache.write(DATASET, 0, tokens_of(0), losses_of(0))
"""


def test_a_shard_half_made_when_its_maker_was_killed(tmp_path):
    directory = tmp_path / "cache"
    code = _KILLED_WHILE_MAKING.format(root=str(ROOT), directory=str(directory))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [path.suffix for path in (directory / DATASET).glob(".*")] == [".tmp"]
    cache = make(directory)
    assert not cache.completeness(DATASET).any() and cache.read(DATASET, 0, tokens_of(0)) is None
    cache.write(DATASET, 0, tokens_of(0), losses_of(0))
    assert cache.read(DATASET, 0, tokens_of(0)) is not None
    assert cache_shard.Shard(directory / DATASET / "00000000.scores", key_of_ten(directory)).key.count == 10


def key_of_ten(directory: Path) -> ShardKey:
    return ShardKey(ReferenceCache.open(directory)._digest, DATASET, 0, 10, LENGTH, "uint16")
