"""Shards: the scores of consecutive samples of one data set, in one file that several hosts may write at once.

    header        4096 bytes, with a checksum
    completeness  one byte a sample: 1 = complete
    records       16 bytes a sample: hash of its tokens, checksum over what names it and its scores
    (zeros up to a multiple of 4096)
    scores        sequence_length numbers a sample

Completeness takes a byte and not a bit because a byte is the least that can be written: two processes that set two bits
of one byte would lose one of them.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from remit_megatron.errors import UserError
from remit_megatron.files import create_once
from remit_megatron.reference.cache_format import DTYPES, FORMAT_VERSION, checksum, write_all

HEADER_BYTES = 4096
RECORD_BYTES = 16
SHARD_BYTES = 1 << 28

_MAGIC = b"REMITSCO"
# magic, format version, header bytes, cache digest, data set identity, first sample, samples, sequence length, dtype
_HEADER = struct.Struct("<8sII32s32sQQII")
_CODES = {"uint16": 1, "float32": 2}


def samples_per_shard(sequence_length: int, dtype: str) -> int:
    """About 256 MiB of scores."""
    return max(1, SHARD_BYTES // (sequence_length * DTYPES[dtype].itemsize))


@dataclass(frozen=True)
class ShardKey:
    """Which samples a shard holds, and for which cache.

    Attributes:
        cache: `manifest_digest`.
        dataset: identity of the data set.
        index: number of the shard in its data set.
        samples: samples of the whole data set.
        sequence_length, dtype: as in the manifest.
    """

    cache: str
    dataset: str
    index: int
    samples: int
    sequence_length: int
    dtype: str

    @cached_property
    def first(self) -> int:
        """Number of the shard's first sample."""
        return self.index * samples_per_shard(self.sequence_length, self.dtype)

    @cached_property
    def count(self) -> int:
        """Samples in the shard."""
        return min(samples_per_shard(self.sequence_length, self.dtype), self.samples - self.first)

    @property
    def score_bytes(self) -> int:
        """Bytes of the scores of a sample."""
        return self.sequence_length * DTYPES[self.dtype].itemsize

    @property
    def records_offset(self) -> int:
        """Where the records begin; the completeness map begins behind the header."""
        return HEADER_BYTES + self.count

    @property
    def scores_offset(self) -> int:
        """Where the scores begin."""
        return -(-(self.records_offset + RECORD_BYTES * self.count) // 4096) * 4096

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.scores_offset + self.score_bytes * self.count

    def header(self) -> bytes:
        """The first 4096 bytes of the file; the last 8 of them are BLAKE2b over the others."""
        fields = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            HEADER_BYTES,
            bytes.fromhex(self.cache),
            bytes.fromhex(self.dataset),
            self.first,
            self.count,
            self.sequence_length,
            _CODES[self.dtype],
        )
        page = fields.ljust(HEADER_BYTES - 8, b"\0")
        return page + hashlib.blake2b(page, digest_size=8).digest()


