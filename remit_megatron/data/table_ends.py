"""Whether a Parquet or Arrow file is one whole file, and not several one behind the other.

What a reader learns of a table stands at the end of these files, with places that count from their beginning. Of
``cat a b > c``, with two files of one layout, it learns what b holds and reads a: fewer rows, and other ones, without a
word. Nothing but a look at what lies between the last rows and the end tells.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from remit_megatron.runtime.errors import UserError

_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream: no further message
_PIECE_BYTES = 1 << 20
_ONE = "one file of rows: several, one behind the other, are read as one of them alone"


def check_stream(file: str, source: Any) -> None:
    """Refuses an Arrow stream that stops without its end mark, as one that was cut between two batches does, and one
    with another behind it: nothing else would tell that there were more rows.

    Args:
        source: where all batches have been read from.

    Raises:
        UserError: it is no whole stream, or there is more.
    """
    rest = source.size() - source.tell()
    if rest:
        found = f"{rest} bytes behind the end of its stream"
        raise UserError(file, found, "one stream of rows: several, one behind the other, are read as the first alone")
    source.seek(0)
    begin = source.read(4)
    source.seek(max(source.size() - 8, 0))
    end = source.read(8)
    # Streams of before 2019 have no 4 bytes before each length.
    if end != _STREAM_END if begin == _STREAM_END[:4] else end[4:] != _STREAM_END[4:]:
        found = "a stream that stops without its end mark"
        raise UserError(file, found, "a complete file: it may have been cut between two batches of rows")


def check_arrow_file(file: str, source: Any) -> None:
    """Refuses an Arrow file, the layout with a footer, with something between the last rows and the footer.

    Args:
        source: that Arrow has opened without complaint.

    Raises:
        UserError: there is.
    """
    size = source.size()
    source.seek(size - 10)  # length of the footer, ARROW1
    length = struct.unpack("<i", source.read(4))[0]
    footer_start = size - 10 - length
    source.seek(8)  # behind ARROW1 and two zeros
    first, second = struct.unpack("<2I", source.read(8))
    ends = [16 + second if first == 0xFFFFFFFF else 12 + first]  # of the schema
    source.seek(footer_start)
    try:
        ends += [offset + head + body for offset, head, body in _blocks(source.read(length))]
    except struct.error:
        raise UserError(file, "a footer with places outside of it", "a complete Arrow file") from None
    between = _pieces(source, max(ends), footer_start)
    if any(piece.strip(_STREAM_END) for piece in between):  # an end mark, and zeros to a round number
        raise UserError(file, f"{footer_start - max(ends)} bytes between the last rows and the footer", _ONE)


def _blocks(footer: bytes) -> list[tuple[int, int, int]]:
    """(offset, bytes of the head, bytes of the body) of dictionaries and batches: fields 2 and 3 of Arrow's ``Footer``,
    vectors of ``Block``, in the encoding of FlatBuffers."""
    (root,) = struct.unpack_from("<I", footer)
    table = root - struct.unpack_from("<i", footer, root)[0]
    (table_size,) = struct.unpack_from("<H", footer, table)
    found: list[tuple[int, int, int]] = []
    for place in (8, 10):
        (field,) = struct.unpack_from("<H", footer, table + place) if place < table_size else (0,)
        if field:
            vector = root + field + struct.unpack_from("<I", footer, root + field)[0]
            (count,) = struct.unpack_from("<I", footer, vector)
            found += [struct.unpack_from("<qi4xq", footer, vector + 4 + 24 * number) for number in range(count)]
    return found


def check_parquet(file: str, source: BinaryIO) -> None:
    """Refuses a Parquet file in which another one begins between the last rows and the footer; what may be there is an
    index of pages, or filters.

    Args:
        source: that Arrow has opened without complaint.

    Raises:
        UserError: there is.
    """
    source.seek(-8, 2)
    end = source.tell()
    length = struct.unpack("<I", source.read(4))[0]
    source.seek(end - length)
    footer = source.read(length)
    try:
        start = max([4, *column_ends(footer)])  # behind PAR1
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError):
        return  # nothing that Arrow will get far with
    tail = b""
    for piece in _pieces(source, start, end - length):
        if b"PAR1PAR1" in tail + piece:
            raise UserError(file, "the beginning of another file between the last rows and the footer", _ONE)
        tail = piece[-7:]


def _pieces(source: Any, start: int, stop: int) -> Iterator[bytes]:
    """Bytes of a file from ``start`` to before ``stop``, which may be a whole other file's."""
    for place in range(start, stop, _PIECE_BYTES):
        source.seek(place)
        yield source.read(min(stop - place, _PIECE_BYTES))


def column_ends(footer: bytes) -> list[int]:
    """Where the columns of the last row group end, counted from the beginning of the file.

    Arrow's own view of a column (``metadata.row_group(n).column(m)``) ends the process where a footer is damaged in
    certain places.

    Args:
        footer: Parquet's ``FileMetaData`` in Thrift's compact protocol.

    Raises:
        AttributeError, IndexError, KeyError, TypeError, RecursionError: it is none.
    """
    groups = _Thrift(footer).structure()[4]
    ends = []
    for column in groups[-1][1] if groups else ():
        facts = column[3]
        ends.append((facts.get(11) or facts[9]) + facts[7])  # the first page, of a dictionary where there is one
    return ends


class _Thrift:
    """Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md"""

    def __init__(self, data: bytes):
        self._data, self._place = data, 0

    def structure(self) -> dict[int, Any]:
        """Values of fields by their number; of texts, numbers in floating point and mappings None."""
        fields, number = {}, 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            kind = header & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind in (9, 10):
            header = self._byte()
            count = header >> 4 if header >> 4 < 15 else self._variable()
            return [self._value(header & 15) for _ in range(count)]
        if kind == 12:
            return self.structure()
        if kind == 11:
            count = self._variable()
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._value(kinds >> 4)
                self._value(kinds & 15)
        elif kind in (7, 8):
            size = 8 if kind == 7 else self._variable()  # before the place is asked for, which it moves
            self._place += size
        else:
            raise TypeError(f"kind {kind}")
        return None

    def _byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _variable(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _integer(self) -> int:
        value = self._variable()
        return (value >> 1) ^ -(value & 1)
