"""The score cache of a run: what its scores depend on, opening it, and what of the run it lacks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remit_megatron.reference.cache import CacheIdentity, ReferenceCache
from remit_megatron.reference.cache_format import read_manifest, write_all
from remit_megatron.runtime import parallel
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import create_once

if TYPE_CHECKING:
    from remit_megatron.run.prepare import Prepared

logger = logging.getLogger(__name__)

_PRECISION_FILE = "computed_in"


@dataclass(frozen=True)
class RunScores:
    """What a run knows of its reference scores before it starts.

    Attributes:
        cache: read, written or both; None for a run that has nothing to do with one.
        names: identities of the training data sets, by ``dataset_id``.
        reads: whether scores come from the cache.
        live: whether the reference itself must be there.
    """

    cache: ReferenceCache | None = None
    names: tuple[str, ...] = ()
    reads: bool = False
    live: bool = True


def open_run_scores(prepared: Prepared, blend: Any, *, rank: int, consumed: int) -> RunScores:
    """Opens the run's cache, if it has one, and finds out whether it holds all that is still to be read; collective.

    Args:
        consumed: samples that the run has trained on already.

    Raises:
        UserError: as `open_cache`; or something is missing with ``on_missing: refuse``.
    """
    settings = prepared.config.reference
    if prepared.reference is None or settings is None or not (settings.source == "cache" or settings.write_cache):
        return RunScores()
    reads = settings.source == "cache"
    cache = open_cache(prepared, blend, rank=rank, create=not reads or settings.on_missing != "refuse")
    names = tuple(dataset.identity for dataset in blend.datasets)
    if not reads:
        return RunScores(cache, names)
    missing = 0
    with parallel.same_fate("looking through the score cache"):
        if rank == 0:
            missing = sum(map(len, missing_samples(cache, blend, consumed, len(blend))))
    missing = parallel.broadcast_object(missing)
    if missing and settings.on_missing == "refuse":
        found = f"no scores of {missing} samples that the run will read"
        raise UserError(str(cache.directory), found, "all of them: run `remit score` with this configuration")
    if missing and settings.on_missing == "score" and rank == 0:
        logger.warning("%d samples of the run have no scores in %s yet: scored live", missing, cache.directory)
    return RunScores(cache, names, reads=True, live=bool(missing) and settings.on_missing == "score")


def open_cache(prepared: Prepared, blend: Any, *, rank: int, create: bool) -> ReferenceCache:
    """Opens the cache that the configuration names, with the run's data sets declared in it; collective.

    Args:
        prepared: the run; its reference and tokenizer are part of a score's identity.
        blend: the training samples.
        rank: of this process; rank 0 goes first.
        create: make what is not there. Otherwise a cache that does not exist is an error.

    Raises:
        UserError: the cache was made with another reference, tokenizer, text, sequence length, packing or mask; or it
            cannot be made.
    """
    from remit_megatron.conversion.source import weights_digest

    config, source = prepared.config, prepared.reference
    assert config.reference is not None and config.reference.cache_dir is not None and source is not None
    with parallel.same_fate("reading the reference"):
        digest = weights_digest(source) if rank == 0 else ""
    path = Path(config.reference.cache_dir) / "manifest.json"
    identity = CacheIdentity(
        reference=parallel.broadcast_object(digest),
        tokenizer=_tokenizer_digest(prepared.tokenizer.digests, blend, path),
        sequence_length=prepared.arguments.seq_length,
        packing_seed=config.data.packing_seed,
        document_mask=config.data.document_mask,
        eod_id=prepared.tokenizer.eod_id,
    )
    cache, made = None, not path.exists()
    for turn in (rank == 0, rank != 0):
        with parallel.same_fate("opening the score cache"):
            if turn:
                # What a cache stores is its own affair once it exists: it is asked for when one is made.
                exists = path.exists()
                cache = ReferenceCache.open(
                    config.reference.cache_dir,
                    identity=identity,
                    dtype=config.reference.dtype if create and not exists else None,
                    create=create and not exists,
                )
                _declare(cache, blend, create=create)
    assert cache is not None
    with parallel.same_fate("looking at the score cache"):
        if rank == 0:
            _note_precision(cache.directory, str(prepared.arguments.params_dtype).removeprefix("torch."), made=made)
    return cache


def _note_precision(directory: Path, now: str, *, made: bool) -> None:
    """Writes down in which type a new cache's scores are computed; warns where this job has another than they.

    It is no part of their identity, since either serves: weights differ by some 0.002 between bfloat16 and float32.
    """
    file = directory / _PRECISION_FILE
    if made:
        create_once(file, lambda descriptor: write_all(descriptor, f"{now}\n".encode(), 0))
        return
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (before := file.read_text().strip()) != now:
            found = f"the scores in {directory} were computed in {before}, and this job computes in {now}"
            logger.warning("%s: what is missing would be off from them by some 0.004 nats a token", found)


def _tokenizer_digest(digests: Sequence[str], blend: Any, manifest: Path) -> str:
    """The one of a tokenizer's digests that a cache goes by: that of the cache, where there is one of this tokenizer;
    else that of the data, so that two caches of the same data have the same."""
    if manifest.exists() and (kept := read_manifest(manifest)[0].tokenizer) in digests:
        return kept
    found = {dataset.manifest.tokenizer_digest for dataset in blend.datasets}
    return found.pop() if len(found) == 1 and found <= set(digests) else digests[0]


def _declare(cache: ReferenceCache, blend: Any, *, create: bool) -> None:
    known = cache.datasets()
    for dataset, name in zip(blend.datasets, dataset_names([data.prefix for data in blend.datasets]), strict=True):
        if dataset.identity in known:
            continue
        if create:
            cache.add_dataset(dataset.identity, samples=len(dataset), name=name)
            continue
        same_name = [identity for identity, record in known.items() if record.name == name]
        if same_name:
            expected = f"{same_name[0][:16]}, as in {cache.directory}: the text changed"
            raise UserError(f"data set {name}", f"identity {dataset.identity[:16]}", expected)
        scored = ", ".join(record.name for record in known.values()) or "none"
        raise UserError(str(cache.directory), f"scores of {scored}", f"of {name} too: run `remit score` for this data")


def dataset_names(prefixes: Sequence[str | os.PathLike]) -> list[str]:
    """What a cache calls the data sets of one blend: base names of their files, and where several have the same, as
    many folders before it as tell them apart: ``web/train`` and ``math/train``.

    Args:
        prefixes: paths without endings; no two of the same files.
    """
    parts = [Path(os.path.abspath(prefix)).parts[1:] for prefix in prefixes]
    assert len(set(parts)) == len(parts), prefixes
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        shared = {name for name, count in Counter(names).items() if count > 1}
        if not shared:
            return names
        lengths = [length + (name in shared) for length, name in zip(lengths, names, strict=True)]


def missing_samples(cache: ReferenceCache, blend: Any, first: int, last: int) -> list[np.ndarray]:
    """What numbers ``first`` to ``last - 1`` of the blend need and the cache does not have: for each data set its
    samples, int64."""
    missing = []
    for dataset, samples in zip(blend.datasets, blend.samples_between(first, last), strict=True):
        missing.append(samples[~cache.completeness(dataset.identity, samples)])
    return missing
