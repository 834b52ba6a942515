"""Score caches with damaged files: what is read is what was written, or missing, or refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remit_megatron.reference import ReferenceCache
from remit_megatron.reference.cache import CacheIdentity
from remit_megatron.reference.cache_format import checksum, token_hash
from tests.fuzz.damage import REFUSED, altered, damaged, examples, handled

LENGTH, SAMPLES, DATASET = 5, 6, "ab" * 32
IDENTITY = CacheIdentity(
    reference="r", tokenizer="t", sequence_length=LENGTH, packing_seed=0, document_mask=False, eod_id=0
)
FILES = ("manifest.json", f"{DATASET}/dataset.json", f"{DATASET}/00000000.scores")
TOKENS = np.arange(SAMPLES * (LENGTH + 1)).reshape(SAMPLES, LENGTH + 1)
LOSSES = (np.arange(SAMPLES * LENGTH).reshape(SAMPLES, LENGTH) / 8).astype(np.float32)
UNSCORED = 4


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "pristine"
    with ReferenceCache.open(folder, identity=IDENTITY, create=True) as cache:
        cache.add_dataset(DATASET, samples=SAMPLES, name="corpus")
        for sample in set(range(SAMPLES)) - {UNSCORED}:
            cache.write(DATASET, sample, TOKENS[sample], LOSSES[sample])
    return folder


def use(folder: Path, *, name: object = None) -> int:
    """Reads everything; the number of samples that were there, each with its right scores. ``name`` is what the record
    of the data set calls it where that is no longer `corpus`."""
    found = 0
    with ReferenceCache.open(folder, identity=IDENTITY) as cache:
        for sample in range(SAMPLES):
            scores = cache.read(DATASET, sample, TOKENS[sample])
            assert scores is None or (sample != UNSCORED and np.array_equal(scores, LOSSES[sample])), sample
            found += scores is not None
        names = [record.name for record in cache.datasets().values()]
        if names:
            assert names in (["corpus"], [str(name)])
            assert cache.intact(DATASET).sum() == found
    return found


def test_the_pristine_cache_is_whole(pristine):
    assert use(pristine) == SAMPLES - 1


@pytest.mark.parametrize("file", FILES)
@examples(60)
@given(data=st.data())
def test_damage(pristine, tmp_path_factory, file, data):
    folder = tmp_path_factory.mktemp("damaged") / "cache"
    shutil.copytree(pristine, folder)
    original = (folder / file).read_bytes()
    # Half of the damage goes where the numbers are: a shard is mostly a page of zeros.
    if file.endswith(".scores") and data.draw(st.booleans()):
        start = original.rindex(b"\1") // 4096 * 4096
        (folder / file).write_bytes(original[:start] + data.draw(damaged(original[start:])))
    else:
        (folder / file).write_bytes(data.draw(damaged(original)))
    found = handled(lambda: use(folder))
    assert found is REFUSED or found <= SAMPLES - 1
    shutil.rmtree(folder)


def sealed(content: object) -> bytes:
    """A record whose digest is right, whatever it says: as another version, or a hand with a tool, might write it."""
    if not isinstance(content, dict):
        return json.dumps(content).encode()
    rest = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps(rest | {"digest": hashlib.sha256(text.encode()).hexdigest()}).encode()


@pytest.mark.parametrize("file", FILES[:2])
@examples(100)
@given(data=st.data())
def test_records_that_are_sealed(pristine, tmp_path_factory, file, data):
    """Past the digest: the fields themselves are looked at."""
    folder = tmp_path_factory.mktemp("altered") / "cache"
    shutil.copytree(pristine, folder)
    content = json.loads((folder / file).read_bytes())
    content.pop("digest")
    changed = data.draw(altered(content))
    (folder / file).write_bytes(sealed(changed))
    found = handled(lambda: use(folder, name=changed.get("name") if isinstance(changed, dict) else None))
    assert found is REFUSED or found <= SAMPLES - 1
    shutil.rmtree(folder)


HEADER = struct.Struct("<8sII32s32sQQII")


@examples(150)
@given(
    field=st.integers(0, 8),
    value=st.sampled_from((0, 1, 2, 3, 5, 6, 7, 4096, 8192, 2**31)),
    behind=st.booleans(),
)
def test_headers_that_are_sealed(pristine, tmp_path_factory, field, value, behind):
    """Past a shard's checksum: each field is compared."""
    folder = tmp_path_factory.mktemp("altered") / "cache"
    shutil.copytree(pristine, folder)
    content = bytearray((folder / FILES[2]).read_bytes())
    fields = list(HEADER.unpack_from(content))
    before = fields[field]
    fields[field] = value.to_bytes(len(before), "little") if isinstance(before, bytes) else value
    page = HEADER.pack(*fields).ljust(4088, b"\1" if behind else b"\0")
    content[:4096] = page + hashlib.blake2b(page, digest_size=8).digest()
    (folder / FILES[2]).write_bytes(content)
    found = handled(lambda: use(folder))
    assert found is REFUSED if behind or fields[field] != before else found == SAMPLES - 1
    shutil.rmtree(folder)


@examples(100)
@given(data=st.data())
def test_entries_in_other_places(pristine, tmp_path_factory, data):
    """An entry of another sample, of another data set, or half of one: each is whole by itself, and none is taken."""
    folder = tmp_path_factory.mktemp("moved") / "cache"
    shutil.copytree(pristine, folder)
    content = bytearray((folder / FILES[2]).read_bytes())
    size = 16 + LENGTH * 2
    start = len(content) - size * SAMPLES
    one, other = data.draw(st.integers(0, SAMPLES - 1)), data.draw(st.integers(0, SAMPLES - 1))
    places = [slice(start + number * size, start + (number + 1) * size) for number in (one, other)]
    kind = data.draw(st.sampled_from(("moved", "halves", "other data set", "complete")))
    if kind == "moved":
        content[places[0]], content[places[1]] = content[places[1]], content[places[0]]
    elif kind == "halves":
        cut = data.draw(st.integers(1, size - 1))
        content[places[0].start : places[0].start + cut] = content[places[1].start : places[1].start + cut]
    elif kind == "other data set":
        scores, tokens = bytes(2 * LENGTH), token_hash(TOKENS[one])
        content[places[0]] = tokens + checksum(b"\xcd" * 32, one, tokens, scores) + scores
    else:
        content[4096 + one] = 1
    (folder / FILES[2]).write_bytes(content)
    found = handled(lambda: use(folder))
    assert found is REFUSED or found <= SAMPLES - 1
    shutil.rmtree(folder)
