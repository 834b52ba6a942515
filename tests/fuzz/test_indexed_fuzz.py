"""Indexed token files with damaged bytes: what is read is what was written, or refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remit_megatron.data.boundaries import missing_boundaries
from remit_megatron.data.indexed import IndexedTokens, write_index
from remit_megatron.data.largest_id import check_ids
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.writer import DatasetWriter
from tests.fuzz.damage import REFUSED, altered, damaged, examples, handled

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


def index_of(fields: dict[str, Any]) -> bytes:
    """An index of whatever it is said to hold, as Megatron lays it out."""
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", fields["version"], fields["code"], fields["sequences"], fields["ends"])
    return head + b"".join(
        np.array(fields[name], dtype=kind).tobytes()
        for name, kind in (("lengths", "<i4"), ("offsets", "<i8"), ("order", "<i8"))
    )


def by_megatron(prefix: Path) -> list[list[int]] | None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        data = IndexedDataset(str(prefix))
        return [np.asarray(data[number]).tolist() for number in range(len(data))]
    except Exception:  # asserts, and what numpy raises of views that do not fit
        return None


@examples(150)
@given(data=st.data())
def test_fields_of_an_index(tmp_path, data):
    """One number is another than it was: read as Megatron reads it, or refused."""
    write(tmp_path / "a")
    lengths = [len(document) for document in DOCUMENTS]
    offsets = [2 * sum(lengths[:number]) for number in range(len(lengths))]
    fields: dict[str, Any] = {"version": 1, "code": 8, "sequences": 5, "ends": 6, "order": list(range(6))}
    fields |= {"lengths": lengths, "offsets": offsets}
    near = st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 8, 14, 22, 26, 2**31 - 1, -1, -2))
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(fields)))
        if isinstance(fields[name], int):
            largest = 255 if name == "code" else 2**63
            fields[name] = data.draw(near.filter(lambda value, largest=largest: 0 <= value <= largest))
        else:
            fields[name] = list(fields[name])
            kind = data.draw(st.sampled_from(("change", "change", "more", "less", "swap")))
            place = data.draw(st.integers(0, len(fields[name]) - 1))
            if kind == "change":
                fields[name][place] = data.draw(near)
            elif kind == "more":
                fields[name].append(data.draw(near))
            elif kind == "less" and len(fields[name]) > 1:
                fields[name].pop(place)
            else:
                fields[name][0], fields[name][place] = fields[name][place], fields[name][0]
    (tmp_path / "a.idx").write_bytes(index_of(fields))
    found = handled(lambda: read_all(tmp_path / "a"))
    assert found is REFUSED or found == by_megatron(tmp_path / "a")


@examples(200)
@given(data=st.data())
def test_altered_manifest(tmp_path, data):
    """What a run asks of a data set's manifest."""
    prefix = tmp_path / "a"
    prefix.with_suffix(".json").unlink(missing_ok=True)  # or the writer would look at what the last example left
    with DatasetWriter(prefix, dtype=np.dtype("<u2"), overwrite=True) as writer:
        writer.append(np.arange(12, dtype="<u2"), np.array([5, 7], dtype=np.int32))
        sides = ((3,), ()) if data.draw(st.booleans()) else None
        writer.commit(
            tokenizer_digest="ab",
            vocab_size=40,
            eod_id=4,
            skipped=0,
            inputs=("a",),
            origin={"a": 1},
            special_tokens=sides,
        )
    path = tmp_path / "a.json"
    content = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(altered(json.loads(content)))))
    else:
        path.write_bytes(data.draw(damaged(content)))

    def use() -> None:
        manifest = read_manifest(prefix)
        check_ids(prefix, 30, field="data.train")
        missing_boundaries(prefix, manifest, 4)
        read_all(prefix)
        manifest.to_json()

    handled(use)


@pytest.mark.parametrize("size", range(0, 26))
def test_short_tokens(tmp_path, size):
    write(tmp_path / "a")
    data = tmp_path / "a.bin"
    data.write_bytes(data.read_bytes()[:size])
    assert size == 26 or handled(lambda: read_all(tmp_path / "a")) is REFUSED
