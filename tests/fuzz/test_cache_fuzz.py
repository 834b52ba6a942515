"""Score caches with damaged files: what is read is what was written, or missing, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remit_megatron.reference import ReferenceCache
from remit_megatron.reference.cache import CacheIdentity
from tests.fuzz.damage import REFUSED, damaged, examples, handled

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


def use(folder: Path) -> int:
    """Reads everything; the number of samples that were there, each with its right scores."""
    found = 0
    with ReferenceCache.open(folder, identity=IDENTITY) as cache:
        for sample in range(SAMPLES):
            scores = cache.read(DATASET, sample, TOKENS[sample])
            assert scores is None or (sample != UNSCORED and np.array_equal(scores, LOSSES[sample])), sample
            found += scores is not None
        names = [record.name for record in cache.datasets().values()]
        if names:
            assert names == ["corpus"]
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
