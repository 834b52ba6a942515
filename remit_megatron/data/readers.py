"""Documents of a corpus, from JSON lines (plain, gzip, Zstandard), Parquet and Hugging Face data sets on disk.

Reading happens in two steps, so that the expensive half can run in other processes: `iter_chunks` cuts files into
pieces of whole records of about 256 KiB, and `parse_chunk` turns a piece into texts. A chunk boundary depends on
the contents only, so whatever is done per chunk gives the same result with any number of processes.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from remit_megatron.runtime.errors import UserError

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
KNOWN_SUFFIXES = (
    *(suffix + packed for suffix in LINE_SUFFIXES for packed in ("", ".gz", ".zst", ".zstd")),
    ".parquet",
    ".arrow",
)
_CHUNK_BYTES = 1 << 18
_LONGEST_LINE = 1 << 30
_BOM = b"\xef\xbb\xbf"


class FileStore(Protocol):
    """Where files are read from."""

    def open(self, file: str) -> BinaryIO:
        """The file's bytes, seekable. Errors of reading are OSErrors."""
        ...

    def size(self, file: str) -> int:
        """Its bytes, as stored."""
        ...


class LocalFiles:
    """The file system of this machine."""

    def open(self, file: str) -> BinaryIO:
        return open(file, "rb")

    def size(self, file: str) -> int:
        return os.path.getsize(file)


LOCAL_FILES = LocalFiles()


