"""Indexed token files with damaged bytes: what is read is what was written, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remit_megatron.data.indexed import IndexedTokens, write_index
from tests.fuzz.damage import REFUSED, damaged, examples, handled

DOCUMENTS = [np.arange(length, dtype="<u2") + 3 for length in (3, 1, 0, 7, 2)]


def write(prefix: Path) -> None:
    prefix.with_suffix(".bin").write_bytes(b"".join(document.tobytes() for document in DOCUMENTS))
    lengths = np.array([len(document) for document in DOCUMENTS], dtype=np.int32)
    with open(prefix.with_suffix(".idx"), "wb") as file:
        write_index(file, lengths, dtype=np.dtype("<u2"))


def read_all(prefix: Path) -> list[list[int]]:
    tokens = IndexedTokens(prefix)
    return [tokens.read(document).tolist() for document in range(len(tokens))]


def test_whole_files(tmp_path):
    write(tmp_path / "a")
    assert read_all(tmp_path / "a") == [document.tolist() for document in DOCUMENTS]


@examples(300)
@given(data=st.data())
def test_damaged_index(tmp_path, data):
    write(tmp_path / "a")
    index = tmp_path / "a.idx"
    index.write_bytes(data.draw(damaged(index.read_bytes())))
    found = handled(lambda: read_all(tmp_path / "a"))
    assert found is REFUSED or found == [document.tolist() for document in DOCUMENTS]


@pytest.mark.parametrize("size", range(0, 26))
def test_short_tokens(tmp_path, size):
    write(tmp_path / "a")
    data = tmp_path / "a.bin"
    data.write_bytes(data.read_bytes()[:size])
    assert size == 26 or handled(lambda: read_all(tmp_path / "a")) is REFUSED
