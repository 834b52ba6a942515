"""Two writers of one prefix, each on a machine whose locks the other does not see."""

from __future__ import annotations

import os

import numpy as np
import pytest

from remit_megatron.data import writer
from remit_megatron.data.largest_id import check_ids
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.writer import DatasetWriter
from remit_megatron.runtime.errors import UserError


def commit(of: DatasetWriter) -> None:
    of.commit(tokenizer_digest="0" * 64, vocab_size=100, eod_id=None, skipped=0, inputs=("file",))


@pytest.mark.parametrize("first_goes_on", [True, False])
def test_the_one_that_came_first_is_told_and_the_other_has_the_name(tmp_path, monkeypatch, first_goes_on):
    monkeypatch.setattr(writer, "keep_out", lambda *_, **__: True)  # as sshfs, or NFS with nolock
    tokens = [np.full(40_000, value, dtype=np.uint16) for value in (1, 2)]
    first = DatasetWriter(tmp_path / "out", dtype=np.dtype(np.uint16))
    with DatasetWriter(tmp_path / "out", dtype=np.dtype(np.uint16)) as second:
        with pytest.raises(UserError, match="another process has begun to write"), first:
            first.append(tokens[0], np.array([40_000]))
            second.append(tokens[1], np.array([40_000]))
            if first_goes_on:
                commit(first)
            commit(second)
            commit(first)
        if first_goes_on:
            commit(second)
    assert read_manifest(tmp_path / "out", verify=True).tokens == 40_000
    assert (tmp_path / "out.bin").read_bytes() == tokens[1].tobytes()
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "out.idx", "out.json"]


def test_what_a_killed_writer_left_is_another_file(tmp_path):
    left = tmp_path / ".out.bin.tmp"
    left.write_bytes(b"some")
    with open(left, "rb") as alive, DatasetWriter(tmp_path / "out", dtype=np.dtype(np.uint16)) as new:
        new.append(np.full(100, 3, dtype=np.uint16), np.array([100]))
        commit(new)
        assert alive.read() == b"some"
    assert read_manifest(tmp_path / "out", verify=True).tokens == 100


def test_ids_beyond_the_tokenizer_s_own_are_found(tmp_path):
    """Whatever put them there: a model of the tokenizer's size has no row for them."""
    with DatasetWriter(tmp_path / "out", dtype=np.dtype(np.uint16)) as new:
        new.append(np.array([5, 300, 7], dtype=np.uint16), np.array([3]))
        commit(new)  # of a tokenizer of 100 entries
    check_ids(tmp_path / "out", 301, field="data.train")
    with pytest.raises(UserError, match=r"data.train .*out: found ids up to 300; expected below 200"):
        check_ids(tmp_path / "out", 200, field="data.train")
