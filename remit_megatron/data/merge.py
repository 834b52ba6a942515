"""``remit data merge``: data sets that were built side by side, end to end as one."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from remit_megatron.data.indexed import IndexedTokens
from remit_megatron.data.manifest import Manifest, read_manifest
from remit_megatron.data.writer import DatasetWriter
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import sha256_file
from remit_megatron.runtime.progress import Progress

logger = logging.getLogger(__name__)

# What data sets must have in common to be one. The rest is counted together.
_IN_COMMON = ("tokenizer_digest", "vocab_size", "eod_id", "dtype", "sample_length", "special_tokens")
_BLOCK_TOKENS = 1 << 24


def merge_datasets(
    prefixes: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Writes the documents of all ``prefixes``, in this order, to ``output.bin``, ``output.idx`` and ``output.json``.

    The files are those that one build over all inputs in this order would have made. Each data set is compared with
    its manifest while it is read.

    Args:
        prefixes: complete data sets, without endings.
        output: path of the three files without their endings.
        overwrite: replace an existing data set.
        progress: show progress on standard error.

    Raises:
        UserError: data sets that do not belong together, or that are not what their manifests say; nothing is left
            behind.
    """
    manifests = [read_manifest(prefix) for prefix in prefixes]
    _refuse_strangers(prefixes, manifests)
    places = [Path(f"{os.fspath(prefix)}.bin").resolve() for prefix in (output, *prefixes)]
    for number, prefix in enumerate(prefixes, start=1):
        if places[number] == places[0]:
            raise UserError("--output", f"{output}, which is one of the inputs", "another prefix")
        if places[number] in places[1:number]:
            expected = "each data set once (a weight in data.train repeats data)"
            raise UserError("--input", f"{os.fspath(prefix)} twice", expected)
    if line := _missing_parts(prefixes):
        logger.warning("%s", line)
    first = manifests[0]
    shown = Progress("merging", total=sum(m.tokens for m in manifests), unit="tokens") if progress else None
    with DatasetWriter(output, dtype=np.dtype(first.dtype), overwrite=overwrite) as writer:
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            _append(writer, prefix, manifest, shown)
        if shown:
            shown.finish()
        return writer.commit(
            tokenizer_digest=first.tokenizer_digest,
            vocab_size=first.vocab_size,
            eod_id=first.eod_id,
            skipped=sum(manifest.skipped for manifest in manifests),
            inputs=tuple(name for manifest in manifests for name in manifest.inputs),
            sample_length=first.sample_length,
            special_tokens=first.special_tokens,
        )


def _append(
    writer: DatasetWriter, prefix: str | os.PathLike, manifest: Manifest, progress: Progress | None = None
) -> None:
    data = IndexedTokens(prefix)
    if data.dtype.name != manifest.dtype:
        raise UserError(
            f"{os.fspath(prefix)}.idx", f"tokens of {data.dtype.name}", f"{manifest.dtype}, as the manifest says"
        )
    # The lengths say where documents end, and nothing in the tokens would contradict others.
    if (found := sha256_file(f"{os.fspath(prefix)}.idx")) != manifest.idx.sha256:
        raise UserError(f"{os.fspath(prefix)}.idx", f"contents with SHA-256 {found}", f"{manifest.idx.sha256}")
    lengths = np.asarray(data.lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    digest = hashlib.sha256()
    tokens = np.memmap(f"{os.fspath(prefix)}.bin", mode="r", dtype=data.dtype) if manifest.tokens else None
    document, start = 0, 0
    while document < len(lengths):
        # Whole documents, at least one.
        stop = max(document + 1, int(np.searchsorted(ends, start + _BLOCK_TOKENS, side="right")))
        block = np.zeros(0, data.dtype) if tokens is None else np.array(tokens[start : int(ends[stop - 1])])
        digest.update(block.data.cast("B") if block.size else b"")
        writer.append(block, lengths[document:stop])
        document, start = stop, int(ends[stop - 1])
        if progress:
            progress.update(writer.tokens)
    if digest.hexdigest() != manifest.bin.sha256 or len(lengths) != manifest.documents:
        raise UserError(f"{prefix}.bin", f"contents with SHA-256 {digest.hexdigest()}", f"{manifest.bin.sha256}")


def _missing_parts(prefixes: Sequence[str | os.PathLike]) -> str:
    """A line for inputs that are called parts of a whole (``00000-of-00004``) and are not all of it."""
    named = [re.fullmatch(r"(\d+)-of-(\d+)", os.path.basename(os.fspath(prefix))) for prefix in prefixes]
    numbers = {(int(match[1]), int(match[2])) for match in named if match}
    if len(numbers) < len(prefixes):
        return ""
    wholes = {whole for _, whole in numbers}
    missing = [f"{part:05d}-of-{whole:05d}" for whole in sorted(wholes) for part in range(min(whole, 1 << 20))]
    missing = [name for name in missing if tuple(map(int, name.split("-of-"))) not in numbers]
    if not missing:
        return ""
    more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
    return f"--input: without {missing[0]}{more}: the whole has fewer documents than its parts' names say"


def _refuse_strangers(prefixes: Sequence[str | os.PathLike], manifests: Sequence[Manifest]) -> None:
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for name in _IN_COMMON:
            found, expected = getattr(manifest, name), getattr(manifests[0], name)
            if found != expected:
                raise UserError(f"{prefix}.json: {name}", found, f"{expected}, as in {prefixes[0]}.json")
        if manifest.origin is not None:
            raise UserError(f"{prefix}.json", "a source of a mix", "an output of remit data build")
