"""Whether a data set says where its documents end: by an end-of-document token behind each of them.

In a sample, nothing else tells one document from the next. A setting that needs boundaries would take a sample of data
without them for a single document, and do nothing.
"""

from __future__ import annotations

import os

import numpy as np

from remit_megatron.data.indexed import IndexedTokens
from remit_megatron.data.manifest import Manifest
from remit_megatron.runtime.errors import UserError

_LOOKED_AT = 1000
EXPECTED = "data whose documents end in it (`remit data build` without --no-eod)"


def missing_boundaries(prefix: str | os.PathLike, manifest: Manifest, eod_id: int) -> str | None:
    """Says what is wrong with the ends of the documents of ``prefix``; None where each ends in ``eod_id``.

    The manifest knows what was appended. Where nothing was, the texts themselves may have held the token, so the last
    token of up to 1000 documents, evenly spread, is looked at.

    Raises:
        UserError: the data cannot be read.
    """
    if manifest.eod_id == eod_id:
        return None
    if manifest.eod_id is not None:
        return f"{os.fspath(prefix)}, whose documents end in token {manifest.eod_id}, not in {eod_id}"
    data = IndexedTokens(prefix)
    documents = np.flatnonzero(data.lengths)
    chosen = documents[np.linspace(0, len(documents) - 1, min(len(documents), _LOOKED_AT)).astype(np.int64)]
    ending = sum(int(data.read(number)[-1]) == eod_id for number in chosen.tolist())
    if len(chosen) and ending == len(chosen):
        return None
    found = f"{os.fspath(prefix)}, built without end-of-document tokens"
    return f"{found} ({ending} of {len(chosen)} documents looked at end in token {eod_id})"


def check_boundaries(prefix: str | os.PathLike, manifest: Manifest, eod_id: int, *, setting: str, value: str) -> None:
    """Refuses ``setting`` (with its ``value``) for data without boundaries.

    Raises:
        UserError: naming the setting and the data set.
    """
    missing = missing_boundaries(prefix, manifest, eod_id)
    if missing is not None:
        raise UserError(setting, f"{value} with {missing}", EXPECTED)
