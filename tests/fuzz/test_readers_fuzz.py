"""Corpora in every kind of file: the texts that were written come back, and damage is refused or is a bad record."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from remit_megatron.data.readers import BadRecord, TextFormat, iter_chunks, parse_chunk
from tests.fuzz.damage import REFUSED, damaged, examples, handled, odd_values

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLES = (".parquet", ".arrow")
characters = st.characters(exclude_categories=["Cs"])
texts = st.lists(st.text(characters, min_size=1, max_size=30), max_size=12)


def pack(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        half = len(data) // 2
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if suffix.endswith(".zst"):
        half = len(data) // 2
        compressor = zstandard.ZstdCompressor()
        return compressor.compress(data[:half]) + compressor.compress(data[half:])
    return data


def write_table(path: Path, values: list[Any]) -> Path:
    table = pyarrow.table({"text": pyarrow.array(values, pyarrow.string()), "n": list(range(len(values)))})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=5)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return path


def read(path: Path) -> list[tuple[int, str | BadRecord]]:
    text_format = TextFormat()
    chunks = iter_chunks([str(path)], fields=text_format.fields)
    return [record for chunk in chunks for record in parse_chunk(chunk, text_format)]


@pytest.mark.parametrize("suffix", LINES + TABLES)
@examples(40)
@given(texts=texts)
def test_what_was_written_is_read(tmp_path, suffix, texts):
    path = tmp_path / f"a{suffix}"
    if suffix in TABLES:
        write_table(path, texts)
    else:
        path.write_bytes(pack("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), suffix))
    assert read(path) == list(enumerate(texts, start=1))


bytes_of_a_line = st.binary(max_size=20).map(lambda line: line.replace(b"\n", b""))
lines_as_they_come = (b"", b" ", b"\r", b"\xef\xbb\xbf", b"null", b"[]", b'{"text": "\\ud800"}', b"\xff", b"{" * 30)
some_value = st.builds(lambda value: json.dumps({"text": value}).encode(), odd_values | st.text(max_size=9))
some_text = st.builds(lambda text: json.dumps({"text": text, "b": 1}, ensure_ascii=False).encode(), st.text(characters))
raw_lines = st.lists(bytes_of_a_line | st.sampled_from(lines_as_they_come) | some_value | some_text, max_size=8)


def expected_of(line: bytes) -> str | type[BadRecord] | None:
    """What one line means, told without the reader: its text, None for no record, or that it is bad."""
    if not line.strip(b" \t\n\r\x0b\x0c"):
        return None
    try:
        record = json.loads(line.decode())
        text = record["text"]
        text.encode()
        return text or BadRecord
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return BadRecord


@pytest.mark.parametrize("suffix", LINES)
@examples(80)
@given(lines=raw_lines, ended=st.booleans())
def test_every_line_is_a_text_or_a_bad_record(tmp_path, suffix, lines, ended):
    path = tmp_path / f"a{suffix}"
    data = b"\n".join(lines) + (b"\n" if ended else b"")
    path.write_bytes(pack(data, suffix))
    data = data.removeprefix(b"\xef\xbb\xbf")
    expected = [(number, expected_of(line)) for number, line in enumerate(data.split(b"\n"), start=1)]
    found = [(number, BadRecord if isinstance(text, BadRecord) else text) for number, text in read(path)]
    assert found == [(number, text) for number, text in expected if text is not None]


@pytest.mark.parametrize("suffix", (*LINES, *TABLES))
@examples(60)
@given(data=st.data())
def test_damaged_files(tmp_path, suffix, data):
    written = [f"document {number} of many" for number in range(12)]
    path = tmp_path / f"a{suffix}"
    if suffix in TABLES:
        write_table(path, written)
    else:
        path.write_bytes(pack("".join(json.dumps({"text": text}) + "\n" for text in written).encode(), suffix))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = handled(lambda: read(path))
    if found is REFUSED:
        return
    assert all(isinstance(text, str | BadRecord) for _, text in found)
    if suffix == ".jsonl.gz":  # checksums are over members: what is cut off as a whole may end inside a line
        texts = [text for _, text in found]
        texts = texts[:-1] if texts and isinstance(texts[-1], BadRecord) else texts
        assert texts == written[: len(texts)]


# Objects as programs write them, with what makes readers disagree: names twice, escapes, numbers without end.
escapes = st.sampled_from(
    (r"\u0041", r"\ud83d\ude00", r"\ud83d", r"\udc00\ud83d", r"\u0000", r"\/", r"\x41", "\t", "\u2028", "\x85")
)
strings = st.lists(escapes | st.sampled_from(("a", " ", "Ü", r"\"", r"\n", "\r")), max_size=4).map("".join)
json_values = strings.map('"{}"'.format) | st.sampled_from(
    (
        "1",
        "-0",
        "01",
        "1e999",
        "9" * 5000,
        "NaN",
        "-Infinity",
        "true",
        "null",
        "[]",
        '{"text": "x"}',
        '["a", {}]',
        "'a'",
        "",
    )
)


@st.composite
def objects(draw: Any) -> bytes:
    """A line with an object of one to three members, now and then with something around it."""
    names = st.sampled_from(('"text"', '"text"', '"b"', r'"t\u0065xt"', '"Text"', "text"))
    members = [
        f"{draw(names)}{draw(st.sampled_from((':', ' : ', ':\t')))}{draw(json_values)}"
        for _ in range(draw(st.integers(1, 3)))
    ]
    before, after = draw(
        st.sampled_from((("", ""), ("", ""), (" ", "\t"), ("\ufeff", ""), ("", "x"), ("", ","), ("[", "]")))
    )
    return f"{before}{{{', '.join(members)}}}{after}".encode()


def meant(line: bytes) -> str | type[BadRecord]:
    """What a line of `objects` says; twice with different values is nothing."""

    class Members(list):
        pass

    def read_members(pairs: list[tuple[str, Any]]) -> Any:
        return Members(pairs)

    try:
        found = json.loads(line.decode(), object_pairs_hook=read_members)
        values = [value for name, value in found if name == "text"] if isinstance(found, Members) else []
        same = bool(values) and all(value == values[0] for value in values)
        good = same and isinstance(values[0], str) and bool(values[0])
        return values[0] if good and values[0].encode() else BadRecord
    except ValueError:
        return BadRecord


@pytest.mark.parametrize("suffix", (".jsonl",))
@examples(150)
@given(lines=st.lists(objects(), min_size=1, max_size=4))
def test_objects(tmp_path, suffix, lines):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\n".join(lines))
    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    found = [BadRecord if isinstance(text, BadRecord) else text for _, text in read(path)]
    assert found == [meant(line) for line in lines]


PACKERS: dict[str, Any] = {
    "gz with a name": lambda data, rest: gz_member(data, flags=8, extra=b"name\0") + gz_member(rest),
    "gz with extras": lambda data, rest: gz_member(data, flags=4, extra=b"\3\0abc") + gz_member(rest),
    "gz with empty members": lambda data, rest: gz_member(b"") + gz_member(data) + gz_member(b"") + gz_member(rest),
    "gz padded with zeros": lambda data, rest: gz_member(data) + gz_member(rest) + b"\0" * 512,
    "gz cut off": lambda data, rest: gz_member(data) + gz_member(rest)[:-5],
    "gz with a wrong sum": lambda data, rest: gz_member(data) + gz_member(rest)[:-8] + b"\1" * 8,
    "gz with something behind": lambda data, rest: gz_member(data + rest) + b"something",
    "zst with sums": lambda data, rest: zst_frame(data, write_checksum=True) + zst_frame(rest, write_checksum=True),
    "zst without sizes": lambda data, rest: zst_frame(data, write_content_size=False) + zst_frame(rest),
    "zst with skippable frames": lambda data, rest: (
        SKIPPABLE + zst_frame(data) + SKIPPABLE + zst_frame(rest) + SKIPPABLE
    ),
    "zst with empty frames": lambda data, rest: zst_frame(b"") + zst_frame(data) + zst_frame(b"") + zst_frame(rest),
    "zst cut off": lambda data, rest: zst_frame(data) + zst_frame(rest)[:-1],
    "zst with something behind": lambda data, rest: zst_frame(data + rest) + b"something",
}
SKIPPABLE = b"\x53\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"ignored"


def gz_member(data: bytes, *, flags: int = 0, extra: bytes = b"") -> bytes:
    """A member with a header of one's own (RFC 1952)."""
    packed = gzip.compress(data)
    return packed[:3] + bytes([flags]) + packed[4:10] + extra + packed[10:]