class Shard:
    """One open shard file; its header has been checked.

    Reading goes through a read-only memory map, or past it with ``pread`` (`fresh`): over NFS only the latter asks the
    server what other hosts have written since. Writing goes through ``pwrite`` of exact byte ranges: a page of a
    writable map is written back whole, with what this host believes that the neighbors' bytes are.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the header is damaged or names other samples, or the file has another length.
    """

    def __init__(self, path: Path, key: ShardKey):
        self.path, self.first, self.count = path, key.first, key.count
        self._dataset = bytes.fromhex(key.dataset)
        self._score_bytes, self._size = key.score_bytes, key.size
        self._records, self._scores = key.records_offset, key.scores_offset
        self._writer: int | None = None
        self._reader = os.open(path, os.O_RDONLY)
        try:
            self._check_size()
            self._check_header(os.pread(self._reader, HEADER_BYTES, 0), key)
            self._map = mmap.mmap(self._reader, self._size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self._reader)
            raise
        self._map.madvise(mmap.MADV_RANDOM)

    @classmethod
    def create(cls, path: Path, key: ShardKey) -> Shard:
        """Makes the file, sparse and with nothing complete, unless another process was quicker; opens it."""

        def fill(descriptor: int) -> None:
            os.ftruncate(descriptor, key.size)
            write_all(descriptor, key.header(), 0)

        create_once(path, fill)
        return cls(path, key)

    def read(self, sample: int, *, fresh: bool = False) -> tuple[bytes, bytes] | bool:
        """Stored token hash (8 bytes) and scores of a sample of this shard.

        Returns:
            Those two; or False where the sample is not complete, True where it is said to be and its checksum differs.

        Raises:
            UserError: the file has changed its length (a map of a shortened file must not be touched).
        """
        self._check_size()
        fetch = self._fetch_fresh if fresh else self._fetch_mapped
        place = sample - self.first
        if fetch(HEADER_BYTES + place, 1) != b"\1":
            return False
        record = fetch(self._records + RECORD_BYTES * place, RECORD_BYTES)
        scores = fetch(self._scores + self._score_bytes * place, self._score_bytes)
        tokens = record[:8]
        if record[8:] != checksum(self._dataset, sample, tokens, scores):
            return True
        return tokens, scores

    def write(self, sample: int, tokens: bytes, scores: bytes) -> None:
        """Stores the scores of a sample whose `token_hash` is ``tokens``; completeness goes last."""
        assert len(scores) == self._score_bytes, (len(scores), self._score_bytes)
        if self._writer is None:
            self._writer = os.open(self.path, os.O_RDWR)
        place = sample - self.first
        complete = HEADER_BYTES + place
        if os.pread(self._writer, 1, complete) != b"\0":
            write_all(self._writer, b"\0", complete)  # between old and new a reader finds nothing, not damage
        record = tokens + checksum(self._dataset, sample, tokens, scores)
        write_all(self._writer, scores, self._scores + self._score_bytes * place)
        write_all(self._writer, record, self._records + RECORD_BYTES * place)
        write_all(self._writer, b"\1", complete)

    def completeness(self) -> np.ndarray:
        """bool [count], as the file says now; from the map alone."""
        stored = os.pread(self._reader, self.count, HEADER_BYTES)
        return np.frombuffer(stored.ljust(self.count, b"\0"), dtype=np.uint8) == 1

    def drop_pages(self) -> None:
        """Takes the pages that were read out of this process; they stay in the page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Makes what this process wrote durable."""
        if self._writer is not None:
            os.fsync(self._writer)

    def close(self) -> None:
        """Closes the file; does not sync."""
        self._map.close()
        os.close(self._reader)
        if self._writer is not None:
            os.close(self._writer)

    def _fetch_mapped(self, offset: int, size: int) -> bytes:
        return self._map[offset : offset + size]

    def _fetch_fresh(self, offset: int, size: int) -> bytes:
        return os.pread(self._reader, size, offset)

    def _check_size(self) -> None:
        size = os.fstat(self._reader).st_size
        if size != self._size:
            expected = f"{self._size}; remove the file, and its samples are scored again"
            raise UserError(str(self.path), f"{size} bytes", expected)

    def _check_header(self, header: bytes, key: ShardKey) -> None:
        if header == key.header():
            return
        again = "; remove the file, and its samples are scored again"
        page, stored = header[: HEADER_BYTES - 8], header[HEADER_BYTES - 8 :]
        if hashlib.blake2b(page, digest_size=8).digest() != stored or page[:8] != _MAGIC:
            raise UserError(str(self.path), "a damaged header", f"the header of a shard{again}")
        names = ("format version", "header size", "cache", "data set", "first sample", "samples", "sequence length")
        values = (_HEADER.unpack_from(data)[1:] for data in (header, key.header()))
        for name, found, expected in zip((*names, "dtype"), *values, strict=True):
            if found != expected:
                found, expected = (v.hex() if isinstance(v, bytes) else v for v in (found, expected))
                raise UserError(f"{self.path} ({name})", found, f"{expected}, by its place{again}")
        raise UserError(str(self.path), "a header with more than it should hold", f"zeros behind its fields{again}")
