"""The writer beside the training: what it takes is on disk after a flush, and nothing that it meets ends a run."""

from __future__ import annotations

import errno
import logging
import os

import numpy as np
import pytest
import torch

from remit_megatron.reference import ReferenceCache
from remit_megatron.reference.score_writer import ScoreWriter
from tests.unit.reference.test_cache import DATASET, losses_of, make, small_shards, tokens_of
from tests.unit.reference.test_cache_missing import microbatch

SAMPLES = 12


def put(writer: ScoreWriter, *samples: int) -> None:
    writer.put([microbatch(*samples)], [torch.from_numpy(np.stack([losses_of(sample) for sample in samples]))])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_was_put_is_there_after_a_flush(tmp_path):
    make(tmp_path / "cache", samples=SAMPLES).close()
    writer = ScoreWriter(ReferenceCache.open(tmp_path / "cache"), [DATASET])
    put(writer, 3, 4)
    put(writer, 4, 11)
    writer.flush()
    reader = ReferenceCache.open(tmp_path / "cache")
    assert np.flatnonzero(reader.completeness(DATASET)).tolist() == [3, 4, 11] and writer.written == 3
    assert np.abs(reader.read(DATASET, 11, tokens_of(11)) - losses_of(11)).max() <= 2**-12
    writer.close()
    assert writer.failure is None


@pytest.mark.parametrize("flushed", [False, True])
def test_a_disk_that_fills_up_ends_the_writing_and_nothing_else(tmp_path, monkeypatch, caplog, flushed):
    """Several shards, each with an error waiting: the first is the failure, none is raised, no file stays open."""
    small_shards(monkeypatch, 4)
    make(tmp_path / "cache", samples=SAMPLES).close()
    before = open_files()
    writer = ScoreWriter(ReferenceCache.open(tmp_path / "cache"), [DATASET])
    put(writer, 1, 5, 9)
    writer._pending[-1].result()
    assert open_files() == before + 6
    failed: list[int] = []

    def full(descriptor: int) -> None:
        failed.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        if flushed:
            writer.flush()
            put(writer, 2)
        writer.close()
    assert failed and "No space left" in str(writer.failure) and writer.written == 3
    assert [record.getMessage() for record in caplog.records].count(
        f"no more scores are written to {tmp_path / 'cache'}: {writer.failure}"
    ) == 1
    assert open_files() == before


def test_a_file_that_cannot_be_closed_leaves_no_other_open(tmp_path, monkeypatch):
    """Over NFS a close may bring the error of a write."""
    small_shards(monkeypatch, 4)
    make(tmp_path / "cache", samples=SAMPLES).close()
    before = open_files()
    writer = ScoreWriter(ReferenceCache.open(tmp_path / "cache"), [DATASET])
    put(writer, 1, 5, 9)
    writer.flush()
    close = os.close
    bad = [shard._writer for shard in writer._cache._shards.values()]

    def refuse(descriptor: int) -> None:
        close(descriptor)
        if descriptor in bad:
            bad.remove(descriptor)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "close", refuse)
    writer.close()
    assert "quota" in str(writer.failure).lower() and open_files() == before and not bad
    assert not writer._cache._shards