def zst_frame(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


@pytest.mark.parametrize("way", PACKERS)
@examples(12)
@given(data=st.data())
def test_ways_to_compress(tmp_path, way, data):
    """What is whole is read whole, what is not is refused: never fewer texts."""
    texts = [f"document {number}" for number in range(data.draw(st.integers(1, 9)))]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    middle = data.draw(st.integers(0, len(lines)))
    path = tmp_path / f"a.jsonl.{way.split()[0]}"
    path.write_bytes(PACKERS[way](lines[:middle], lines[middle:]))
    found = handled(lambda: read(path))
    if "cut" in way or "wrong" in way or "behind" in way:
        assert found is REFUSED
    else:
        assert [text for _, text in found] == texts


strings_of_tables = st.one_of(
    st.none(), st.sampled_from((b"", b"\xff", b"a\xed\xa0\x80", b"\0")), st.text(characters, max_size=9).map(str.encode)
)
KINDS = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "dictionary": pyarrow.string(),
    "dictionary of large strings": pyarrow.large_string(),
    "binary": pyarrow.binary(),
    "null": pyarrow.null(),
}


def column(values: list[bytes | None], kind: str) -> Any:
    """Values that may not be UTF-8, in a column that says they are."""
    if kind == "null":
        return pyarrow.nulls(len(values))
    wide = kind in ("large_string", "dictionary of large strings")
    raw = pyarrow.array(values, pyarrow.large_binary() if wide else pyarrow.binary())
    if kind == "binary":
        return raw
    if kind.startswith("dictionary"):
        coded = raw.dictionary_encode()
        return pyarrow.DictionaryArray.from_arrays(coded.indices, coded.dictionary.view(KINDS[kind]), safe=False)
    return (
        raw.cast(pyarrow.binary_view()).view(pyarrow.string_view()) if kind == "string_view" else raw.view(KINDS[kind])
    )


