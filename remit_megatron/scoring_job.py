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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import default_collate

from remit_megatron import parallel
from remit_megatron.data.blend import BlendedDataset
from remit_megatron.errors import EXIT_DONE, EXIT_START_ME_AGAIN, UserError
from remit_megatron.forward import Item, ModelForward
from remit_megatron.progress import Progress
from remit_megatron.reference.cache import ReferenceCache
from remit_megatron.reference.cached import RecordedScores, whole_scores
from remit_megatron.reference.leases import Leases
from remit_megatron.reference.live import LiveReference
from remit_megatron.reference.score_work import WorkUnit
from remit_megatron.reference.score_writer import ScoreWriter
from remit_megatron.reference.source import ScoreSource

if TYPE_CHECKING:
    from remit_megatron.prepare import Prepared

_ROUND = 4  # microbatches per pipeline stage that go through the schedule at once
_POLL_SECONDS = 1.0
_VERIFY_LIMIT = 0.005  # mean |dw|, as for a reference in FP8


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
        assert prepared.reference is not None
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

    def fill(self, units: Iterator[WorkUnit]) -> int:
        """Works until all units are complete or a signal says stop; returns the exit code. Collective."""
        total = self._missing()
        progress = Progress("score", total=total * self._sequence_length, unit="tokens")
        with self._signals():
            rounds = self._leader_rounds(units) if self._leads else iter(())
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
        if dist.get_rank() == 0:
            left, wanted = self._missing(), sum(map(len, self._needed))
            progress.update((total - left) * self._sequence_length)
            progress.finish()
            sys.stdout.write(
                f"scored {written} samples; {wanted - left} of {wanted} have scores in {self._cache.directory}\n"
            )
            if stopped:
                sys.stdout.write("stopped by a signal: start again to go on\n")
        return EXIT_START_ME_AGAIN if stopped else EXIT_DONE

    def _leader_rounds(self, units: Iterator[WorkUnit]) -> Iterator[list[tuple[int, int]]]:
        """What this replica scores next, until everything is complete or a signal came."""
        assert self._writer is not None
        leases = Leases(self._cache.directory / "leases")
        size = _ROUND * self._groups.pp.size() * self._arguments.micro_batch_size
        elsewhere: list[WorkUnit] = []
        for unit in self._with_patience(units, elsewhere):
            if not unit.missing(self._cache, self.names):
                continue
            if not leases.take(unit.name):
                elsewhere.append(unit)
                continue
            try:
                missing = unit.missing(self._cache, self.names)
                for first in range(0, len(missing), size):
                    if self._stopped or self._writer.failure is not None:
                        return
                    leases.keep(unit.name)
                    yield missing[first : first + size]
                self._writer.flush()
            finally:
                leases.release(unit.name)

    def _with_patience(self, units: Iterator[WorkUnit], elsewhere: list[WorkUnit]) -> Iterator[WorkUnit]:
        """The units, and then those that others had, again and again until they are complete or free."""
        for unit in units:
            if self._stopped:
                return
            yield unit
        while elsewhere and not self._stopped:
            time.sleep(_POLL_SECONDS)
            again, elsewhere[:] = list(elsewhere), []
            yield from again

    def _told(self, samples: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
        """What the leader says, on every rank of the replica."""
        if self._replica is None:
            return samples
        box = [samples]
        dist.broadcast_object_list(box, src=self._leader, group=self._replica)
        return box[0]

    def _score(self, samples: list[tuple[int, int]], *, record: bool) -> list[Tensor]:
        """Runs samples through the reference; the losses of its microbatches, [b, s] each, on the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        items = self._microbatches(samples)
        chunks = len(self._live.chunks)
        source: ScoreSource = self._live
        if record:
            source = RecordedScores(source, self._writer, forward=self._forward)
        return source.score(
            get_forward_backward_func(),
            [list(items) for _ in range(chunks)],
            seq_length=self._sequence_length,
            micro_batch_size=self._arguments.micro_batch_size,
        )

    def _microbatches(self, samples: list[tuple[int, int]]) -> list[Item]:
        """Items of equal size. The last is filled up with the last sample, and their number with the last item where an
        interleaved pipeline wants a multiple of its stages; what is scored twice is the same twice."""
        size = self._arguments.micro_batch_size
        filled = samples + [samples[-1]] * (-len(samples) % size)
        items = [
            default_collate([self._item(*sample) for sample in filled[i : i + size]])
            for i in range(0, len(filled), size)
        ]
        if len(self._live.chunks) > 1:
            items += [items[-1]] * (-len(items) % self._groups.pp.size())
        return items

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
        """Reads every score of the needed samples and marks those that are damaged as missing; collective."""
        found = 0
        with parallel.same_fate("checking the scores"):
            if dist.get_rank() == 0:
                progress = Progress("check", total=sum(map(len, self._needed)), unit="samples")
                for number, (dataset_id, sample) in enumerate(self._scored()):
                    if self._cache.read_scores(self.names[dataset_id], sample) is None:
                        self._cache.forget(self.names[dataset_id], sample)
                        found += 1
                    progress.update(number + 1)
                self._cache.flush()
                progress.finish()
                sys.stdout.write(f"{found} damaged scores: they are computed again\n" if found else "no damage\n")

    def _scored(self) -> Iterator[tuple[int, int]]:
        """What has a score of the samples that are needed: position of the data set, and sample."""
        for dataset_id, samples in enumerate(self._needed):
            for sample in samples[self._cache.completeness(self.names[dataset_id], samples)].tolist():
                yield dataset_id, sample

    # -- verification ------------------------------------------------------------------------------------------------

    def verify(self, count: int) -> int:
        """Scores ``count`` random samples of the cache again and compares; collective.

        Raises:
            UserError: the cache has none, or other scores than this reference gives.
        """
        have = list(self._scored())
        if not have:
            raise UserError(str(self._cache.directory), "no scores of this run's samples", "some: run `remit score`")
        chosen = [have[i] for i in np.random.default_rng(0).permutation(len(have))[:count]]
        share = chosen[self._groups.dp.rank() :: self._groups.dp.size()]
        largest, total, bound, tokens = 0.0, 0.0, 0.0, 0
        size = self._arguments.micro_batch_size
        for first in range(0, len(share), size):
            samples = share[first : first + size]
            scores = whole_scores(self._score(samples, record=False), self._groups)
            if not self._leads:
                continue
            for (dataset_id, sample), found in zip(samples, scores[0], strict=False):
                stored = self._cache.read(self.names[dataset_id], sample, self._blend.datasets[dataset_id][sample])
                if stored is None:
                    expected = "a score, as the completeness map says: score again to repair it"
                    raise UserError(str(self._cache.directory), f"sample {sample} damaged", expected)
                difference = (found.float().cpu() - torch.from_numpy(stored)).nan_to_num()
                largest = max(largest, float(difference.abs().max()))
                total += float(difference.abs().sum())
                bound += float((difference - difference.mean()).abs().sum()) / 2
                tokens += len(stored)
        parts = parallel.gather_objects((largest, total, bound, tokens))
        largest, tokens = max(part[0] for part in parts), max(1, sum(part[3] for part in parts))
        mean, weights = (sum(part[i] for part in parts) / tokens for i in (1, 2))
        text = f"{len(chosen)} samples: mean |difference| {mean:.2g} nats, largest {largest:.2g}"
        text += f", mean |dw| at most {weights:.2g}"
        if weights > _VERIFY_LIMIT:
            expected = f"mean |dw| of at most {_VERIFY_LIMIT}: these scores are not this reference's"
            raise UserError(str(self._cache.directory), text, expected)
        if dist.get_rank() == 0:
            sys.stdout.write(f"verified {text}\n")
        return EXIT_DONE

    # -- what all of it needs ----------------------------------------------------------------------------------------

    @property
    def _sequence_length(self) -> int:
        return self._cache.identity.sequence_length

    def _missing(self) -> int:
        """Samples that are still to be scored, by anybody."""
        return sum(
            int((~self._cache.completeness(name, samples)).sum())
            for name, samples in zip(self.names, self._needed, strict=True)
        )

    def _failure(self) -> str | None:
        failure = None if self._writer is None else self._writer.failure
        return None if failure is None else " ".join(str(failure).split())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGUSR1 end the work after the microbatches that are being scored."""

        def stop(*_: object) -> None:
            self._stopped = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
