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
