"""What a run does about a sample that has no usable score, on one rank and without a model."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from remit_megatron.reference import ReferenceCache, cached
from remit_megatron.reference.cache_shard import Shard
from remit_megatron.reference.cached import CachedScores
from remit_megatron.runtime.errors import StartAgain, UserError
from tests.unit.reference.test_cache import DATASET, LENGTH, losses_of, make, tokens_of
from tests.unit.reference.test_cache_damage import flip

SAMPLES = 10


def filled(directory: Path, *, damaged: tuple[int, ...] = ()) -> ReferenceCache:
    """A cache that says it has every sample; the scores of some are not what was written."""
    cache = make(directory, samples=SAMPLES)
    for sample in range(SAMPLES):
        cache.write(DATASET, sample, tokens_of(sample), losses_of(sample))
    cache.close()
    (shard,) = (directory / DATASET).glob("*.scores")
    key = cache._shard(DATASET, 0).key  # type: ignore[union-attr]
    for sample in damaged:
        flip(shard, key.entry_at(sample) + 20, 3)
    return ReferenceCache.open(directory)


def microbatch(*samples: int) -> dict[str, torch.Tensor]:
    """Samples as the data loader gives them where it finds no score."""
    tokens = torch.from_numpy(np.stack([tokens_of(sample) for sample in samples]))
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "dataset_id": torch.zeros(len(samples), dtype=torch.int64),
        "sample_id": torch.tensor(samples),
        "cached": torch.zeros(len(samples), dtype=torch.bool),
        "cached_loss": torch.full((len(samples), LENGTH), float("nan")),
    }


def source(cache: ReferenceCache, on_missing: str, **settings: Any) -> CachedScores:
    """A run that found everything complete when it began, and so has no reference."""
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    forward: Any = SimpleNamespace(groups=SimpleNamespace(pp=alone, cp=alone, tp=alone))
    return CachedScores(cache, names=[DATASET], forward=forward, on_missing=on_missing, **settings)


def ask(scores: CachedScores, *samples: int) -> list[torch.Tensor]:
    return scores.score(lambda **_: [], [[microbatch(*samples)]])


def test_a_damaged_score_is_missing_at_the_next_start(tmp_path):
    cache = filled(tmp_path / "cache", damaged=(2, 5))
    assert torch.isfinite(ask(source(cache, "score"), 1, 3)[0]).all()
    with pytest.raises(StartAgain, match=r"sample 2 of corpus and 1 more.*start it again.*remit score --check"):
        ask(source(cache, "score"), 1, 2, 5)
    assert np.flatnonzero(~ReferenceCache.open(tmp_path / "cache").completeness(DATASET)).tolist() == [2, 5]
    with pytest.raises(StartAgain):  # as a job finds it that another got ahead of
        ask(source(cache, "score"), 2)


def test_refuse_leaves_it_to_remit_score(tmp_path):
    cache = filled(tmp_path / "cache", damaged=(2,))
    with pytest.raises(UserError, match=r"sample 2 of corpus; expected one: `remit score` .*--check") as refused:
        ask(source(cache, "refuse"), 2)
    assert "on_missing" not in str(refused.value)
    assert np.flatnonzero(~cache.completeness(DATASET)).tolist() == [2]


@pytest.mark.parametrize("on_missing", ["score", "refuse"])
def test_a_cache_that_cannot_be_written_is_no_reason_to_start_again(tmp_path, monkeypatch, on_missing):
    def refuse(self) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.path))

    cache = filled(tmp_path / "cache", damaged=(2,))
    monkeypatch.setattr(Shard, "_open_writer", refuse)
    with pytest.raises(UserError, match=r"no usable score of sample 2 of corpus; expected one: `remit score --check`"):
        ask(source(cache, on_missing), 2)
    assert cache.completeness(DATASET).all()


def test_a_run_that_is_told_to_stop_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "_POLL_SECONDS", 0.01)
    cache = filled(tmp_path / "cache")
    cache.forget(DATASET, 2)
    looks = iter([False, False, True])
    with pytest.raises(StartAgain, match="told to stop while waiting"):
        ask(source(cache, "wait", stopped=lambda: next(looks)), 2)
    assert torch.isfinite(ask(source(cache, "wait", stopped=lambda: True), 1)[0]).all(), "Megatron sees to that one"


def test_waiting_marks_what_stays_damaged(tmp_path, monkeypatch):
    """As `remit score` sees it: complete at first (it may be on its way), then missing, so that it is scored."""
    monkeypatch.setattr(cached, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(cached, "_REMIND_SECONDS", 0.3)
    cache, seen = filled(tmp_path / "cache", damaged=(2,)), []

    def follow() -> None:
        job = ReferenceCache.open(tmp_path / "cache")
        began = time.monotonic()
        while time.monotonic() < began + 20:
            if not job.completeness(DATASET)[2]:
                seen.append(time.monotonic() - began)
                job.write(DATASET, 2, tokens_of(2), losses_of(2))
                return
            time.sleep(0.01)

    job = threading.Thread(target=follow)
    job.start()
    (found,) = ask(source(cache, "wait"), 1, 2)
    job.join()
    assert seen and seen[0] > 0.2
    assert np.abs(found.numpy() - np.stack([losses_of(1), losses_of(2)])).max() <= 2**-12
