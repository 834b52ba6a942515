"""Documents that would be read twice, and data for tests among that for training: a line, before anything is built."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from remit_megatron.data.build import build_dataset
from remit_megatron.data.input_notes import noticed
from remit_megatron.data.inputs import expand_inputs
from remit_megatron.data.mix import plan_mix
from remit_megatron.data.recipe import load_recipe
from tests.tiny import make_tokenizer


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = (json.dumps({"text": "a text"}) + "\n").encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def test_files_that_are_read_twice(tmp_path):
    put(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl.gz", "d.json", "d.jsonl")
    assert noticed(expand_inputs([tmp_path])) == []
    read = "their documents are read each time"
    twice = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"] * 2
    assert noticed(twice) == [f"2 of the files several times, such as {twice[0]} and {twice[0]}: {read}"]
    put(tmp_path, "b.jsonl.gz", "c.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "e.jsonl")
    (tmp_path / "f.jsonl").symlink_to("a.jsonl")
    assert noticed(expand_inputs([tmp_path])) == [
        f"1 of the files several times, such as {tmp_path}/a.jsonl and {tmp_path}/e.jsonl: {read}",
        f"2 of the files both packed and unpacked, such as {tmp_path}/b.jsonl and {tmp_path}/b.jsonl.gz: {read}",
    ]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("train.jsonl", "test.jsonl"), "files of train and test"),
        (
            ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
            "files of train and validation",
        ),
        (("gsm8k-train.arrow", "gsm8k-test.arrow"), "files of train and test"),
        (("train/0.jsonl", "dev/0.jsonl"), "files of train and validation"),
        (("train/0.jsonl", "train/1.jsonl"), None),
        (("contest.jsonl", "trained.jsonl", "latest.jsonl", "device.jsonl"), None),
        (("0.jsonl", "1.jsonl"), None),
    ],
)
def test_splits_side_by_side(tmp_path, names, found):
    folder = put(tmp_path / "train.test", *names)  # what all have in common says nothing
    for item in (folder, f"{folder}/**/*.*"):
        notes: list[str] = []
        expand_inputs([item], left_out=notes)
        assert [note.split(", such as ")[0] for note in notes] == ([f"{item}: {found}"] if found else [])
    notes = []
    expand_inputs([str(folder / name) for name in names], left_out=notes)
    assert notes == [], "files that were named one by one are meant"


def test_commands_say_so(tmp_path, caplog):
    (tmp_path / "tokenizer").mkdir()
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    put(tmp_path / "corpus", "web/train.jsonl", "web/train.jsonl.gz", "web/test.jsonl")
    build_dataset([tmp_path / "corpus"], tokenizer, tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records]
    assert ["both packed and unpacked" in line for line in lines] == [False, True] and "train and test" in lines[0]
    (tmp_path / "recipe.yaml").write_text("sources: [{name: web, weight: 1, files: [web, web/../web/test.jsonl]}]")
    (plan,) = plan_mix(
        load_recipe(tmp_path / "recipe.yaml"), root=str(tmp_path / "corpus"), output=str(tmp_path / "mix")
    )
    assert [word in "\n".join(plan.left_out) for word in ("several times", "both packed", "train and test")] == [
        True
    ] * 3


def test_files_with_nothing_in_them(tmp_path):
    put(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"")
    assert noticed(expand_inputs([tmp_path])) == [
        f"1 of the files empty, such as {tmp_path}/c.jsonl: no documents in them"
    ]