@st.composite
def tables(draw: Any) -> tuple[Any, list[bytes | None], str]:
    """A table, what its column `text` holds, and the kind of that column."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    values = draw(st.lists(strings_of_tables, min_size=1, max_size=12))
    others = {"n": list(range(len(values))), "tags": [["a"]] * len(values), "meta": [{"x": None}] * len(values)}
    columns = {
        name: pyarrow.array(others[name]) for name in draw(st.lists(st.sampled_from(sorted(others)), unique=True))
    }
    columns["text"] = column(values, kind)
    names = draw(st.permutations(sorted(columns)))
    return (
        pyarrow.table({name: columns[name] for name in names}),
        [None] * len(values) if kind == "null" else values,
        kind,
    )


def write_parquet(draw: Any, table: Any, path: Path) -> None:
    encoding = draw(st.sampled_from((None, "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN")))
    pyarrow.parquet.write_table(
        table,
        path,
        row_group_size=draw(st.integers(1, 5)),
        compression=draw(st.sampled_from(("none", "snappy", "gzip", "zstd", "lz4", "brotli"))),
        data_page_version=draw(st.sampled_from(("1.0", "2.0"))),
        use_dictionary=encoding is None and draw(st.booleans()),
        column_encoding=None if encoding is None else {"text": encoding},
        write_page_checksum=draw(st.booleans()),
        store_schema=draw(st.booleans()),
    )


def write_arrow(draw: Any, table: Any, path: Path) -> None:
    options = pyarrow.ipc.IpcWriteOptions(compression=draw(st.sampled_from((None, "lz4", "zstd"))))
    make = draw(st.sampled_from((pyarrow.ipc.new_stream, pyarrow.ipc.new_file)))
    with pyarrow.OSFile(str(path), "wb") as sink, make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=draw(st.integers(1, 5)))


@pytest.mark.parametrize("suffix", TABLES)
@examples(100)
@given(data=st.data())
def test_tables_as_programs_write_them(tmp_path, suffix, data):
    table, values, kind = data.draw(tables())
    path = tmp_path / f"a{suffix}"
    try:
        (write_parquet if suffix == ".parquet" else write_arrow)(data.draw, table, path)
    except (pyarrow.ArrowException, OSError):
        return  # a kind of column that this writer does not take
    found = handled(lambda: read(path))
    if kind == "binary":
        assert found is REFUSED
        return
    if found is REFUSED:  # dictionaries of nothing with a delta encoding: pyarrow writes them and reads them not
        assert suffix == ".parquet"
        with pytest.raises((pyarrow.ArrowException, OSError)):
            pyarrow.parquet.read_table(path, columns=["text"])
        return
    assert [number for number, _ in found] == list(range(1, len(values) + 1))
    for value, (_, text) in zip(values, found, strict=True):
        try:
            assert text == value.decode() if value else isinstance(text, BadRecord)
        except UnicodeDecodeError:
            assert isinstance(text, BadRecord)


@examples(60)
@given(value=odd_values, text=st.text(max_size=20))
def test_templates(value, text):
    made = handled(lambda: TextFormat(template=text))
    if made is not REFUSED:
        record = dict.fromkeys(made.fields, value)
        try:
            assert isinstance(made.render(record), str)
        except BadRecord as bad:
            assert bad.found and bad.expected
