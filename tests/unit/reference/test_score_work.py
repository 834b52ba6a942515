"""Pieces of a scoring job: everybody's order, leases, and the comparison of ``--verify``."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from remit_megatron.reference import leases as leases_module
from remit_megatron.reference.leases import Leases, Taken
from remit_megatron.reference.score_work import CorpusWork, RunWork, unit_samples
from remit_megatron.scoring.job import ScoringJob, _Compared

LENGTH = 1 << 15  # pieces of 16 samples
NAMES = ("a" * 64, "b" * 64)


def corpus(*needed: list[int], seed: int | None = None) -> CorpusWork:
    return CorpusWork(NAMES, [np.array(samples) for samples in needed], sequence_length=LENGTH, seed=seed)


def test_every_sample_is_in_one_piece_whatever_the_order():
    generator = np.random.default_rng(1)
    needed = [generator.permutation(5000)[:777].tolist(), generator.permutation(90)[:31].tolist()]
    work = corpus(*needed, seed=3)
    numbers = list(work.order())
    assert sorted(numbers) == list(range(len(work)))
    samples = [sample for number in numbers for sample in work[number].samples]
    assert len(samples) == len(set(samples)) == 777 + 31
    assert set(samples) == {(i, sample) for i, part in enumerate(needed) for sample in part}
    assert len({work[number].name for number in numbers}) == len(numbers)
    assert numbers != list(corpus(*needed, seed=4).order()) and numbers != sorted(numbers)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 16, 17, 33])
def test_small_corpora(count):
    work = corpus(list(range(count)), [], seed=0)
    assert len(work) == -(-count // unit_samples(LENGTH))
    assert sorted(sample for n in work.order() for _, sample in work[n].samples) == list(range(count))


def test_jobs_of_different_runs_share_their_pieces():
    """A stretch has one name, whichever of its samples a run needs."""
    one, other = corpus([0, 20, 40], [5]), corpus([21, 22, 47], [5, 17])
    names = [{work[number].name for number in range(len(work))} for work in (one, other)]
    assert names[0] & names[1] == {"a" * 16 + ".1", "a" * 16 + ".2", "b" * 16 + ".0"}


class Blend(list):
    """Positions of a run that are samples of one data set in another order."""

    def locate(self, index: int) -> tuple[int, int]:
        return 0, self[index]


def test_a_follower_goes_ahead_of_the_run_and_looks_back_at_it():
    blend = Blend(reversed(range(90)))
    consumed = 0
    work = RunWork(blend, "run", sequence_length=LENGTH, consumed=lambda: consumed)
    order = work.order()
    assert [next(order) for _ in range(4)] == [0, 0, 1, 0], "the piece that the run is at, and then the next"
    assert work[5].samples == [(0, sample) for sample in range(9, -1, -1)]
    assert next(order) == 2
    consumed = 70  # the run has overtaken it
    assert list(order) == [4, 4, 5]


def test_a_lease_is_had_once_and_taken_over_when_its_owner_is_gone(tmp_path):
    ours, theirs = Leases(tmp_path), Leases(tmp_path)
    assert ours.take("piece") is Taken.FREE and theirs.take("piece") is None
    ours.release("piece")
    assert theirs.take("piece") is Taken.FREE
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "piece").write_text(json.dumps({"host": socket.gethostname(), "process": gone.pid}))
    assert ours.take("piece") is Taken.ABANDONED and theirs.take("piece") is None
    (tmp_path / "piece").write_text(json.dumps({"host": "elsewhere", "process": 1}))
    assert theirs.take("piece") is None
    long_ago = time.time() - leases_module.STALE_SECONDS - 5
    os.utime(tmp_path / "piece", (long_ago, long_ago))
    assert theirs.take("piece") is Taken.ABANDONED
    assert [path.name for path in tmp_path.iterdir()] == ["piece"] and ours.names() == {"piece"}


@pytest.mark.parametrize("number, taken", [(errno.ESTALE, Taken.ABANDONED), (errno.EIO, None)])
def test_a_lease_that_cannot_be_looked_at(tmp_path, monkeypatch, number, taken):
    """Gone between its name and its attributes, over a network; or nobody can tell, and it is left to its owner."""
    Leases(tmp_path).take("piece")
    theirs = Leases(tmp_path, stale_seconds=0)

    def stat(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        assert theirs.take("piece") is taken


def test_a_piece_that_another_had_is_looked_at_again_before_the_others_are_done(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    job: Any = SimpleNamespace(_stopped=False)
    elsewhere: deque[tuple[float, int]] = deque()
    seen: list[tuple[float, int]] = []
    for number in ScoringJob._due(job, iter(range(9)), elsewhere):
        seen.append((now, number))
        now += 2.0
        if number == 1 and now < 10:
            elsewhere.append((now + 5.0, number))
    assert [number for _, number in seen] == [0, 1, 2, 3, 4, 1, 5, 6, 7, 8]
    elsewhere.append((now + 100.0, 7))
    started = now
    assert list(ScoringJob._due(job, iter(()), elsewhere)) == [7] and now >= started + 100
    elsewhere.append((0.0, 3))
    job._stopped = True
    assert list(ScoringJob._due(job, iter(range(3)), elsewhere)) == []


def test_comparison_counts_what_is_finite_on_one_side_only():
    stored = np.array([1.0, 2.0, np.nan, np.nan], dtype=np.float32)
    one, other = _Compared(), _Compared()
    one.add(5, stored, np.array([1.5, 2.5, np.nan, np.nan], dtype=np.float32))
    assert (one.tokens, one.largest, one.total, one.one_sided, one.weights) == (4, 0.5, 1.0, 0, 0.0)
    other.add(6, stored, np.array([1.0, 3.0, 1.0, np.nan], dtype=np.float32))
    assert other.one_sided == 1 and other.weights == pytest.approx((0.5 + 0.5) / 2 / 4)
    whole = sum([one, other], start=_Compared())
    assert (whole.tokens, whole.largest, whole.total, whole.one_sided, whole.damaged) == (8, 1.0, 2.0, 1, None)
    assert "1 tokens finite on one side only" in str(whole)
    other.add(7, None, stored)
    assert (one + other).damaged == 7


def test_a_number_of_samples_is_checked_before_ranks_are_started(capsys):
    from remit_megatron.cli import main

    assert main(["score", "none.yaml", "--verify", "0", "--nproc", "2"]) == 2
    assert "--verify: found 0; expected 1 sample or more" in capsys.readouterr().err


def test_no_piece_outlives_its_use(tmp_path: Path):
    """Pieces are made when they are asked for: a corpus of 12 million samples is arrays, not objects."""
    work = CorpusWork(NAMES[:1], [np.arange(200_000)], sequence_length=4096)
    held = sum(array.nbytes for part in (work._samples, work._begins, work._stretches) for array in part)
    assert held < 8.2 * 200_000