class Document(NamedTuple):
    """One text and where it came from; ``number`` counts lines, or rows of a table, from 1."""

    file: str
    number: int
    text: str


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
    """

    def __init__(self, *, text_key: str = "text", template: str | None = None):
        self._template = template
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
            if isinstance(value, str) and value:
                continue
            if name not in record:
                expected = f"a string in field {name!r} (--text-key names another field, --template joins several)"
                raise BadRecord(f"no field {name!r} among {', '.join(map(repr, record)) or 'none'}", expected)
            found = "an empty string" if value == "" else f"{type(value).__name__} ({str(value)[:40]})"
            raise BadRecord(f"{found} in field {name!r}", "a string that is not empty")
        text = record[self.fields[0]] if self._template is None else self._template.format_map(record)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"half of a surrogate pair at character {error.start} of the text"
            raise BadRecord(found, "text that can be written in UTF-8") from None
        return text


def expand_inputs(inputs: Sequence[str | os.PathLike]) -> list[str]:
    """Files behind ``inputs``, in a fixed order: files, glob patterns, directories of such files, and directories that
    ``datasets.Dataset.save_to_disk`` wrote.

    Raises:
        UserError: something does not exist, matches nothing, or has an ending that nothing here reads.
    """
    files: list[str] = []
    for item in (os.fspath(item) for item in inputs):
        if os.path.isdir(item):
            files += _files_of_directory(item)
        elif os.path.exists(item):
            files.append(item)
        elif glob.has_magic(item):
            matches = sorted(match for match in glob.glob(item, recursive=True) if os.path.isfile(match))
            if not matches:
                raise UserError("--input", f"pattern {item}, which matches no file", "at least one file")
            files += matches
        else:
            raise UserError("--input", f"{item}, which does not exist", "a file, a pattern or a directory")
    for file in files:
        if not file.endswith(KNOWN_SUFFIXES):
            raise UserError("--input", file, f"a file ending in {', '.join(KNOWN_SUFFIXES)}")
    if not files:
        raise UserError("--input", "no file", "at least one file")
    return files


def _files_of_directory(directory: str) -> list[str]:
    root = Path(directory)
    if (root / "dataset_dict.json").exists():
        splits = json.loads((root / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        raise UserError("--input", f"{directory} with splits {', '.join(splits)}", f"one split, as {root / splits[0]}")
    if (root / "state.json").exists():
        try:
            state = json.loads((root / "state.json").read_text(encoding="utf-8"))
            return [str(root / item["filename"]) for item in state["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            found = f"state.json without a list of data files ({type(error).__name__}: {error})"
            raise UserError(directory, found, "a data set written by save_to_disk") from None
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name.endswith(KNOWN_SUFFIXES))
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not files:
        raise UserError("--input", f"{directory} without data files", f"files ending in {', '.join(KNOWN_SUFFIXES)}")
    return list(map(str, files))


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
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
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
    if file.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if file.endswith((".zst", ".zstd")):
        return cast(BinaryIO, io.BufferedReader(_ZstandardStream(raw), 1 << 20))
    return raw


class _ZstandardStream(io.RawIOBase):
    """Decompresses with Arrow, which reads files of several frames and notices one that ends early."""

    def __init__(self, raw: BinaryIO):
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _iter_rows(
    file: str, size: int, fields: Sequence[str], store: FileStore
) -> Iterator[tuple[int, dict[str, list[Any]], int]]:
    import pyarrow

    row = 1
    try:
        for batch, share in _iter_batches(file, fields, store):
            rows_each = max(1, batch.num_rows * _CHUNK_BYTES // max(batch.nbytes, 1))
            for start in range(0, batch.num_rows, rows_each):
                piece = batch.slice(start, rows_each)
                yield row, piece.to_pydict(), int(size * share)
                row += piece.num_rows
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _iter_batches(file: str, fields: Sequence[str], store: FileStore) -> Iterator[tuple[Any, float]]:
    """Record batches with the columns ``fields``, each with the share of the file that is read after it."""
    import pyarrow
    import pyarrow.parquet

    local = store is LOCAL_FILES  # Arrow reads these itself, without the detour over Python
    if file.endswith(".parquet"):
        with pyarrow.parquet.ParquetFile(file if local else store.open(file), pre_buffer=False) as table:
            _check_columns(file, table.schema_arrow, fields)
            rows, done = max(table.metadata.num_rows, 1), 0
            for batch in table.iter_batches(batch_size=1024, columns=list(fields), use_threads=False):
                done += batch.num_rows
                yield batch, done / rows
        return
    with pyarrow.memory_map(file) if local else pyarrow.PythonFile(store.open(file), mode="r") as source:
        try:
            stream = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two layouts, with a footer
            reader = pyarrow.ipc.open_file(source)
            _check_columns(file, reader.schema, fields)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index).select(list(fields)), (index + 1) / reader.num_record_batches
            return
        _check_columns(file, stream.schema, fields)
        for batch in stream:
            yield batch.select(list(fields)), source.tell() / max(source.size(), 1)


def _check_columns(file: str, schema: Any, fields: Sequence[str]) -> None:
    import pyarrow.types as kinds

    for name in fields:
        if name not in schema.names:
            expected = f"a column {name!r} (--text-key names another column, --template joins several)"
            raise UserError(file, f"columns {', '.join(map(repr, schema.names))}", expected)
        kind = schema.field(name).type
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
            raise UserError(file, f"column {name!r} of type {kind}", "a column of strings")


def parse_chunk(chunk: Chunk, text_format: TextFormat) -> Iterator[tuple[int, str | BadRecord]]:
    """Texts of a chunk with their line or row numbers, a `BadRecord` in place of what gives no text.

    Lines of white space only hold no record: they are passed over, and are no error.
    """
    for number, record in _records(chunk):
        if isinstance(record, BadRecord):
            yield number, record
            continue
        try:
            yield number, text_format.render(record)
        except BadRecord as bad:
            yield number, bad


def _records(chunk: Chunk) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
    if isinstance(chunk.records, dict):
        names = list(chunk.records)
        for number, values in enumerate(zip(*chunk.records.values(), strict=True), start=chunk.first):
            yield number, dict(zip(names, values, strict=True))
        return
    for number, line in enumerate(chunk.records.split(b"\n"), start=chunk.first):
        if line.isspace() or not line:
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield number, BadRecord(f"byte {error.start + 1}, which is not UTF-8", "UTF-8")
        except (ValueError, RecursionError) as error:
            yield number, BadRecord(f"text that is not JSON ({error})", "one JSON object on each line")
        else:
            good = isinstance(record, dict)
            yield number, record if good else BadRecord(f"JSON {type(record).__name__}", "a JSON object on each line")


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
