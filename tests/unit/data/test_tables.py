"""Rows of Parquet and Arrow files: every kind of string column, and what is wrong in one named by its row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from remit_megatron.data.readers import BadRecord, TextFormat, iter_chunks, iter_documents, parse_chunk
from remit_megatron.data.table_ends import column_ends
from remit_megatron.runtime.errors import UserError

ROWS = [b"one", b"", b"tw\xc3\xb6", None, b"bad \xff here", b"\xed\xa0\x80", b"last"]
KINDS = ["string", "large_string", "string_view", "dictionary", "large_dictionary"]


def column(kind: str, rows: list[bytes | None]) -> pa.Array:
    """Strings as they may lie in a file, unchecked."""
    if kind == "string_view":
        return pa.array(rows, pa.binary_view()).view(pa.string_view())
    dictionary = kind.endswith("dictionary")
    values = [row or b"" for row in rows] if dictionary else rows  # a null is a place without an entry
    if kind.startswith("large"):
        strings = pa.array(values, pa.large_binary()).view(pa.large_string())
    else:
        strings = pa.array(values, pa.binary()).view(pa.string())
    if dictionary:
        places = pa.array([None if row is None else n for n, row in enumerate(rows)], pa.int32())
        return pa.DictionaryArray.from_arrays(places, strings)
    return strings


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.stem == "stream":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    return path


def rows(path: Path, text_format: TextFormat) -> list[tuple[int, str]]:
    """Number and text of each row, or what is wrong with it."""
    chunks = iter_chunks([str(path)], fields=text_format.fields)
    found = [row for chunk in chunks for row in parse_chunk(chunk, text_format)]
    return [(number, text.found if isinstance(text, BadRecord) else text) for number, text in found]


@pytest.mark.parametrize("name", ["table.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_string_that_is_not_utf8_is_a_bad_row(tmp_path, name, kind):
    path = write(tmp_path / name, pa.table({"n": list(range(7)), "text": column(kind, ROWS)}))
    assert rows(path, TextFormat()) == [
        (1, "one"),
        (2, "an empty string in field 'text'"),
        (3, "twö"),
        (4, "NoneType (None) in field 'text'"),
        (5, "byte 5 in field 'text', which is not UTF-8"),
        (6, "byte 1 in field 'text', which is not UTF-8"),
        (7, "last"),
    ]
    with pytest.raises(UserError, match=f"^{path}:2: "):
        list(iter_documents([path]))


@pytest.mark.parametrize("name", ["table.parquet", "stream.arrow"])
def test_good_columns_beside_bad_ones(tmp_path, name):
    """Only the columns that are asked for are looked at; a template takes several."""
    table = pa.table(
        {
            "text": column("string", [b"a", b"b"]),
            "noise": column("string", [b"\xff", b"\xfe"]),
            "title": column("dictionary", [b"t", b"\xff"]),
            "nothing": pa.nulls(2),
        }
    )
    path = write(tmp_path / name, table)
    assert rows(path, TextFormat()) == [(1, "a"), (2, "b")]
    template = TextFormat(template="{title}: {text}")
    assert rows(path, template) == [(1, "t: a"), (2, "byte 1 in field 'title', which is not UTF-8")]
    assert rows(path, TextFormat(text_key="nothing")) == [(n, "NoneType (None) in field 'nothing'") for n in (1, 2)]


@pytest.mark.parametrize("name", ["table.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([b"a"]), "binary"),
        (pa.array([["a"]]), "list<element: string>|list<item: string>"),
        (pa.array([{"text": "a"}]), "struct<text: string>"),
        (pa.array([1.5]), "double"),
        (pa.array([True]), "bool"),
    ],
    ids=["binary", "list", "struct", "double", "bool"],
)
def test_columns_that_hold_no_strings(tmp_path, name, values, kind):
    path = write(tmp_path / name, pa.table({"text": values}))
    with pytest.raises(UserError) as caught:
        list(iter_documents([path]))
    messages = {f"{path}: found column 'text' of type {one}; expected a column of strings" for one in kind.split("|")}
    assert str(caught.value) in messages


@pytest.mark.parametrize("name", ["table.parquet", "stream.arrow", "file.arrow"])
def test_two_columns_of_one_name(tmp_path, name):
    table = pa.Table.from_arrays([pa.array([text]) for text in ("a", "b", "c")], names=["text", "other", "text"])
    path = write(tmp_path / name, table)
    with pytest.raises(UserError, match="found 2 columns 'text'; expected one") as caught:
        list(iter_documents([path]))
    assert caught.value.field == str(path)
    # What is not asked for may be there any number of times.
    assert [document.text for document in iter_documents([path], text_key="other")] == ["b"]


def test_names_with_points(tmp_path):
    """Parquet spells fields of structures with a point; a column's own name may have one."""
    nested = pa.array([{"b": "inner"}])
    path = write(tmp_path / "table.parquet", pa.table({"a": nested, "a.b": ["outer"], "text": ["x"], "text.b": ["y"]}))
    assert [document.text for document in iter_documents([path], text_key="a.b")] == ["outer"]
    assert [document.text for document in iter_documents([path])] == ["x"]


