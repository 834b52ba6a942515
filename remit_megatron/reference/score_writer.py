"""Writes scores to a cache beside the training: a thread, so that a slow file system costs no step."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remit_megatron.models.forward import Item
from remit_megatron.reference.cache import ReferenceCache

logger = logging.getLogger(__name__)

_PENDING = 256  # microbatches that may wait to be written before the training waits for the disk


def tokens_of(item: Item) -> np.ndarray:
    """The tokens of a sample or of a microbatch of samples, int64 [..., s + 1], from what the data loader gives."""
    return torch.cat((item["tokens"], item["labels"][..., -1:]), dim=-1).numpy()


class ScoreWriter:
    """Puts the scores of microbatches into a cache, in the background and in order.

    A sample that the cache has is not written again. A write that fails (a full disk) ends the writing with a warning
    and nothing else: the scores of a run do not depend on their copies.

    Args:
        cache: where to; the thread opens it for itself.
        names: identities of the data sets, by ``dataset_id``.
    """

    def __init__(self, cache: ReferenceCache, names: Sequence[str]):
        self._cache = ReferenceCache(cache.directory)
        self._names = names
        self._known: dict[str, np.ndarray] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="score-writer")
        self._pending: deque[Future[None]] = deque()
        self.failure: Exception | None = None
        self.written = 0  # samples
        self.not_finite = 0  # their tokens whose score is not finite

    def put(self, items: Sequence[Item], losses: Sequence[Tensor]) -> None:
        """Takes the scores of microbatches: [b, s] of nats for items of [b, s] tokens, whole sequences."""
        if self.failure is not None:
            return
        # Copied to the host in the order of the stream, without waiting for it here.
        copies = [loss.detach().float().to("cpu", non_blocking=True) for loss in losses]
        event = None
        if losses and losses[0].is_cuda:
            event = torch.cuda.Event()
            event.record()
        for item, loss in zip(items, copies, strict=True):
            self._pending.append(self._thread.submit(self._write, item, loss, event))
        while len(self._pending) > _PENDING:
            self._pending.popleft().result()

    def flush(self) -> None:
        """Returns when everything taken so far is on disk."""
        while self._pending:
            self._pending.popleft().result()
        self._thread.submit(self._guarded, self._cache.flush).result()

    def close(self) -> None:
        """Flushes, and ends the thread. What goes wrong is in `failure`, as for every write."""
        self.flush()
        self._thread.shutdown()
        self._attempt(self._cache.close, sync=False)

    def _write(self, item: Item, losses: Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        for row, (dataset_id, sample, tokens) in enumerate(
            zip(item["dataset_id"].tolist(), item["sample_id"].tolist(), tokens_of(item), strict=True)
        ):
            self._guarded(self._write_sample, self._names[dataset_id], sample, tokens, losses[row].numpy())

    def _write_sample(self, dataset: str, sample: int, tokens: np.ndarray, losses: np.ndarray) -> None:
        if dataset not in self._known:
            self._known[dataset] = self._cache.completeness(dataset)
        # What is marked complete may be damaged: then reading it says so, and it is written again.
        if self._known[dataset][sample] and self._cache.read_scores(dataset, sample) is not None:
            return
        self._cache.write(dataset, sample, tokens, losses)
        self._known[dataset][sample] = True
        self.written += 1
        self.not_finite += int((~np.isfinite(losses)).sum())

    def _guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        if self.failure is None:
            self._attempt(function, *arguments)

    def _attempt(self, function: Callable[..., None], *arguments: Any, **settings: Any) -> None:
        try:
            function(*arguments, **settings)
        except Exception as error:
            if self.failure is None:
                self.failure = error
                logger.warning("no more scores are written to %s: %s", self._cache.directory, error)
