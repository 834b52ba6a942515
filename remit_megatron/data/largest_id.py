"""The largest token id of a data set: what decides whether a model has a row for each of its tokens.

New manifests hold it. Of older data it is found by reading the tokens once, and kept beside them (``PREFIX.ids.json``)
where that folder can be written; only data of a tokenizer with more entries than the model has rows is ever asked.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from remit_megatron.data.indexed import IndexedTokens
from remit_megatron.data.manifest import Manifest, read_manifest
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import parse_json, whole, write_atomic

_PIECE = 1 << 25  # tokens


def check_ids(prefix: str | os.PathLike, rows: int, *, field: str) -> None:
    """Refuses data with tokens that a model has no row for.

    Args:
        prefix: of the data set.
        rows: of the model's embedding, without padding.
        field: the setting that names the data.

    Raises:
        UserError: there are such tokens; or as `read_manifest`.
    """
    manifest = read_manifest(prefix)
    largest = manifest.largest_id
    if largest is None:
        if manifest.vocab_size <= rows:
            return
        largest = largest_id(prefix, manifest)
    if largest >= rows:
        expected = f"below {rows}, the rows of the model's embedding"
        raise UserError(f"{field} {os.fspath(prefix)}", f"ids up to {largest}", expected)


def largest_id(prefix: str | os.PathLike, manifest: Manifest) -> int:
    """Largest token id of an older data set; -1 for one without tokens."""
    kept = Path(f"{os.fspath(prefix)}.ids.json")
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = parse_json(kept.read_bytes())
        if content["bin"] == manifest.bin.sha256:
            return whole(content["largest_id"])
    largest = -1
    if manifest.bin.size:
        dtype = IndexedTokens(prefix).dtype  # what their reader takes them for
        tokens = np.memmap(f"{os.fspath(prefix)}.bin", mode="r", dtype=dtype)
        largest = max(int(tokens[start : start + _PIECE].max()) for start in range(0, len(tokens), _PIECE))
    with suppress(OSError):
        write_atomic(kept, json.dumps({"bin": manifest.bin.sha256, "largest_id": largest}) + "\n")
    return largest
