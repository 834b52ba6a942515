"""Shards: the scores of consecutive samples of one data set, in one file that several hosts may write at once.

    header        4096 bytes, with a checksum
    completeness  one byte a sample: 1 = complete
    (zeros up to a multiple of 4096)
    entries       a sample each: hash of its tokens, checksum over what names it and its scores, its scores

Completeness takes a byte and not a bit because a byte is the least that can be written: two processes that set two bits
of one byte would lose one of them.

Bytes are read and written with ``pread`` and ``pwrite``, not through memory maps. A page of a writable map is written
back whole, with what this host believes its neighbors' bytes to be. A read-only map counts every page that was
touched as this process's memory until it is given back, and then a page fault brings it in again, which costs more than
the copy; a page over NFS stays what it was when it was mapped, whatever other hosts have written since; and a file that
is shortened under a map kills the process. (Entries have one size and begin at a page boundary, so a tool that wants a
map of them can have it.)
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from remit_megatron.reference.cache_format import DTYPES, FORMAT_VERSION, checksum, write_all
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import create_once

HEADER_BYTES = 4096
ENTRY_HEADER_BYTES = 16
SHARD_BYTES = 1 << 28

_MAGIC = b"REMITSCO"
# magic, format version, header bytes, cache digest, data set identity, first sample, samples, sequence length, dtype
_HEADER = struct.Struct("<8sII32s32sQQII")
_CODES = {"uint16": 1, "float32": 2}


_PAGE = os.sysconf("SC_PAGESIZE")


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

    @cached_property
    def entry_bytes(self) -> int:
        """Bytes of a sample: token hash (8), checksum (8), scores."""
        return ENTRY_HEADER_BYTES + self.sequence_length * DTYPES[self.dtype].itemsize

    @cached_property
    def entries_offset(self) -> int:
        """Where the entries begin; the completeness map begins behind the header."""
        return -(-(HEADER_BYTES + self.count) // 4096) * 4096

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.entries_offset + self.entry_bytes * self.count

    def complete_at(self, sample: int) -> int:
        """Where the completeness byte of a sample is."""
        return HEADER_BYTES + sample - self.first

    def entry_at(self, sample: int) -> int:
        """Where the entry of a sample begins."""
        return self.entries_offset + (sample - self.first) * self.entry_bytes

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

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the header is damaged or names other samples, or the file has another length.
    """

    def __init__(self, path: Path, key: ShardKey):
        self.path, self.key = path, key
        self.unsynced = False  # whether something was written since the last flush
        self._dataset = bytes.fromhex(key.dataset)
        self._writer: int | None = None
        self._reader = os.open(path, os.O_RDONLY)
        try:
            self._check_size()
            self._check_header(os.pread(self._reader, HEADER_BYTES, 0), key)
        except BaseException:
            os.close(self._reader)
            raise

    @classmethod
    def create(cls, path: Path, key: ShardKey) -> Shard:
        """Makes the file, sparse and with nothing complete, unless another process was quicker; opens it."""

        def fill(descriptor: int) -> None:
            os.ftruncate(descriptor, key.size)
            write_all(descriptor, key.header(), 0)

        create_once(path, fill)
        return cls(path, key)

    def read(self, sample: int) -> tuple[bytes, bytes] | bool:
        """Stored token hash (8 bytes) and scores of a sample of this shard.

        Returns:
            Those two; or False where the sample is not complete, True where it is said to be and its checksum differs.

        Raises:
            UserError: the file has become shorter.
        """
        found = self._read_known(sample)
        if isinstance(found, bool):
            self._ask_again(self.key.complete_at(sample), 1)
            self._ask_again(self.key.entry_at(sample), self.key.entry_bytes)
            found = self._read_known(sample)
        return found

    def _read_known(self, sample: int) -> tuple[bytes, bytes] | bool:
        if self._fetch(self.key.complete_at(sample), 1) != b"\1":
            return False
        entry = self._fetch(self.key.entry_at(sample), self.key.entry_bytes)
        tokens, stored, scores = entry[:8], entry[8:ENTRY_HEADER_BYTES], entry[ENTRY_HEADER_BYTES:]
        return (tokens, scores) if stored == checksum(self._dataset, sample, tokens, scores) else True

    def write(self, sample: int, tokens: bytes, scores: bytes) -> None:
        """Stores the scores of a sample whose `token_hash` is ``tokens``; completeness goes last."""
        entry = tokens + checksum(self._dataset, sample, tokens, scores) + scores
        assert len(entry) == self.key.entry_bytes, (len(entry), self.key.entry_bytes)
        if self._writer is None:
            self._writer = self._open_writer()
        self.unsynced = True
        complete = self.key.complete_at(sample)
        if os.pread(self._writer, 1, complete) != b"\0":
            write_all(self._writer, b"\0", complete)  # between old and new a reader finds nothing, not damage
        write_all(self._writer, entry, self.key.entry_at(sample))
        write_all(self._writer, b"\1", complete)

    def forget(self, sample: int) -> None:
        """Marks a sample as not scored."""
        if self._writer is None:
            self._writer = self._open_writer()
        self.unsynced = True
        write_all(self._writer, b"\0", self.key.complete_at(sample))

    def completeness(self) -> np.ndarray:
        """bool [count], as the file says now; from the map alone."""
        self._ask_again(HEADER_BYTES, self.key.count)
        return np.frombuffer(self._fetch(HEADER_BYTES, self.key.count), dtype=np.uint8) == 1

    def flush(self) -> None:
        """Makes what this process wrote durable."""
        if self.unsynced:
            assert self._writer is not None
            os.fsync(self._writer)
            self.unsynced = False

    def close(self) -> None:
        """Closes the file; does not sync, but over NFS this is where a full disk may be noticed."""
        try:
            if self._writer is not None:
                os.close(self._writer)
        finally:
            os.close(self._reader)

    def _open_writer(self) -> int:
        writer = os.open(self.path, os.O_RDWR)
        # An NFS client that knows a whole page writes back the whole page when a byte of it changes, and with it old
        # bytes over what other hosts have written there; unless the file is locked, but not for this client alone.
        with suppress(OSError):  # a file system without locks has no such client either
            fcntl.flock(writer, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return writer

    def _ask_again(self, offset: int, size: int) -> None:
        """Lets go of the pages that this machine keeps: clients of GlusterFS never look whether another node has
        written there since."""
        first = offset // _PAGE * _PAGE
        with suppress(OSError):
            os.posix_fadvise(self._reader, first, -(-(offset + size - first) // _PAGE) * _PAGE, os.POSIX_FADV_DONTNEED)

    def _fetch(self, offset: int, size: int) -> bytes:
        data = os.pread(self._reader, size, offset)
        if len(data) != size:
            self._check_size()
            raise OSError(errno.EIO, f"{len(data)} of {size} bytes at {offset}", str(self.path))
        return data

    def _check_size(self) -> None:
        size = os.fstat(self._reader).st_size
        if size != self.key.size:
            expected = f"{self.key.size}; remove the file, and its samples are scored again"
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
