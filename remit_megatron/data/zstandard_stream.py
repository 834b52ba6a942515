"""Zstandard files as streams: of several frames, with windows up to 2 GiB, and noticed where they end early."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

_LONGEST_WINDOW = 1 << 31  # what `zstd --long=31` makes, the longest there is on a 64-bit machine
_PIECE_BYTES = 1 << 14  # read at once; a frame of one byte repeated gives thousands of times as much


class ZstandardStream(io.RawIOBase):
    """The decompressed contents of ``raw``, skippable frames left out.

    The library's own stream takes a file that ends within a frame for a whole one, and Arrow's knows windows up to
    128 MiB only; so frames are gone through here.
    """

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
        self._error = zstandard.ZstdError
        self._frame: Any = None  # the decompressor of the frame that has begun
        self._behind = b""  # what was read behind the end of the last frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = self._behind or self._raw.read(_PIECE_BYTES)
            self._behind = b""
            if piece:
                self._ready = memoryview(self._decompressed(piece))
            elif self._frame is not None:
                raise EOFError("the file ends within a Zstandard frame")
            else:
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompressed(self, piece: bytes) -> bytes:
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            data = self._frame.decompress(piece)
        except self._error as error:
            reason = str(error)
            if "too much memory" in reason:
                reason = "a Zstandard window of over 2 GiB; compress it again with zstd --long=31 or less"
            if "Dictionary mismatch" in reason:
                reason = "compressed with a dictionary, which is not in the file; compress it again without one"
            raise OSError(reason) from None
        if self._frame.eof:
            self._behind, self._frame = self._frame.unused_data, None
        return data
