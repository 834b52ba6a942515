"""Scores of a step from a cache, and live scores into one.

The data loader reads a sample's scores beside its tokens (`ScoredSamples`), in its own processes, so that a step finds
them in the batch. `CachedScores` deals with what is missing; `RecordedScores` keeps what a live reference computed.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.models.batch import sequence_slice, whole_sequence
from remit_megatron.models.forward import Item, ModelForward
from remit_megatron.reference.cache import ReferenceCache
from remit_megatron.reference.cache_format import as_stored
from remit_megatron.reference.score_writer import ScoreWriter, tokens_of
from remit_megatron.reference.source import Schedule, ScoreSource
from remit_megatron.runtime import parallel
from remit_megatron.runtime.errors import StartAgain, UserError

logger = logging.getLogger(__name__)

Place = tuple[str, int]  # identity of a data set, number of a sample

_POLL_SECONDS = 0.2
_REMIND_SECONDS = 60.0


class ScoredSamples(torch.utils.data.Dataset):
    """Samples of a blend with their scores from a cache.

    An item has two entries more than the blend's: ``cached_loss`` [s] float32, nats, and ``cached`` [] bool, False
    where the cache has no (usable) score.

    Args:
        blend: a `BlendedDataset`.
        cache: read in the process that asks, also in forked data loader workers.
    """

    def __init__(self, blend: Any, cache: ReferenceCache):
        self.blend = blend
        self.cache = cache
        self._names = [dataset.identity for dataset in blend.datasets]

    def __len__(self) -> int:
        return len(self.blend)

    def __getitem__(self, index: int) -> Item:
        item = self.blend[index]
        try:
            scores = read_scores(self.cache, self._names, item)
        except UserError:
            scores = None  # a worker's exception would lose its text on the way: the step reads again, and says why
        found = scores is not None
        loss = torch.from_numpy(scores) if found else torch.full_like(item["loss_mask"], float("nan"))
        return {**item, "cached_loss": loss, "cached": torch.tensor(found)}


def read_scores(cache: ReferenceCache, names: Sequence[str], item: Item) -> np.ndarray | None:
    """The scores of one sample (an item without batch dimension), float32 [s], or None.

    Args:
        names: identities of the data sets, by ``dataset_id``.

    Raises:
        UserError: see :meth:`ReferenceCache.read`.
    """
    return cache.read(names[int(item["dataset_id"])], int(item["sample_id"]), tokens_of(item))


class CachedScores:
    """A `ScoreSource` that finds the scores in the items.

    Args:
        cache: where they were read from.
        names: identities of the run's data sets, by ``dataset_id``.
        forward: gives the process groups.
        on_missing: ``score`` runs ``live`` over the microbatches that lack a score; ``refuse`` stops; ``wait`` waits
            until another job has written it. What is found damaged is marked as missing.
        live: runs the reference; None where there was nothing missing when the run began. If something is missing all
            the same, ``score`` asks for another start.
        writer: keeps what ``live`` computed.
        replica: ranks that hold one replica of the student (Gloo), or None for one rank. They must agree on what is
            missing: a cache that others write to may look different to two ranks.
        stopped: whether this process was told to stop; not collective. Asked while the run waits.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        *,
        names: Sequence[str],
        forward: ModelForward,
        on_missing: str = "score",
        live: ScoreSource | None = None,
        writer: ScoreWriter | None = None,
        replica: dist.ProcessGroup | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self._cache, self._names, self._forward = cache, names, forward
        self._on_missing, self._live, self._replica, self._stopped = on_missing, live, replica, stopped
        self._recorded = None if live is None or writer is None else RecordedScores(live, writer, forward=forward)

    def score(self, schedule: Schedule, buffers: list[list[Item]], **settings: Any) -> list[Tensor]:
        """See :meth:`ScoreSource.score`."""
        items = buffers[-1]
        if self._live is None:
            self._settle(items)
            live: dict[int, Tensor] = {}
        else:
            missing = [bool(self._lacking(item)) for item in items]
            live = self._score_live(schedule, buffers, self._agreed(missing), settings)
        groups = self._forward.groups
        if groups.pp.rank() < groups.pp.size() - 1:
            return []
        return [live[n] if n in live else self._own_part(item["cached_loss"]) for n, item in enumerate(items)]

    def _own_part(self, losses: Tensor) -> Tensor:
        cp = self._forward.groups.cp
        return sequence_slice(losses.to(parallel.device(), non_blocking=True), cp.rank(), cp.size())

    def _lacking(self, item: Item) -> list[Place]:
        """(Data set, sample) of a microbatch's rows without a score, having looked again for what the data loader did
        not find."""
        lacking = []
        for row in (~item["cached"]).nonzero().flatten().tolist():
            scores = read_scores(self._cache, self._names, {name: tensor[row] for name, tensor in item.items()})
            if scores is None:
                lacking.append((self._names[int(item["dataset_id"][row])], int(item["sample_id"][row])))
                continue
            item["cached_loss"][row] = torch.from_numpy(scores)
            item["cached"][row] = True
        return lacking

    def _settle(self, items: list[Item]) -> None:
        """Without a live reference: returns when every rank has all scores of its microbatches; collective over all.

        They also wait and stop together. A rank that left alone would leave the others in a collective until they are
        killed, and a job whose ranks were killed is not started again by itself.

        Raises:
            StartAgain: the next start will find that something is missing, and load the reference; or a rank was told
                to stop while they waited.
            UserError: something is missing that a start does not bring back, or as :meth:`ReferenceCache.read`.
        """
        started = reminded = time.monotonic()
        waited = False
        while True:
            failure: Exception | None = None
            by_microbatch: list[list[Place]] = []
            lacking: list[Place] = []
            try:
                by_microbatch = [self._lacking(item) for item in items]
                lacking = list(itertools.chain.from_iterable(by_microbatch))
                if lacking and self._on_missing != "wait":
                    failure = self._refusal(lacking)
            except UserError as error:
                failure = error
            missing, stopped, failed = parallel.on_any_rank(bool(lacking), self._stopped(), failure is not None)
            if failed:
                failures = [found for found in parallel.gather_objects(failure) if found is not None]
                raise min(failures, key=lambda found: isinstance(found, StartAgain))
            if not missing:
                break
            if stopped:  # Megatron looks only after a step, and there may be none before this job's time is over
                raise StartAgain(
                    f"told to stop while waiting for scores in {self._cache.directory}: started again, the run goes on "
                    "from its newest checkpoint"
                )
            now = time.monotonic()
            if remind := now - reminded >= _REMIND_SECONDS:
                self._forget_damaged(lacking)
            if remind or not waited:
                reminded, waited = now, True
                logger.warning(
                    "waiting for the scores of %d of %d microbatches of this rank (all ranks wait) in %s (%.0f s so "
                    "far): is `remit score` running?",
                    sum(map(bool, by_microbatch)),
                    len(items),
                    self._cache.directory,
                    now - started,
                )
            time.sleep(_POLL_SECONDS)
        if waited:
            logger.warning("the scores are there after %.0f s: going on", time.monotonic() - started)

    def _forget_damaged(self, lacking: list[Place]) -> int:
        """Marks what is damaged as missing, so that `remit score` and the next start see it; returns how many.

        While waiting it is not done at first sight: over NFS a score that another host is writing may look damaged
        until all of it has arrived.
        """
        forgotten = 0
        try:
            for place in lacking:
                forgotten += self._cache.forget_damaged(*place)
            if forgotten:
                self._cache.flush()
        except UserError as error:
            logger.warning("a damaged score cannot be marked as missing: %s", error)
        if forgotten:
            logger.warning("%d damaged scores in %s are marked as missing now", forgotten, self._cache.directory)
        return forgotten

    def _refusal(self, lacking: list[Place]) -> Exception:
        """What ends a run that does not wait."""
        damaged = self._forget_damaged(lacking)
        dataset, sample = lacking[0]
        directory, name = str(self._cache.directory), self._cache.datasets()[dataset].name
        found = f"no usable score of sample {sample} of {name}"
        if len(lacking) > 1:
            found += f" and {len(lacking) - 1} more"
        noticed = not all(self._cache.completeness(dataset, np.array([sample]))[0] for dataset, sample in lacking)
        if not noticed:  # it is damaged still: the next start would end here, too
            return UserError(
                directory, found, "one: `remit score --check` finds damaged scores and computes them again"
            )
        if self._on_missing == "score":
            return StartAgain(
                f"{directory}: {found}, which was there when the run began: start it again, and the reference scores "
                "it (`remit score --check` finds all damaged scores)"
            )
        expected = "one: `remit score` computes it"
        return UserError(directory, found, expected + (", and with --check all damaged ones" if damaged else ""))

    def _agreed(self, missing: list[bool]) -> list[bool]:
        if self._replica is None:
            return missing
        flags = torch.tensor(missing, dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._replica)
        return flags.bool().tolist()

    def _score_live(
        self, schedule: Schedule, buffers: list[list[Item]], missing: list[bool], settings: dict[str, Any]
    ) -> dict[int, Tensor]:
        """Scores of the microbatches that lack some, by number; empty except on the last stage."""
        numbers = [number for number, absent in enumerate(missing) if absent]
        if not numbers:
            return {}
        if len(buffers) > 1:  # an interleaved pipeline takes whole groups of microbatches
            others = (number for number, absent in enumerate(missing) if not absent)
            numbers += [next(others) for _ in range(-len(numbers) % self._forward.groups.pp.size())]
        source = self._recorded or self._live
        assert source is not None
        scores = source.score(schedule, [[buffer[number] for number in numbers] for buffer in buffers], **settings)
        # As a later step will read them: what a run computes does not depend on what was missing.
        return {number: self._as_stored(score) for number, score in zip(numbers, scores, strict=False)}

    def _as_stored(self, losses: Tensor) -> Tensor:
        flat = losses.flatten().float().cpu().numpy()
        return torch.from_numpy(as_stored(flat, self._cache.dtype)).to(losses.device).view(losses.shape)