@pytest.mark.parametrize("batches", [1, 2])
def test_a_stream_cut_between_batches_is_not_whole(tmp_path, batches):
    """Its reader takes the end of the file for the end of the rows."""
    table = pa.table({"text": ["one", "two", "three"]})
    path = tmp_path / "stream.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        ends = []
        for batch in table.to_batches(max_chunksize=1):
            stream.write_batch(batch)
            ends.append(file.tell())
    whole = path.read_bytes()
    assert [text for _, text in rows(path, TextFormat())] == ["one", "two", "three"]
    path.write_bytes(whole[: ends[batches]])
    with pytest.raises(UserError, match="a stream that stops without its end mark"):
        rows(path, TextFormat())
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match=f"{len(whole)} bytes behind the end of its stream"):
        rows(path, TextFormat())


def test_streams_of_old_versions_are_read(tmp_path):
    table = pa.table({"text": ["one", "two"]})
    path = tmp_path / "stream.arrow"
    options = pa.ipc.IpcWriteOptions(use_legacy_format=True)
    with pa.ipc.new_stream(path, table.schema, options=options) as stream:
        stream.write_table(table)
    assert [text for _, text in rows(path, TextFormat())] == ["one", "two"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="without its end mark"):
        rows(path, TextFormat())


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_page_that_is_not_what_its_checksum_says(tmp_path, version):
    """Nothing else tells: other letters of the same length are text like any other."""
    path = tmp_path / "x.parquet"
    options = {"compression": "none", "use_dictionary": False, "data_page_version": version}
    texts = [f"document {number}" for number in range(3000)]
    pq.write_table(pa.table({"text": texts}), path, write_page_checksum=True, **options)
    assert [document.text for document in iter_documents([path])] == texts
    data = path.read_bytes()
    path.write_bytes(data.replace(b"document 2000", b"document 9999"))
    with pytest.raises(UserError, match=r"cannot be read \(could not verify page integrity, CRC checksum"):
        list(iter_documents([path]))
    # Without a checksum there is nothing to compare.
    pq.write_table(pa.table({"text": texts}), path, **options)
    assert [document.text for document in iter_documents([path])] == texts


