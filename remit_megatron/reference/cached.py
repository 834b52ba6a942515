"""Scores of a step from a cache, and live scores into one.

The data loader reads a sample's scores beside its tokens (`ScoredSamples`), in its own processes, so that a step finds
them in the batch. `CachedScores` deals with what is missing; `RecordedScores` keeps what a live reference computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.batch import sequence_slice, whole_sequence
from remit_megatron.errors import UserError
from remit_megatron.forward import Item, ModelForward
from remit_megatron.parallel import device
from remit_megatron.reference.cache import ReferenceCache
from remit_megatron.reference.cache_format import decode, encode
from remit_megatron.reference.score_writer import ScoreWriter, tokens_of
from remit_megatron.reference.source import Schedule, ScoreSource

logger = logging.getLogger(__name__)

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
            until another job has written it.
        live: runs the reference; None where there was nothing missing when the run began.
        writer: keeps what ``live`` computed.
        replica: ranks that hold one replica of the student (Gloo), or None for one rank. They must agree on what is
            missing: a cache that others write to may look different to two ranks.
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
    ):
        self._cache, self._names, self._forward = cache, names, forward
        self._on_missing, self._live, self._replica = on_missing, live, replica
        self._recorded = None if live is None or writer is None else RecordedScores(live, writer, forward=forward)

    def score(self, schedule: Schedule, buffers: list[list[Item]], **settings: Any) -> list[Tensor]:
        """See :meth:`ScoreSource.score`."""
        items = buffers[-1]
        missing = [not self._complete(item) for item in items]
        if self._live is None:
            self._settle(items, missing)
            live: dict[int, Tensor] = {}
        else:
            live = self._score_live(schedule, buffers, self._agreed(missing), settings)
        groups = self._forward.groups
        if groups.pp.rank() < groups.pp.size() - 1:
            return []
        return [live[n] if n in live else self._own_part(item["cached_loss"]) for n, item in enumerate(items)]

    def _own_part(self, losses: Tensor) -> Tensor:
        cp = self._forward.groups.cp
        return sequence_slice(losses.to(device(), non_blocking=True), cp.rank(), cp.size())

    def _complete(self, item: Item) -> bool:
        """Whether all of a microbatch is scored, having looked again for what the data loader did not find."""
        for row in (~item["cached"]).nonzero().flatten().tolist():
            scores = read_scores(self._cache, self._names, {name: tensor[row] for name, tensor in item.items()})
            if scores is not None:
                item["cached_loss"][row] = torch.from_numpy(scores)
                item["cached"][row] = True
        return bool(item["cached"].all())

    def _settle(self, items: list[Item], missing: list[bool]) -> None:
        """Without a live reference: waits for what is missing, or says that it is.

        Raises:
            UserError: something is missing and ``on_missing`` is not ``wait``.
        """
        started = reminded = time.monotonic()
        waited = False
        while any(missing):
            if self._on_missing != "wait":
                item = items[missing.index(True)]
                row = int((~item["cached"]).nonzero()[0])
                dataset = self._cache.datasets()[self._names[int(item["dataset_id"][row])]]
                found = f"no usable score of sample {int(item['sample_id'][row])} of {dataset.name}"
                expected = "one: `remit score` fills the cache, and reference.on_missing: score does without"
                raise UserError(str(self._cache.directory), found, expected)
            if not waited or time.monotonic() - reminded >= _REMIND_SECONDS:
                reminded, waited = time.monotonic(), True
                logger.warning(
                    "waiting for the scores of %d of %d microbatches in %s (%.0f s so far): is `remit score` running?",
                    sum(missing),
                    len(missing),
                    self._cache.directory,
                    reminded - started,
                )
            time.sleep(_POLL_SECONDS)
            missing = [absent and not self._complete(item) for absent, item in zip(missing, items, strict=True)]
        if waited:
            logger.warning("the scores are there after %.0f s: going on", time.monotonic() - started)

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
        dtype = self._cache.dtype
        flat = losses.flatten().float().cpu().numpy()
        return torch.from_numpy(decode(encode(flat, dtype), dtype)).to(losses.device).view(losses.shape)


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
