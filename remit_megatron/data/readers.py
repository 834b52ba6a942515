"""Documents of a corpus, from JSON lines (plain, gzip, Zstandard), Parquet and Hugging Face data sets on disk.

Reading happens in two steps, so that the expensive half can run in other processes: `iter_chunks` cuts files into
pieces of whole records of about 256 KiB, and `parse_chunk` turns a piece into texts. A chunk boundary depends on
the contents only, so whatever is done per chunk gives the same result with any number of processes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

from remit_megatron.data.inputs import LOCAL_FILES, FileStore, expand_inputs
from remit_megatron.data.tables import check_offsets, columns_of, iter_batches
from remit_megatron.data.zstandard_stream import ZstandardStream
from remit_megatron.runtime.errors import UserError

_CHUNK_BYTES = 1 << 18
_LONGEST_LINE = 1 << 30
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One text and where it came from; ``number`` counts lines, or rows of a table, from 1."""

    file: str
    number: int
    text: str


class Record(NamedTuple):
    """The fields of one line, or row, and where it came from; ``number`` counts from 1."""

    file: str
    number: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some whole records of one file.

    Attributes:
        file: as the user wrote it.
        first: number of its first line or row, from 1.
        records: bytes of the lines, or columns by name.
        end: bytes of the whole input (as stored, that is compressed) that are read when this chunk is done.
    """

    file: str
    first: int
    records: bytes | dict[str, list[Any]]
    end: int


class _Pairs(list):
    """The (name, value) pairs of a JSON object, in their order."""


_parse_json = json.JSONDecoder(object_pairs_hook=_Pairs).decode


class BadRecord(Exception):
    """A record that gives no text; ``found`` and ``expected`` are halves of a message."""

    def __init__(self, found: str, expected: str):
        super().__init__(found, expected)
        self.found, self.expected = found, expected


class TextFormat:
    """Which text a record gives: one field, or several put into a template.

    Args:
        text_key: name of the field.
        template: as for `str.format` with plain names, ``"Q: {question}\\nA: {answer}"``; goes before ``text_key``.
        allow_empty: an empty string is a text.
        hint: what the message about a missing field says of the options that name it.
    """

    def __init__(
        self,
        *,
        text_key: str = "text",
        template: str | None = None,
        allow_empty: bool = False,
        hint: str = " (--text-key names another field, --template joins several)",
    ):
        self._template, self._allow_empty, self._hint = template, allow_empty, hint
        if template is None:
            self.fields: tuple[str, ...] = (text_key,)
            return
        try:
            parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise UserError("--template", f"{template!r} ({error})", "text with {field} in braces") from None
        for name, specification, conversion in parts:
            plain = name and not name.isdigit() and name.replace("_", "a").replace("-", "a").isalnum()
            if not plain or specification or conversion:
                raise UserError(
                    "--template", f"{{{name}}} in {template!r}", "plain field names in braces, as {question}"
                )
        if not parts:
            raise UserError("--template", f"{template!r}", "at least one field in braces, as {question}")
        self.fields = tuple(dict.fromkeys(cast(str, name) for name, _, _ in parts))

    def render(self, record: Mapping[str, Any]) -> str:
        """The text of ``record``.

        Raises:
            BadRecord: a field is missing, is no string, is empty, or cannot be encoded.
        """
        for name in self.fields:
            value = record.get(name)
            if isinstance(value, str) and (value or self._allow_empty):
                continue
            if name not in record:
                found = f"no field {name!r} among {', '.join(map(repr, record)) or 'none'}"
                raise BadRecord(found, f"a string in field {name!r}{self._hint}")
            if isinstance(value, bytes):
                _raise_not_utf8(value, f" in field {name!r}")
            found = "an empty string" if value == "" else _described(value)
            raise BadRecord(f"{found} in field {name!r}", "a string that is not empty")
        text = record[self.fields[0]] if self._template is None else self._template.format_map(record)
        _check_surrogates(text)
        return text


def _described(value: Any) -> str:
    """What stands where a text should: its type, and its beginning where that says more."""
    kind = "dict" if isinstance(value, _Pairs) else type(value).__name__
    try:
        return f"{kind} ({str(dict(value) if isinstance(value, _Pairs) else value)[:40]})"
    except RecursionError:  # what could just be parsed may be too deep to be written
        return kind


def _check_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair at character {error.start} of the text"
        raise BadRecord(found, "text that can be written in UTF-8") from None


def _raise_not_utf8(data: bytes, where: str = "") -> NoReturn:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"byte {error.start + 1}{where}, which is not UTF-8", "UTF-8") from None
    raise AssertionError("bytes in place of text that is UTF-8")


def total_bytes(files: Sequence[str], *, store: FileStore = LOCAL_FILES) -> int:
    """Bytes of all files as stored; the scale of `Chunk.end`."""
    return sum(map(store.size, files))


def iter_chunks(files: Sequence[str], *, fields: Sequence[str], store: FileStore = LOCAL_FILES) -> Iterator[Chunk]:
    """Cuts ``files`` into chunks in order; of tables, only the columns ``fields`` are read.

    Args:
        store: where the files are.

    Raises:
        UserError: a file that is damaged, cannot be read, or lacks a column.
    """
    before = 0
    for file in files:
        try:
            size = store.size(file)
            tables = file.endswith((".parquet", ".arrow"))
            parts = _iter_rows(file, size, fields, store) if tables else _iter_lines(file, store)
            for first, records, done in parts:
                yield Chunk(file, first, records, before + min(done, size))
        except (OSError, EOFError, zlib.error) as error:
            # pyarrow's and gzip's errors are OSErrors without an errno when the contents are at fault.
            # That of a connection that gave no answer in time says nothing at all.
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(file, f"a file that cannot be read ({reason})", "a complete file of its kind") from None
        before += size


def _iter_lines(file: str, store: FileStore) -> Iterator[tuple[int, bytes, int]]:
    with store.open(file) as raw:
        number = 1
        stream = _decompressed(raw, file)
        while block := stream.read(_CHUNK_BYTES):
            if not block.endswith(b"\n"):
                rest = stream.readline(_LONGEST_LINE)
                if len(rest) == _LONGEST_LINE:
                    raise UserError(
                        f"{file}:{number + block.count(b'\n')}", "a line of over 1 GiB", "one record a line"
                    )
                block += rest
            yield number, block.removeprefix(_BOM) if number == 1 else block, raw.tell()
            number += block.count(b"\n")


def _decompressed(raw: BinaryIO, file: str) -> BinaryIO:
    if file.endswith((".gz", ".zst", ".zstd")):
        if not raw.read(1):  # gzip's own reader takes it for a whole file
            raise EOFError("0 bytes, where even nothing at all is compressed to a few")
        raw.seek(0)
    if file.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if file.endswith((".zst", ".zstd")):
        return cast(BinaryIO, io.BufferedReader(ZstandardStream(raw), 1 << 20))
    return raw


def _iter_rows(
    file: str, size: int, fields: Sequence[str], store: FileStore
) -> Iterator[tuple[int, dict[str, list[Any]], int]]:
    import pyarrow

    row = 1
    try:
        for batch, share in iter_batches(file, fields, store):
            check_offsets(batch)
            rows_each = max(1, batch.num_rows * _CHUNK_BYTES // max(batch.nbytes, 1))
            for start in range(0, batch.num_rows, rows_each):
                piece = batch.slice(start, rows_each)
                yield row, columns_of(piece), int(size * share)
                row += piece.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter of a damaged column name
        raise OSError(str(error)) from None


def parse_chunk(chunk: Chunk, text_format: TextFormat) -> Iterator[tuple[int, str | BadRecord]]:
    """Texts of a chunk with their line or row numbers, a `BadRecord` in place of what gives no text.

    Lines of white space only hold no record: they are passed over, and are no error.
    """
    for number, record in _records(chunk, text_format.fields):
        if isinstance(record, BadRecord):
            yield number, record
            continue
        try:
            yield number, text_format.render(record)
        except BadRecord as bad:
            yield number, bad


def _records(chunk: Chunk, fields: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
    if isinstance(chunk.records, dict):
        names = list(chunk.records)
        for number, values in enumerate(zip(*chunk.records.values(), strict=True), start=chunk.first):
            yield number, dict(zip(names, values, strict=True))
        return
    for number, line in enumerate(chunk.records.split(b"\n"), start=chunk.first):
        if line.isspace() or not line:
            continue
        try:
            pairs = _parse_json(line.decode())
        except UnicodeDecodeError as error:
            yield number, BadRecord(f"byte {error.start + 1}, which is not UTF-8", "UTF-8")
        except (ValueError, RecursionError) as error:
            yield number, BadRecord(f"text that is not JSON ({error})", "one JSON object on each line")
        else:
            yield number, _record(pairs, fields)


def _record(pairs: Any, fields: Sequence[str]) -> dict[str, Any] | BadRecord:
    """A line's fields. One that is wanted and there twice with different values is refused: of such lines, one reader
    takes the first value and another the last."""
    if not isinstance(pairs, _Pairs):
        return BadRecord(f"JSON {type(pairs).__name__}", "a JSON object on each line")
    record = dict(pairs)
    if len(record) != len(pairs):
        for name in fields:
            values = [value for key, value in pairs if key == name]
            if any(value != values[0] for value in values[1:]):
                return BadRecord(f"field {name!r} {len(values)} times, with different values", "each field once")
    return record


def iter_documents(
    inputs: Sequence[str | os.PathLike], *, text_key: str = "text", template: str | None = None
) -> Iterator[Document]:
    """All documents of ``inputs`` in order.

    Raises:
        UserError: as `expand_inputs` and `iter_chunks`; or a bad record, named by file and number.
    """
    text_format = TextFormat(text_key=text_key, template=template)
    for chunk in iter_chunks(expand_inputs(inputs), fields=text_format.fields):
        for number, text in parse_chunk(chunk, text_format):
            if isinstance(text, BadRecord):
                raise UserError(f"{chunk.file}:{number}", text.found, text.expected)
            yield Document(chunk.file, number, text)


def iter_records(inputs: Sequence[str | os.PathLike], *, fields: Sequence[str]) -> Iterator[Record]:
    """All records of ``inputs`` in order, with those of ``fields`` that they have; values are plain lists and dicts.

    Raises:
        UserError: as `expand_inputs` and `iter_chunks`; or a bad record, named by file and number.
    """
    for chunk in iter_chunks(expand_inputs(inputs), fields=fields):
        for number, record in _records(chunk, fields):
            try:
                if isinstance(record, BadRecord):
                    raise record
                plain = {name: _plain(record[name]) for name in fields if name in record}
            except BadRecord as bad:
                raise UserError(f"{chunk.file}:{number}", bad.found, bad.expected) from None
            yield Record(chunk.file, number, plain)


def _plain(value: Any) -> Any:
    """A parsed value without the pairs that objects are read as; text that cannot be written in UTF-8 is none."""
    if isinstance(value, bytes):
        _raise_not_utf8(value)
    if isinstance(value, str):
        _check_surrogates(value)
        return value
    if isinstance(value, _Pairs):
        for name, _ in value:
            _check_surrogates(name)
        record = {name: _plain(inner) for name, inner in value}
        if len(record) != len(value):
            raise BadRecord(f"an object with a field twice ({', '.join(name for name, _ in value)})", "each field once")
        return record
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