@pytest.mark.parametrize("name", [b"caf\xe9.parquet", b"stream.caf\xe9.arrow", b"file.caf\xe9.arrow"])
def test_names_that_are_not_utf8(tmp_path, name):
    path = write(tmp_path / name.decode(errors="replace"), pa.table({"text": ["one", "two"]}))
    path = path.rename(tmp_path / os.fsdecode(name))
    assert [document.text for document in iter_documents([path])] == ["one", "two"]
    assert [document.text for document in iter_documents([tmp_path])] == ["one", "two"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cannot be read|end mark"):
        list(iter_documents([path]))


def arrow_file(path: Path, texts: list[list[str]], *, coded: bool = False, **options: object) -> bytes:
    """A batch for each list; ``coded`` by a dictionary that grows."""
    column = pa.chunked_array([pa.array(each, pa.string()) for each in texts], pa.string())
    table = pa.table({"n": list(range(len(column))), "text": column.dictionary_encode() if coded else column})
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
        for start in range(0, len(column), 2):
            file.write_table(table.slice(start, 2))
    return path.read_bytes()


ARROW_FILES: dict[str, dict[str, object]] = {
    "plain": {},
    "dictionary": {"coded": True, "emit_dictionary_deltas": True, "unify_dictionaries": True},
    "zstd": {"compression": "zstd"},
    "of before 2019": {"use_legacy_format": True, "metadata_version": pa.ipc.MetadataVersion.V4},
}


@pytest.mark.parametrize("kind", ARROW_FILES)
def test_arrow_files_one_behind_the_other(tmp_path, kind):
    """The footer of the last speaks of places that are in the first, of which it then gives the rows."""
    path, options = tmp_path / "x.arrow", ARROW_FILES[kind]
    first = arrow_file(path, [["one", "two"], ["six"]], **options)
    second = arrow_file(path, [["1st", "2nd"], ["3rd"]], **options)
    assert len(first) == len(second)
    assert [document.text for document in iter_documents([path])] == ["1st", "2nd", "3rd"]
    empty = arrow_file(path, [], **options)
    assert list(iter_documents([path])) == []
    for parts in ((first, second), (second, second, second), (empty, empty), (first, empty)):
        path.write_bytes(b"".join(parts))
        with pytest.raises(UserError, match=r"bytes between the last rows and the footer|cannot be read"):
            list(iter_documents([path]))


@pytest.mark.parametrize("options", [{}, {"write_page_index": True, "row_group_size": 2}, {"use_dictionary": False}])
def test_parquet_files_one_behind_the_other(tmp_path, options):
    path = tmp_path / "x.parquet"
    contents = []
    for texts in (["one", "two", "six"], ["1st", "2nd", "3rd"], ["another length"] * 99, []):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string()), "n": list(range(len(texts)))}), path, **options)
        contents.append(path.read_bytes())
        assert [document.text for document in iter_documents([path])] == texts
    first, second, other, empty = contents
    for parts in ((first, second), (first, other), (other, first), (empty, empty), (first, empty), (first,) * 3):
        path.write_bytes(b"".join(parts))
        with pytest.raises(UserError, match=r"beginning of another file between|cannot be read"):
            list(iter_documents([path]))


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_where_columns_end_is_what_arrow_says(tmp_path, compression, dictionary):
    table = pa.table({"text": ["a", None, "bc"] * 40, "n": list(range(120)), "tags": [["x"], [], None] * 40})
    path = tmp_path / "a.parquet"
    options = {"row_group_size": 17, "use_dictionary": dictionary, "data_page_version": "2.0"}
    pq.write_table(table, path, compression=compression, write_page_index=True, **options)
    data = path.read_bytes()
    metadata = pq.read_metadata(path)
    last = metadata.row_group(metadata.num_row_groups - 1)
    expected = []
    for column in map(last.column, range(last.num_columns)):
        first = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
        expected.append(first + column.total_compressed_size)
    assert column_ends(data[-8 - metadata.serialized_size : -8]) == expected


def test_no_damaged_footer_ends_the_process(tmp_path):
    """Arrow's view of a column does: `Definition level histogram size mismatch` is thrown where nothing catches it."""
    path = write(tmp_path / "a.parquet", pa.table({"text": ["one", "two"] * 6, "n": list(range(12))}))
    program = f"""
from remit_megatron.data.readers import TextFormat, iter_chunks
from remit_megatron.data.table_ends import column_ends
from remit_megatron.runtime.errors import UserError
path, whole = {str(path)!r}, open({str(path)!r}, "rb").read()
for place in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole)):
    with open(path, "wb") as file:
        file.write(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
    try:
        list(iter_chunks([path], fields=TextFormat().fields))
    except UserError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
