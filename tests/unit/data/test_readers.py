"""Readers: the same documents from every kind of file, and every fault named by file and line."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from remit_megatron.data import readers
from remit_megatron.data.readers import BadRecord, TextFormat, expand_inputs, iter_chunks, iter_documents, total_bytes
from remit_megatron.runtime.errors import UserError

TEXTS = [f"document {number} " + "wörter " * (number % 90) for number in range(3000)]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(texts))


def write_kinds(folder: Path, texts: list[str]) -> dict[str, Path]:
    """The same texts as every kind of file that can be read."""
    data = lines(texts)
    half = data.index(b"\n", len(data) // 2) + 1
    paths = {kind: folder / f"corpus.{kind}" for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow")}
    paths["jsonl"].write_bytes(data)
    paths["jsonl.gz"].write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))  # two members
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    paths["jsonl.zst"].write_bytes(compress(data[:half]) + compress(data[half:]))  # two frames
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pq.write_table(table, paths["parquet"], row_group_size=700)
    with pa.ipc.new_stream(paths["arrow"], table.schema) as stream:
        stream.write_table(table, max_chunksize=500)
    return paths


def test_all_kinds_give_the_same_documents(tmp_path):
    for kind, path in write_kinds(tmp_path, TEXTS).items():
        documents = list(iter_documents([path]))
        assert [document.text for document in documents] == TEXTS, kind
        assert [document.number for document in documents] == list(range(1, 3001)), kind
        assert {document.file for document in documents} == {str(path)}


def test_hugging_face_directories(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert [document.text for document in iter_documents([tmp_path / "one"])] == TEXTS
    # A selection keeps its indices beside the data until it is saved.
    data.select([5, 3, 2000]).save_to_disk(str(tmp_path / "selected"))
    assert [d.text for d in iter_documents([tmp_path / "selected"])] == [TEXTS[5], TEXTS[3], TEXTS[2000]]
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match=r"splits train, test; expected one split, as .*splits/train"):
        expand_inputs([tmp_path / "splits"])
    assert len(list(iter_documents([tmp_path / "splits" / "test"]))) == 3000


def test_chunks_are_whole_records_and_progress_reaches_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 4096)
    for kind, path in write_kinds(tmp_path, TEXTS).items():
        files = [str(path), str(path)]
        chunks = list(iter_chunks(files, fields=("text",)))
        assert len(chunks) > 20, kind
        ends = [chunk.end for chunk in chunks]
        behind = 8 if kind == "arrow" else 0  # the mark of the end follows the last batch
        assert ends == sorted(ends) and ends[-1] == total_bytes(files) - behind, kind
        assert [d.text for d in iter_documents(files)] == TEXTS * 2, kind


def test_directories_and_patterns(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    for name in ("d/b.jsonl", "d/a.jsonl", "d/sub/c.jsonl", "d/.hidden.jsonl"):
        (tmp_path / name).write_bytes(lines([name]))
    (tmp_path / "d" / "README.md").write_text("no data")
    found = [document.text for document in iter_documents([tmp_path / "d"])]
    assert found == ["d/a.jsonl", "d/b.jsonl", "d/sub/c.jsonl"]
    assert [document.text for document in iter_documents([f"{tmp_path}/d/*.jsonl"])] == ["d/a.jsonl", "d/b.jsonl"]
    (tmp_path / "empty").mkdir()
    for item, message in [
        (tmp_path / "absent.jsonl", "which does not exist"),
        (f"{tmp_path}/x*.jsonl", "matches no file"),
        (tmp_path / "empty", "without data files"),
        (tmp_path / "d" / "README.md", "expected a file ending in"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            expand_inputs([item])
        assert caught.value.field == "--input"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "text that is not JSON"),
        (b'{"text": "a"} {"text": "b"}', "text that is not JSON"),
        (b'["text"]', "JSON list; expected a JSON object"),
        (b'"text"', "JSON str"),
        (b"null", "JSON NoneType"),
        (b'{"title": "x"}', "no field 'text' among 'title'"),
        (b"{}", "no field 'text' among none"),
        (b'{"text": null}', "NoneType .None. in field 'text'"),
        (b'{"text": 12}', r"int \(12\) in field 'text'"),
        (b'{"text": ""}', "an empty string in field 'text'"),
        (b'{"text": "\xff"}', "byte 11, which is not UTF-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 200_000, "text that is not JSON"),
        (b'{"text": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "text that is not JSON"),
        (b'{"text": "a", "text": "b"}', "field 'text' 2 times, with different values; expected each field once"),
        (b'{"text": "a", "x": {"text": 1}, "text": 1}', "field 'text' 2 times"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "text that is not JSON"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_bad_line_is_named(tmp_path, line, message, kind):
    path = tmp_path / f"bad.{kind}"
    data = lines(TEXTS[:700]) + b"\n  \n" + line + b"\n" + lines(TEXTS[:3])
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    with pytest.raises(UserError, match=message) as caught:
        list(iter_documents([path]))
    assert caught.value.field == f"{path}:703"
    assert "\n" not in str(caught.value)


def test_lines_as_they_come(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "bom"}\r\n\n\r\n{"text": "a\\u2028b\xe2\x80\xa8c"}\n{"text": "no newline"}')
    assert [(d.number, d.text) for d in iter_documents([path])] == [
        (1, "bom"),
        (4, "a\u2028b\u2028c"),
        (5, "no newline"),
    ]


def test_names_that_come_twice_without_harm(tmp_path):
    """Inside another object, as a value, in the text itself, with one value, or of a field that nobody asked for."""
    path = tmp_path / "x.jsonl"
    lines = [
        '{"text": "1", "meta": {"text": "no"}, "list": [{"text": "no"}]}',
        '{"kind": "text", "text": "2"}',
        '{"text": "3 \\"text\\": \\"x\\""}',
        '{"text": "4", "text": "4"}',
        '{"id": 1, "text": "5", "id": 2}',
    ]
    path.write_text("\n".join(lines))
    assert [d.text for d in iter_documents([path])] == ["1", "2", '3 "text": "x"', "4", "5"]
    path.write_text('{"text": {"text": "a"}}')
    with pytest.raises(UserError, match=r"found dict \(\{'text': 'a'\}\) in field 'text'"):
        list(iter_documents([path]))
    for twice in ('{"тема": "1", "тема": "2"}', '{"тема": "1", "\\u0442\\u0435\\u043c\\u0430": "2"}'):
        path.write_text(twice)
        with pytest.raises(UserError, match="field 'тема' 2 times"):
            list(iter_documents([path], text_key="тема"))


def test_bad_rows(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1500 + [None, "b"], "n": list(range(1502))}), path)
    with pytest.raises(UserError, match="NoneType") as caught:
        list(iter_documents([path]))
    assert caught.value.field == f"{path}:1501"
    with pytest.raises(UserError, match=r"columns 'text', 'n'; expected a column 'body'"):
        list(iter_documents([path], text_key="body"))
    with pytest.raises(UserError, match="column 'n' of type int64"):
        list(iter_documents([path], text_key="n"))


def test_damaged_files(tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnop ", k=200)) for _ in range(4000)]
    for kind, path in write_kinds(tmp_path, texts).items():
        if kind == "jsonl":
            continue
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:10], b"junk" * 100):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="cannot be read") as caught:
                list(iter_documents([path]))
            assert caught.value.field == str(path) and "\n" not in str(caught.value)
        if kind in ("jsonl.gz", "jsonl.zst"):  # these carry checksums
            flipped = bytearray(whole)
            flipped[len(whole) // 3] ^= 16
            path.write_bytes(flipped)
            with pytest.raises(UserError):
                list(iter_documents([path]))


def test_template():
    record = {"question": "Why?", "answer": "So."}
    assert TextFormat(template="Q: {question}\nA: {answer} {{x}}").render(record) == "Q: Why?\nA: So. {x}"
    assert TextFormat(template="{answer}{answer}").fields == ("answer",)
    for template in ("no field", "{", "{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}"):
        with pytest.raises(UserError, match="--template"):
            TextFormat(template=template)
    for bad in ({"question": "Why?"}, {"question": "Why?", "answer": ""}, {"question": "Why?", "answer": 3}):
        with pytest.raises(BadRecord, match="answer"):
            TextFormat(template="{question} {answer}").render(bad)


@pytest.mark.parametrize("depth", [300, 700, 950])
@pytest.mark.parametrize("ends", [("[", "]"), ('{"a": ', "}")])
def test_what_can_be_parsed_and_not_written_is_a_bad_record(tmp_path, depth, ends):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + ends[0] * depth + "1" + ends[1] * depth + "}\n")
    with pytest.raises(
        UserError, match=r"a.jsonl:1: found (list|dict)( \(.{40}\))? in field 'text'; expected a string"
    ):
        list(iter_documents([path]))


def test_a_connection_that_gives_no_answer_is_a_file_that_cannot_be_read():
    class Silent:
        def open(self, file: str):
            raise TimeoutError  # as fsspec does, without a word

        def size(self, file: str) -> int:
            return 10

    with pytest.raises(UserError, match=r"a.jsonl: found a file that cannot be read \(TimeoutError\)"):
        list(iter_chunks(["a.jsonl"], fields=["text"], store=Silent()))
