"""Which files an input means: folders behind links, loops, patterns; and what is said of files that are left out."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest

from remit_megatron.data.inputs import expand_inputs, is_there
from remit_megatron.runtime.errors import UserError


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder whose parts lie elsewhere, as on a cluster: links to folders, in them links to others, and loops."""
    for name in (
        "corpus/b/own.jsonl",
        "disk1/x.jsonl",
        "disk1/deep/y.parquet",
        "disk2/z.jsonl.zst",
        "disk2/.h/i.jsonl",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "corpus" / "a").symlink_to(tmp_path / "disk1")
    (tmp_path / "disk1" / "more").symlink_to("../disk2")
    (tmp_path / "disk2" / "up").symlink_to(tmp_path / "corpus")  # leads back to the beginning
    (tmp_path / "disk2" / "here").symlink_to(".")
    (tmp_path / "corpus" / "single.jsonl").symlink_to(tmp_path / "disk1" / "x.jsonl")
    (tmp_path / "corpus" / ".hidden").symlink_to(tmp_path / "disk2")
    return tmp_path / "corpus"


def names(files: list[str], folder: Path) -> list[str]:
    return [os.path.relpath(file, folder) for file in files]


def test_folders_behind_links_are_read_once(corpus):
    notes: list[str] = []
    found = names(expand_inputs([corpus], left_out=notes), corpus)
    assert found == ["a/deep/y.parquet", "a/more/z.jsonl.zst", "a/x.jsonl", "b/own.jsonl", "single.jsonl"]
    first = corpus / "a" / "more" / "here"
    assert notes == [f"{corpus}: passed over 2 links to a folder that is read already, such as {first}"]


def test_a_link_to_what_is_read_anyway_adds_nothing(tmp_path):
    for name in ("c/2024/x.jsonl", "c/2025/y.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c" / "0_latest").symlink_to("2025")  # sorted before the folder itself
    notes: list[str] = []
    assert names(expand_inputs([tmp_path / "c"], left_out=notes), tmp_path) == ["c/2024/x.jsonl", "c/2025/y.jsonl"]
    assert len(notes) == 1 and "1 link to a folder that is read already" in notes[0]


def test_patterns(corpus, monkeypatch):
    # By itself, the glob module goes through the two loops for ever.
    assert names(expand_inputs([f"{corpus}/**/*.jsonl"]), corpus) == ["a/x.jsonl", "b/own.jsonl", "single.jsonl"]
    assert names(expand_inputs([f"{corpus}/*/**/*.parquet"]), corpus) == ["a/deep/y.parquet"]
    everything = names(expand_inputs([corpus]), corpus)
    assert names(expand_inputs([f"{corpus}/**"]), corpus) == everything
    monkeypatch.chdir(corpus)
    assert expand_inputs(["**/*.jsonl*"]) == ["a/more/z.jsonl.zst", "a/x.jsonl", "b/own.jsonl", "single.jsonl"]
    # Folders that match are read, as they are where the shell expands the pattern.
    below = ["a/deep/y.parquet", "a/more/up/single.jsonl", "a/more/z.jsonl.zst", "a/x.jsonl", "b/own.jsonl"]
    assert expand_inputs(["[ab]"]) == below
    (corpus / "logs").mkdir()
    assert expand_inputs(["*"]) == ["single.jsonl", *(name for name in everything if "/" in name)]
    assert is_there("[ab]") and is_there("a") and is_there("**/x*") and not is_there("[cd]") and not is_there("**/q*")


def test_patterns_match_what_glob_matches(tmp_path):
    """Where there are no links and nothing is hidden."""
    for name in ("x/a.json", "x/y/b.json", "x/y/z/c.json", "x/y/z/c.jsonl", "d.json", "y/e.json", "x/[1]/f.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for pattern in (
        "**",
        "**/*.json",
        "x/**/*.json",
        "**/y/*.json",
        "**/y/**/*.json",
        "*/**/z/*",
        "x/**/**/c.*",
        "x/**/[bc].json",
    ):
        found = set(glob.glob(f"{tmp_path}/{pattern}", recursive=True))  # two ** give a file twice
        wanted = sorted(path for path in found if os.path.isfile(path))
        assert wanted and expand_inputs([f"{tmp_path}/{pattern}"]) == wanted, pattern


def test_what_is_passed_over_is_named_once(tmp_path):
    for name in ("c/x.jsonl", "c/README.md", "c/sub/table.csv", "c/sub/old.jsonl.bz2", "c/.hidden", "d/x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    notes: list[str] = []
    assert len(expand_inputs([tmp_path / "c", tmp_path / "d"], left_out=notes)) == 2
    assert notes == [f"{tmp_path}/c: passed over 3 files for the ending, such as {tmp_path}/c/README.md"]


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.jsonl").write_bytes(b"")
    lost = tmp_path / "c" / "y.jsonl"
    lost.symlink_to(tmp_path / "gone.jsonl")
    for item in (tmp_path / "c", lost, f"{tmp_path}/c/*.jsonl"):
        with pytest.raises(UserError) as caught:
            expand_inputs([item])
        assert str(caught.value).startswith(f"--input: found {lost}, a link to {tmp_path}/gone.jsonl, which cannot")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """Not passed over: what is in it would be missing without a word."""
    (tmp_path / "c" / "sub").mkdir(parents=True)
    (tmp_path / "c" / "x.jsonl").write_bytes(b"")
    scandir = os.scandir

    def denied(path):  # tests may run as root, whom no permission stops
        if os.path.basename(path) == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"sub, which cannot be listed \(Permission denied\)"):
        expand_inputs([tmp_path / "c"])


def test_a_pipe_in_a_folder_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    os.mkfifo(tmp_path / "b.jsonl")
    notes: list[str] = []
    assert names(expand_inputs([tmp_path], left_out=notes), tmp_path) == ["a.jsonl"]
    assert notes == [f"{tmp_path}: passed over 1 pipe or device, such as {tmp_path / 'b.jsonl'}"]
