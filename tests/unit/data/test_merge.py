"""Data sets that were built side by side are, merged, the files of one build over all inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from remit_megatron.cli import main
from remit_megatron.data.build import build_dataset
from remit_megatron.data.merge import merge_datasets
from remit_megatron.runtime.errors import UserError
from tests.tiny import make_tokenizer, write_documents


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def parts(tmp_path: Path, tokenizer: Path) -> list[Path]:
    """Prefixes of three data sets of uneven size; their corpora lie beside them."""
    prefixes = []
    for number, count in enumerate((40, 1, 25)):
        text = write_documents(tmp_path / f"c{number}.jsonl", count=count, seed=number)
        build_dataset([text], tokenizer, tmp_path / f"part{number}")
        prefixes.append(tmp_path / f"part{number}")
    return prefixes


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_merged_is_what_one_build_makes(parts, tokenizer, tmp_path, monkeypatch, block):
    monkeypatch.setattr("remit_megatron.data.merge._BLOCK_TOKENS", block)
    merged = merge_datasets(parts, tmp_path / "merged")
    whole = build_dataset([tmp_path / f"c{n}.jsonl" for n in range(3)], tokenizer, tmp_path / "whole")
    assert merged == whole and merged.documents == 66
    for kind in ("bin", "idx", "json"):
        assert (tmp_path / f"merged.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()


def test_the_command(parts, tmp_path, capsys):
    words = ["data", "merge", "--input", *map(str, parts), "--output", str(tmp_path / "merged")]
    assert main(words) == 0 and "3 data sets, 66 documents" in capsys.readouterr().out
    assert main(words) == 2 and "which exists" in capsys.readouterr().err


def test_damaged_and_foreign_parts_are_refused(parts, tokenizer, tmp_path):
    build_dataset([tmp_path / "c0.jsonl"], tokenizer, tmp_path / "other", append_eod=False)
    with pytest.raises(UserError, match="eod_id"):
        merge_datasets([*parts, tmp_path / "other"], tmp_path / "merged")
    with pytest.raises(UserError, match="one of the inputs"):
        merge_datasets(parts, parts[1], overwrite=True)
    victim = Path(f"{parts[2]}.bin")
    content = bytearray(victim.read_bytes())
    content[0] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256"):
        merge_datasets(parts, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_other_ends_of_documents_are_noticed(parts, tmp_path):
    """The tokens are the same, and so is their number: only the index has changed."""
    index = Path(f"{parts[2]}.idx")
    content = bytearray(index.read_bytes())
    lengths = np.frombuffer(content, dtype="<i4", count=2, offset=34) + np.array([1, -1], dtype="<i4")
    content[34:42] = lengths.tobytes()
    index.write_bytes(content)
    with pytest.raises(UserError, match=r"part2.idx: found contents with SHA-256"):
        merge_datasets(parts, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_a_part_twice_is_refused(parts, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"--input: found .*/link/part0 twice; expected each data set once"):
        merge_datasets([*parts, tmp_path / "link" / "part0"], tmp_path / "merged")


@pytest.mark.parametrize(("field", "value"), [("dtype", "float32"), ("dtype", ["int32"]), ("dtype", "int32")])
def test_a_manifest_with_another_type_is_refused(parts, tmp_path, field, value):
    path = Path(f"{parts[0]}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=r"part0\.(json: found a damaged manifest|idx: found tokens of uint16)"):
        merge_datasets(parts[:1], tmp_path / "merged")


def test_parts_that_are_missing_are_named(parts, tmp_path, caplog):
    """A job of an array that failed, and a pattern for what is there."""
    for number, part in enumerate(parts):
        for kind in ("bin", "idx", "json"):
            Path(f"{part}.{kind}").rename(tmp_path / f"0000{number}-of-00003.{kind}")
    named = [tmp_path / f"0000{number}-of-00003" for number in range(3)]
    merge_datasets(named, tmp_path / "whole")
    assert caplog.records == []
    merge_datasets([named[0], named[2]], tmp_path / "merged")
    assert [record.getMessage() for record in caplog.records] == [
        "--input: without 00001-of-00003: the whole has fewer documents than its parts' names say"
    ]