class RecordedScores:
    """A `ScoreSource` that hands on another's scores and writes them to a cache.

    Args:
        source: gives the losses.
        writer: takes them on one rank of each replica, that of the last stage with the first place in the tensor and
            context parallel groups; the others may have None.
        forward: gives the process groups.
    """

    def __init__(self, source: ScoreSource, writer: ScoreWriter | None, *, forward: ModelForward):
        self.source = source
        self._writer, self._forward = writer, forward

    def score(self, schedule: Schedule, buffers: list[list[Item]], **settings: Any) -> list[Tensor]:
        """See :meth:`ScoreSource.score`."""
        scores = self.source.score(schedule, buffers, **settings)
        groups = self._forward.groups
        if scores and groups.tp.rank() == 0:
            whole = whole_scores(scores, groups)
            if groups.cp.rank() == 0 and self._writer is not None:
                self._writer.put(buffers[-1], whole)
        return scores


def whole_scores(scores: Sequence[Tensor], groups: Any) -> list[Tensor]:
    """[b, s / CP] of each microbatch to [b, s]; collective over the context parallel group."""
    if groups.cp.size() == 1 or not scores:
        return list(scores)
    mine = torch.stack(list(scores))
    parts = [torch.empty_like(mine) for _ in range(groups.cp.size())]
    dist.all_gather(parts, mine, group=groups.cp)
    return list(whole_sequence(parts, dim=2))
