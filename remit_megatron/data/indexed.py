"""Megatron's indexed token files: ``PREFIX.bin`` (tokens of all documents, end to end) and ``PREFIX.idx``.

Layout of ``.idx``, little-endian: the 9 bytes ``MMIDIDX\\0\\0``, uint64 version (1), uint8 code of the token type,
uint64 number of sequences S, uint64 number of document ends D, int32 lengths [S], int64 byte offsets [S],
int64 document ends [D]. Here one document is one sequence, so D = S + 1.

The files are the ones that ``megatron.core.datasets.indexed_dataset`` writes and reads, byte for byte (a test holds
both directions). Its builder is not used because it keeps a Python integer per document three times, several gigabytes
at 50 million documents, and its reader is not used so that looking at data needs neither torch nor Megatron.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import BinaryIO

import numpy as np

from remit_megatron.runtime.errors import UserError

_HEADER = b"MMIDIDX\x00\x00"
_VERSION = 1
_TYPE_CODES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_FIXED = struct.Struct("<QBQQ")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that Megatron uses for a vocabulary: uint16 below 65,500 entries, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def write_index(file: BinaryIO, lengths: np.ndarray, *, dtype: np.dtype) -> tuple[int, str]:
    """Writes the index of documents of ``lengths`` (int32 [documents], in tokens) that follow one another.

    Returns:
        Number of bytes written and their SHA-256.
    """
    code = next(code for code, known in _TYPE_CODES.items() if known == dtype)
    digest, size = hashlib.sha256(), 0

    def write(data: bytes | memoryview) -> None:
        nonlocal size
        file.write(data)
        digest.update(data)
        size += len(data)

    documents = len(lengths)
    write(_HEADER + _FIXED.pack(_VERSION, code, documents, documents + 1))
    offsets = np.zeros(documents, dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= dtype.itemsize
    for array in (lengths.astype("<i4"), offsets, np.arange(documents + 1, dtype="<i8")):
        write(array.data.cast("B") if array.size else b"")
    return size, digest.hexdigest()


class IndexedTokens:
    """Reads documents of one prefix; opening costs a header, reading a document touches that document only.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Attributes:
        lengths: tokens in each document, int32 [documents], memory-mapped.
        dtype: type of the stored tokens.
    """

    def __init__(self, prefix: str | os.PathLike):
        index_path, data_path = f"{os.fspath(prefix)}.idx", f"{os.fspath(prefix)}.bin"
        start = len(_HEADER) + _FIXED.size
        try:
            with open(index_path, "rb") as file:
                header = file.read(start)
            index_size, data_size = os.path.getsize(index_path), os.path.getsize(data_path)
        except OSError as error:
            raise UserError(str(error.filename), error.strerror, "a readable file of indexed tokens") from None
        if len(header) < start or not header.startswith(_HEADER):
            raise UserError(index_path, "a file that is not a Megatron index", f"a file that begins with {_HEADER!r}")
        version, code, sequences, ends = _FIXED.unpack_from(header, len(_HEADER))
        if version != _VERSION or code not in _TYPE_CODES:
            expected = f"version {_VERSION} and token type {' or '.join(map(str, _TYPE_CODES))} (int32, uint16)"
            raise UserError(index_path, f"version {version}, token type {code}", expected)
        if index_size != start + 12 * sequences + 8 * ends:
            expected = f"{start + 12 * sequences + 8 * ends} for {sequences} documents"
            raise UserError(index_path, f"{index_size} bytes", expected)
        self.dtype = _TYPE_CODES[code]
        index = np.memmap(index_path, mode="r", dtype=np.uint8)
        edges = np.asarray(index[start + 12 * sequences :]).view("<i8")[[0, -1]].tolist() if ends else []
        if ends != sequences + 1 or edges != [0, sequences]:
            found = f"{ends} document ends, from {edges[0]} to {edges[1]}" if ends else "no document ends"
            raise UserError(index_path, found, f"{sequences + 1} from 0 to {sequences}: each document one sequence")
        self.lengths = np.asarray(index[start : start + 4 * sequences]).view("<i4")
        # The fixed part has 34 bytes, so the 8-byte numbers are not aligned; numpy reads them all the same.
        self._offsets = np.asarray(index[start + 4 * sequences : start + 12 * sequences]).view("<i8")
        end = int(self._offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if end != data_size:
            raise UserError(data_path, f"{data_size} bytes", f"{end}, as {os.path.basename(index_path)} says")
        self._tokens = np.memmap(data_path, mode="r", dtype=self.dtype) if data_size else np.zeros(0, self.dtype)
        self._index_path = index_path

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start ... stop - 1 (to the end without ``stop``) of a document: a view, `dtype` [stop - start].

        Raises:
            UserError: the document does not end where the next one begins, so the index is damaged.
        """
        length = int(self.lengths[document])
        first = int(self._offsets[document])
        last = document + 1 == len(self.lengths)
        end = self._tokens.nbytes if last else int(self._offsets[document + 1])
        if first < 0 or length < 0 or first + length * self.dtype.itemsize != end or (document == 0 and first):
            found = f"document {document} of {length} tokens from byte {first} to {end}"
            raise UserError(self._index_path, found, "documents that follow one another")
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, (start, stop, length)
        first //= self.dtype.itemsize
        return self._tokens[first + start : first + stop]
