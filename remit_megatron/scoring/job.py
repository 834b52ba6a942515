"""The work of ``remit score`` on one rank: take a piece, run the reference over it, write what comes out.

Every replica of the reference works by itself: its leader takes a lease on a piece of work, tells the other ranks which
samples come next, and writes their scores. Nothing is gathered over replicas while they work, so that jobs may begin,
be killed and begin again on another number of ranks at any moment.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.data.blend import BlendedDataset
from remit_megatron.models.forward import Item, ModelForward
from remit_megatron.reference.cache import ReferenceCache
from remit_megatron.reference.cache_format import as_stored
from remit_megatron.reference.cached import RecordedScores, whole_scores
from remit_megatron.reference.leases import Leases, Taken
from remit_megatron.reference.live import LiveReference
from remit_megatron.reference.score_work import Work
from remit_megatron.reference.score_writer import ScoreWriter
from remit_megatron.reference.source import ScoreSource
from remit_megatron.runtime import parallel
from remit_megatron.runtime.errors import EXIT_DONE, EXIT_START_ME_AGAIN, DoNotRestart, UserError
from remit_megatron.runtime.progress import Progress
from remit_megatron.runtime.stop import handled_by, stop_signals
from remit_megatron.scoring.batches import round_size, score_samples
from remit_megatron.scoring.finite import Scored, look_at

if TYPE_CHECKING:
    from remit_megatron.run.prepare import Prepared

_POLL_SECONDS = 1.0
_LOOK_AGAIN_SECONDS = 5.0  # at a piece that somebody else had
_CHECKED_TOGETHER = 1024  # samples
_ENOUGH_SAMPLES = 64  # scored by a replica, before it may say that the reference is broken
_VERIFY_LIMIT = 0.005  # mean |dw|, as for a reference in FP8


@dataclass
class _Compared:
    """Scores that were computed again beside those of the cache.

    Attributes:
        tokens: compared.
        largest, total: of the absolute differences, in nats.
        bound: of the sum of |dw|: half the absolute difference, centered in its sequence as the weights are.
        one_sided: tokens whose score is finite on one side only.
        neither: tokens whose score is finite on neither.
        damaged: a sample whose score is damaged, if there is one.
    """

    tokens: int = 0
    largest: float = 0.0
    total: float = 0.0
    bound: float = 0.0
    one_sided: int = 0
    damaged: int | None = None
    neither: int = 0

    def add(self, sample: int, stored: np.ndarray | None, computed: np.ndarray) -> None:
        """Float32 [L] each, as the cache rounds them."""
        if stored is None:
            self.damaged = sample
            return
        both = np.isfinite(stored) & np.isfinite(computed)
        self.tokens += len(stored)
        self.one_sided += int((np.isfinite(stored) != np.isfinite(computed)).sum())
        self.neither += int((~np.isfinite(stored) & ~np.isfinite(computed)).sum())
        difference = computed[both].astype(np.float64) - stored[both]
        if len(difference):
            self.largest = max(self.largest, float(np.abs(difference).max()))
            self.total += float(np.abs(difference).sum())
            self.bound += float(np.abs(difference - difference.mean()).sum()) / 2

    def __add__(self, other: _Compared) -> _Compared:
        return _Compared(
            self.tokens + other.tokens,
            max(self.largest, other.largest),
            self.total + other.total,
            self.bound + other.bound,
            self.one_sided + other.one_sided,
            other.damaged if self.damaged is None else self.damaged,
            self.neither + other.neither,
        )

    @property
    def weights(self) -> float:
        """Bound of the mean |dw|."""
        return self.bound / max(1, self.tokens)

    def __str__(self) -> str:
        mean = self.total / max(1, self.tokens)
        text = f"mean |difference| {mean:.2g} nats, largest {self.largest:.2g}, mean |dw| at most {self.weights:.2g}"
        if self.one_sided:
            text += f", {self.one_sided} tokens finite on one side only"
        return text + (f", {self.neither} on neither" if self.neither else "")


class ScoringJob:
    """The reference on this rank's part of the layout, and the work of its replica.

    Args:
        prepared: of :func:`prepare_scoring`.
        blend: the run's samples.
        cache: receives the scores.
        groups: Megatron's process groups.
        needed: for each data set of the blend, the samples that are to be scored in all; for progress and `verify`.
    """

    def __init__(
        self,
        prepared: Prepared,
        blend: BlendedDataset,
        cache: ReferenceCache,
        groups: Any,
        *,
        needed: Sequence[np.ndarray],
    ):
        logging.getLogger("megatron").setLevel(logging.ERROR)
        arguments = prepared.arguments
        self.names = tuple(dataset.identity for dataset in blend.datasets)
        self._blend, self._cache, self._groups, self._needed = blend, cache, groups, needed
        self._arguments = arguments
        self._forward = ModelForward(
            eod_id=prepared.tokenizer.eod_id,
            groups=lambda: groups,
            document_mask=prepared.config.data.document_mask,
            packed_attention=arguments.transformer_impl == "transformer_engine",
        )
        assert prepared.reference is not None and prepared.config.reference is not None
        self._max_dropped = prepared.config.reference.max_dropped
        with parallel.same_fate("loading the reference"):
            self._live = LiveReference.load(prepared.reference, arguments, forward=self._forward)
        # The rank that has the scores of whole sequences leads its replica: it writes them, and holds the leases.
        last = groups.pp.rank() == groups.pp.size() - 1
        self._leads = last and groups.tp.rank() == 0 and groups.cp.rank() == 0
        self._replica = parallel.replica_group(groups.dp.rank())
        leaders = parallel.gather_objects((groups.dp.rank(), dist.get_rank() if self._leads else -1))
        self._leader = max(rank for replica, rank in leaders if replica == groups.dp.rank())
        self._writer = ScoreWriter(cache, self.names) if self._leads else None
        self._stopped = False

    # -- scoring -----------------------------------------------------------------------------------------------------

    def fill(self, work: Callable[[], Work]) -> int:
        """Works until all pieces are complete or a signal says stop; returns the exit code. Collective.

        Args:
            work: makes the pieces, on the rank of each replica that takes them.

        Raises:
            UserError: the scores cannot be written.
            DoNotRestart: more of them are not finite than ``reference.max_dropped`` allows.
        """
        complete = (
            [samples[self._complete(n)] for n, samples in enumerate(self._needed)] if dist.get_rank() == 0 else []
        )
        total = self._missing()
        progress = Progress("score", total=total * self._sequence_length, unit="tokens")
        with self._signals():
            rounds = self._leader_rounds(work()) if self._leads else iter(())
            shown, pause = time.monotonic(), _POLL_SECONDS
            while (samples := self._told(next(rounds, None) if self._leads else None)) is not None:
                self._score(samples, record=True)
                if dist.get_rank() == 0 and (now := time.monotonic()) - shown >= pause:
                    progress.update((total - self._missing()) * self._sequence_length)
                    shown = time.monotonic()
                    pause = max(_POLL_SECONDS, 100 * (shown - now))  # looking takes a hundredth of the time at most
        if self._writer is not None:
            self._writer.close()
        failures = [text for text in parallel.gather_objects(self._failure()) if text]
        if failures:
            raise UserError("reference.cache_dir", failures[0], "a directory that can be written to")
        stopped = any(parallel.gather_objects(self._stopped))
        written = sum(parallel.gather_objects(0 if self._writer is None else self._writer.written))
        found = sum(parallel.gather_objects(self._scored()), start=Scored())
        with parallel.same_fate("looking at the scores that were there"):
            if dist.get_rank() == 0:
                found += look_at(self._cache, self.names, complete)
        found = parallel.broadcast_object(found)
        if fault := found.fault(self._max_dropped):
            raise DoNotRestart(f"{self._cache.directory}: {fault}")
        if dist.get_rank() == 0:
            left, wanted = self._missing(), sum(map(len, self._needed))
            progress.update((total - left) * self._sequence_length)
            progress.finish()
            sys.stdout.write(
                f"scored {written} samples; {wanted - left} of {wanted} have scores in {self._cache.directory}\n"
            )
            if found.not_finite:
                sys.stdout.write(f"{found}: a run does not count them\n")
            if stopped:
                sys.stdout.write("stopped by a signal: start again to go on\n")
        return EXIT_START_ME_AGAIN if stopped else EXIT_DONE

    def _leader_rounds(self, work: Work) -> Iterator[list[tuple[int, int]]]:
        """What this replica scores next, until everything is complete or a signal came."""
        assert self._writer is not None
        leases = Leases(self._cache.directory / "leases")
        size = round_size(self._arguments)
        # Numbers of pieces that others have, and when to look again: those whose owner was killed must not be left to
        # the end, since a run may be waiting for them.
        elsewhere: deque[tuple[float, int]] = deque()
        # What a killed job was at may look complete and not be: its last writes need not have reached the disk.
        suspect = leases.names()
        for number in self._due(work.order(), elsewhere):
            unit = work[number]
            if unit.name not in suspect and not unit.missing(self._cache, self.names):
                continue
            taken = leases.take(unit.name)
            if taken is None:
                elsewhere.append((time.monotonic() + _LOOK_AGAIN_SECONDS, number))
                continue
            suspect.discard(unit.name)
            try:
                if taken is Taken.ABANDONED:
                    self._forget_damage(unit.samples)
                missing = unit.missing(self._cache, self.names)
                for first in range(0, len(missing), size):
                    if self._stopped or self._writer.failure is not None or self._is_broken():
                        return
                    leases.keep(unit.name)
                    yield missing[first : first + size]
                self._writer.flush()
            finally:
                leases.release(unit.name)

    def _scored(self) -> Scored:
        """What this rank has written."""
        if self._writer is None:
            return Scored()
        return Scored(self._writer.written * self._sequence_length, self._writer.not_finite)

    def _is_broken(self) -> bool:
        """Whether it is plain already that this reference scores little: the rest need not be computed."""
        scored = self._scored()
        enough = scored.tokens >= _ENOUGH_SAMPLES * self._sequence_length
        return enough and scored.share > max(0.5, self._max_dropped)

    def _due(self, order: Iterator[int], elsewhere: deque[tuple[float, int]]) -> Iterator[int]:
        """Numbers of pieces: those of ``elsewhere`` when it is time, else the next in order; ends when both have."""
        while not self._stopped:
            if elsewhere and elsewhere[0][0] <= time.monotonic():
                yield elsewhere.popleft()[1]
            elif (number := next(order, None)) is not None:
                yield number
            elif elsewhere:
                time.sleep(_POLL_SECONDS)
            else:
                return

    def _forget_damage(self, samples: Sequence[tuple[int, int]]) -> int:
        """Marks those of ``samples`` as missing whose score is there and damaged; returns how many. Reads all."""
        found = sum(self._cache.forget_damaged(self.names[dataset_id], sample) for dataset_id, sample in samples)
        if found:
            self._cache.flush()
        return found

    def _told(self, samples: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
        """What the leader says, on every rank of the replica."""
        if self._replica is None:
            return samples
        box = [samples]
        dist.broadcast_object_list(box, src=self._leader, group=self._replica)
        return box[0]

    def _score(self, samples: list[tuple[int, int]], *, record: bool) -> list[Tensor]:
        """Runs samples through the reference; the losses of its microbatches, [b, s] each, on the last stage."""
        source: ScoreSource = self._live
        if record:
            source = RecordedScores(source, self._writer, forward=self._forward)
        items = [self._item(*sample) for sample in samples]
        return score_samples(source, items, self._arguments, chunks=len(self._live.chunks))

    def _item(self, dataset_id: int, sample: int) -> Item:
        tokens = torch.from_numpy(self._blend.datasets[dataset_id][sample])
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(len(tokens) - 1),
            "dataset_id": torch.tensor(dataset_id),
            "sample_id": torch.tensor(sample),
        }

    def repair(self) -> None:
        """Reads every score of the needed samples and marks those that are damaged as missing. Collective; every rank
        reads its share."""
        world_size = dist.get_world_size()
        share = [samples[dist.get_rank() :: world_size] for samples in self._needed]
        total = sum(map(len, self._needed))
        progress = Progress("check", total=total, unit="samples")
        found = done = 0
        with parallel.same_fate("checking the scores"):
            for dataset_id, samples in enumerate(share):
                for part in np.array_split(samples, max(1, len(samples) // _CHECKED_TOGETHER)):
                    found += self._forget_damage([(dataset_id, sample) for sample in part.tolist()])
                    done += len(part)
                    if dist.get_rank() == 0:  # the other ranks are about as far
                        progress.update(min(total, done * world_size))
        found = sum(parallel.gather_objects(found))
        if dist.get_rank() == 0:
            progress.finish()
            sys.stdout.write(f"{found} damaged scores: they are computed again\n" if found else "no damage\n")

    # -- verification ------------------------------------------------------------------------------------------------

    def verify(self, count: int) -> int:
        """Scores ``count`` random samples of the cache again and compares; collective.

        Raises:
            UserError: the cache has none, or other scores than this reference gives.
            DoNotRestart: too many of both are not finite.
        """
        # One rank looks: others might see another state of a cache that is being filled.
        chosen = parallel.gather_objects(self._drawn(count) if dist.get_rank() == 0 else None)[0]
        if not chosen:
            raise UserError(str(self._cache.directory), "no scores of this run's samples", "some: run `remit score`")
        share = chosen[self._groups.dp.rank() :: self._groups.dp.size()]
        found = _Compared()
        size = self._arguments.micro_batch_size
        for first in range(0, len(share), size):
            samples = share[first : first + size]
            scores = whole_scores(self._score(samples, record=False), self._groups)
            if self._leads:
                for (dataset_id, sample), losses in zip(samples, scores[0], strict=False):
                    tokens = self._blend.datasets[dataset_id][sample]
                    stored = self._cache.read(self.names[dataset_id], sample, tokens)
                    found.add(sample, stored, as_stored(losses.float().cpu().numpy(), self._cache.dtype))
        whole = sum(parallel.gather_objects(found), start=_Compared())
        text = f"{len(chosen)} samples: {whole}"
        if whole.damaged is not None:
            expected = "whole scores: `remit score --check` finds all that are damaged and scores them again"
            raise UserError(str(self._cache.directory), f"sample {whole.damaged} damaged", expected)
        if whole.one_sided or whole.weights > _VERIFY_LIMIT:
            expected = f"mean |dw| of at most {_VERIFY_LIMIT}: these scores are not this reference's"
            raise UserError(str(self._cache.directory), text, expected)
        if fault := Scored(whole.tokens, whole.neither).fault(self._max_dropped):
            raise DoNotRestart(f"{self._cache.directory}: {fault}")
        if dist.get_rank() == 0:
            sys.stdout.write(f"verified {text}\n")
        return EXIT_DONE

    def _drawn(self, count: int) -> list[tuple[int, int]]:
        """``count`` different samples at random of those that have scores, or all of them."""
        scored = [
            samples[self._cache.completeness(name, samples)]
            for name, samples in zip(self.names, self._needed, strict=True)
        ]
        ends = np.cumsum([len(samples) for samples in scored])
        generator = np.random.default_rng()
        places = generator.choice(ends[-1], size=min(count, ends[-1]), replace=False) if ends[-1] else []
        dataset_ids = np.searchsorted(ends, places, side="right").tolist()
        return [
            (dataset_id, int(scored[dataset_id][place - ends[dataset_id]]))
            for dataset_id, place in zip(dataset_ids, places, strict=True)
        ]

    # -- what all of it needs ----------------------------------------------------------------------------------------

    @property
    def _sequence_length(self) -> int:
        return self._cache.identity.sequence_length

    def _missing(self) -> int:
        """Samples that are still to be scored, by anybody."""
        return sum(int((~self._complete(number)).sum()) for number in range(len(self._needed)))

    def _complete(self, number: int) -> np.ndarray:
        """Which of the needed samples of a data set have scores, bool."""
        return self._cache.completeness(self.names[number], self._needed[number])

    def _failure(self) -> str | None:
        failure = None if self._writer is None else self._writer.failure
        return None if failure is None else " ".join(str(failure).split())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR2, SIGHUP, SIGINT and SIGUSR1 end the work after the microbatches that are being scored."""

        def stop(*_: object) -> None:
            self._stopped = True

        parallel.leave_set_up_together()
        with handled_by(dict.fromkeys((signal.SIGINT, signal.SIGUSR1, *stop_signals()), stop)):
            yield
