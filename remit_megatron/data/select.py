"""``remit data select``: the samples of data sets that are worth training on, as a data set of their own.

Method ``miniplm`` (`remit_megatron.data.miniplm`) reads two score caches, of a teacher and of a small reference, which
`remit score` has filled for all the data.

What is written is a normal data set. Each kept sample is one document, in the order of the corpus: its L + 1 tokens, as
`PackedDataset` gave them. Samples overlap by one token, so documents of L tokens laid end to end would predict another
sample's token at the end of each; therefore the manifest says ``sample_length: L``, and packing with sequence length L
gives exactly the kept samples, one for each document, every label included. With another sequence length the documents
are packed as text is.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.data.boundaries import check_boundaries, missing_boundaries
from remit_megatron.data.indexed import token_dtype
from remit_megatron.data.miniplm import Keep, Scores, difference_score
from remit_megatron.data.packing import PackedDataset
from remit_megatron.data.writer import DatasetWriter
from remit_megatron.reference.cache import ReferenceCache
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.progress import Progress

logger = logging.getLogger(__name__)

REPORT_FORMAT = "remit-selection"
REPORT_VERSION = 1
_SAMPLES_AT_ONCE = 65536


@dataclass(frozen=True)
class _Sources:
    """What a selection reads."""

    datasets: list[PackedDataset]
    starts: list[int]  # number of each data set's first sample among all, and the number of all
    teacher: ReferenceCache
    reference: ReferenceCache
    masked_id: int | None


# Share of the kept samples that may lack a score: as many as of a run's tokens (reference.max_dropped).
_MOST_WITHOUT = 0.01


def select_miniplm(
    data: Sequence[str | os.PathLike],
    *,
    teacher: str | os.PathLike,
    reference: str | os.PathLike,
    keep: Keep,
    output: str | os.PathLike,
    mask_eod_loss: bool = False,
    cache_dir: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Keeps the samples of ``data`` with the highest scores; exact, in two passes over the data.

    Memory: the index of each data set (12 bytes a document, memory-mapped with ``cache_dir``) and some 30 bytes a kept
    sample while the index of the output is written. Disk, until the end: 16 bytes a sample beside the output.

    Args:
        data: prefixes of data sets; their order is the order of the corpus.
        teacher, reference: score caches. Sequence length, packing seed and tokenizer are theirs.
        keep: how much.
        output: path of the output without endings.
        mask_eod_loss: do not count predictions from an end of document.
        cache_dir: as for `PackedDataset`.
        overwrite: replace an existing data set.
        progress: show progress on standard error.

    Returns:
        The contents of ``output.selection.json``: settings, threshold, distribution of scores, counts per data set.

    Raises:
        UserError: the caches differ in more than their model or lack scores, fewer samples than are kept have finite
            ones, the data has changed, or the output cannot be written.
    """
    sources = _open_sources(data, teacher, reference, mask_eod_loss=mask_eod_loss, cache_dir=cache_dir)
    samples = sources.starts[-1]
    kept = keep.of(samples)
    target = Path(f"{os.fspath(output)}.bin").resolve()
    for dataset in sources.datasets:
        if Path(f"{dataset.prefix}.bin").resolve() == target:
            raise UserError("--output", f"{os.fspath(output)}, which is one of --data", "another prefix")
    manifests = [dataset.manifest for dataset in sources.datasets]
    vocab_size = max(manifest.vocab_size for manifest in manifests)
    dtype = token_dtype(vocab_size)
    with DatasetWriter(output, dtype=dtype, overwrite=overwrite) as writer:
        scores = Scores(samples, directory=Path(output).parent)
        _score_all(sources, scores.in_order, progress=Progress("scores", total=samples, unit="samples"), show=progress)
        scores.sort()
        threshold, ties = scores.threshold(kept)
        _require_finite(scores, samples, kept)
        shown = Progress("writing", total=kept, unit="samples")
        per_dataset = _write_kept(sources, scores, threshold, ties, writer, progress=shown, show=progress)
        assert writer.documents == kept, (writer.documents, kept)
        report = {
            "format": REPORT_FORMAT,
            "format_version": REPORT_VERSION,
            "method": "miniplm",
            "keep": keep.ratio if keep.count is None else keep.count,
            "kept": kept,
            "tokens": writer.tokens,
            "threshold": threshold,
            "kept_of_score_threshold": ties,
            "mask_eod_loss": mask_eod_loss,
            "sequence_length": sources.teacher.identity.sequence_length,
            "packing_seed": sources.teacher.identity.packing_seed,
            "teacher": sources.teacher.identity.reference,
            "reference": sources.reference.identity.reference,
            "scores": scores.distribution(),
            "data": per_dataset,
        }
        writer.commit(
            tokenizer_digest=manifests[0].tokenizer_digest,
            vocab_size=vocab_size,
            eod_id=_common_end(sources),
            skipped=0,
            inputs=tuple(os.path.basename(dataset.prefix) for dataset in sources.datasets),
            sample_length=sources.teacher.identity.sequence_length,
        )
    write_atomic(f"{os.fspath(output)}.selection.json", json.dumps(_strict(report), indent=1, allow_nan=False) + "\n")
    return report


def _require_finite(scores: Scores, samples: int, kept: int) -> None:
    """Refuses to keep samples because they come first in the corpus and not because of their score."""
    scored = samples - int(np.searchsorted(scores.ascending, -np.inf, side="right"))
    if kept < samples and kept - scored > _MOST_WITHOUT * kept:
        expected = (
            f"at least 99% of the {kept} that --keep keeps: the scores of --teacher or --reference are not finite"
        )
        raise UserError("--keep", f"{scored} of {samples} samples with a finite score in both caches", expected)


def _open_sources(
    data: Sequence[str | os.PathLike],
    teacher: str | os.PathLike,
    reference: str | os.PathLike,
    *,
    mask_eod_loss: bool,
    cache_dir: str | os.PathLike | None,
) -> _Sources:
    caches = [ReferenceCache.open(directory) for directory in (teacher, reference)]
    first, second = (cache.identity for cache in caches)
    for name, value in vars(first).items():
        if name != "reference" and getattr(second, name) != value:
            found = f"{getattr(second, name)} in {reference}"
            raise UserError(f"--reference ({name})", found, f"{value}, as in {teacher}")
    if first.reference == second.reference:
        found = f"{reference}, scores of the model {first.reference}"
        raise UserError("--reference", found, f"a cache of another model than {teacher}")
    if mask_eod_loss and first.eod_id is None:
        raise UserError("--mask-eod-loss", "caches with no end-of-document token", "caches with one")
    datasets: list[PackedDataset] = []
    for prefix in data:
        dataset = PackedDataset(
            prefix,
            sequence_length=first.sequence_length,
            packing_seed=first.packing_seed,
            cache_dir=cache_dir,
        )  # its tokenizer was compared when it was scored, and the scores name it by its contents
        if any(dataset.identity == other.identity for other in datasets):
            raise UserError("--data", f"{prefix} twice, or two of the same contents", "each data set once")
        if mask_eod_loss and first.eod_id is not None:
            check_boundaries(prefix, dataset.manifest, first.eod_id, setting="--mask-eod-loss", value="given")
        for cache in caches:
            _check_scored(cache, dataset)
        datasets.append(dataset)
    starts = [0, *np.cumsum([len(dataset) for dataset in datasets]).tolist()]
    return _Sources(datasets, starts, caches[0], caches[1], first.eod_id if mask_eod_loss else None)


def _common_end(sources: _Sources) -> int | None:
    """The end-of-document token, if it marks the ends of all documents."""
    eod_id = sources.teacher.identity.eod_id
    if eod_id is None or any(missing_boundaries(d.prefix, d.manifest, eod_id) for d in sources.datasets):
        return None
    return eod_id


def _check_scored(cache: ReferenceCache, dataset: PackedDataset) -> None:
    """All samples are complete; otherwise a `UserError` that says what is missing."""
    declared = cache.datasets()
    name = os.path.basename(dataset.prefix)
    if dataset.identity not in declared:
        for identity, record in declared.items():
            if record.name == name:
                found = f"identity {dataset.identity}"
                raise UserError(dataset.prefix, found, f"{identity}, as in {cache.directory}: the text changed")
        known = ", ".join(record.name for record in declared.values()) or "nothing"
        raise UserError(dataset.prefix, f"no scores of it in {cache.directory}", f"one of what it has: {known}")
    complete = cache.completeness(dataset.identity)
    if not complete.all():
        found = f"{int(complete.sum())} of {len(complete)} samples scored in {cache.directory}"
        raise UserError(dataset.prefix, found, "all of them; `remit score` goes on where it stopped")


def _score_all(sources: _Sources, scores: np.ndarray, *, progress: Progress, show: bool) -> None:
    """Fills ``scores``, float64 [all samples]."""
    for dataset, (start, stop) in zip(sources.datasets, pairwise(sources.starts), strict=True):
        for sample in range(stop - start):
            tokens = dataset[sample]
            losses = []
            for cache in (sources.reference, sources.teacher):
                loss = cache.read(dataset.identity, sample, tokens)
                if loss is None:
                    found = f"a damaged score of sample {sample} of {os.path.basename(dataset.prefix)}"
                    raise UserError(str(cache.directory), found, "a whole one: score the sample again")
                losses.append(loss)
            counted = None if sources.masked_id is None else tokens[:-1] != sources.masked_id
            scores[start + sample] = difference_score(losses[0], losses[1], counted)
            if show:
                progress.update(start + sample + 1)
    if show:
        progress.finish()


def _write_kept(
    sources: _Sources,
    scores: Scores,
    threshold: float,
    ties: int,
    writer: DatasetWriter,
    *,
    progress: Progress,
    show: bool,
) -> list[dict[str, Any]]:
    """Writes the kept samples in corpus order; returns samples, kept samples and mean score of each data set."""
    counts = []
    dtype = token_dtype(max(dataset.manifest.vocab_size for dataset in sources.datasets))
    for dataset, (first, last) in zip(sources.datasets, pairwise(sources.starts), strict=True):
        before, total, finite = writer.documents, 0.0, 0
        for start in range(first, last, _SAMPLES_AT_ONCE):
            stop = min(start + _SAMPLES_AT_ONCE, last)
            numbers, ties = scores.selected(start, stop, threshold, ties)
            for number in numbers:
                tokens = dataset[int(number) - first].astype(dtype)
                writer.append(tokens, np.array([len(tokens)], dtype=np.int32))
                if show:
                    progress.update(writer.documents)
            values = scores.in_order[start:stop]
            values = values[np.isfinite(values)]
            total, finite = total + float(values.sum()), finite + len(values)
        counts.append(
            {
                "name": os.path.basename(dataset.prefix),
                "identity": dataset.identity,
                "samples": last - first,
                "kept": writer.documents - before,
                "mean_score": total / finite if finite else None,
            }
        )
    if show:
        progress.finish()
    return counts


def _strict(report: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a threshold of -inf (samples without counted tokens were kept) is null."""
    return {**report, "threshold": report["threshold"] if np.isfinite(report["threshold"]) else None}
