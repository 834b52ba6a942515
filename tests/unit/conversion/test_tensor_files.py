"""safetensors files a tensor at a time: the bytes of the safetensors package, and only the rows that are asked for."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from remit_megatron.conversion.tensor_files import DTYPES, TensorFiles, TensorFileWriter
from remit_megatron.runtime.errors import UserError

SHAPES = st.dictionaries(
    st.text('abé.0"', min_size=1, max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    min_size=1,
    max_size=6,
)


@given(shapes=SHAPES, dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 99))
def test_bytes_are_those_of_safetensors(tmp_path_factory, shapes, dtype, seed):
    torch.manual_seed(seed)
    tensors = {name: torch.randn(shape).to(DTYPES[dtype]) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    with TensorFileWriter(path, shapes, dtype=DTYPES[dtype]) as writer:
        for name, tensor in tensors.items():  # any order
            writer.write(name, tensor)
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})


def test_written_tensors_are_rounded_and_made_contiguous(tmp_path):
    values = torch.randn(6, 4).double()
    with TensorFileWriter(tmp_path / "a.safetensors", {"a": (4, 6)}, dtype=torch.bfloat16) as writer:
        writer.write("a", values.T)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("a"), values.T.bfloat16())


def test_a_file_with_a_hole_is_not_left_by_mistake(tmp_path):
    shapes = {"a": (2,), "b": (2,)}
    with (
        pytest.raises(AssertionError, match=r"not written: \['b'\]"),
        TensorFileWriter(tmp_path / "m", shapes, dtype=torch.float32) as writer,
    ):
        writer.write("a", torch.ones(2))
    with pytest.raises(FileExistsError):
        TensorFileWriter(tmp_path / "m", shapes, dtype=torch.float32)
    with (
        pytest.raises(AssertionError, match="a"),
        TensorFileWriter(tmp_path / "twice", shapes, dtype=torch.float32) as writer,
    ):
        writer.write("a", torch.ones(2))
        writer.write("a", torch.ones(2))


@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    rows=st.integers(0, 9),
    first=st.integers(0, 10),
    last=st.integers(0, 10),
    columns=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_parts_are_those_of_the_whole(tmp_path_factory, dtype, rows, first, last, columns):
    tensor = torch.randn(rows, 3).to(DTYPES[dtype])
    folder = tmp_path_factory.mktemp("read")
    save_file({"before": torch.ones(5, dtype=torch.int8), "t": tensor}, folder / "model.safetensors")
    lazy = TensorFiles(folder)["t"]
    assert (lazy.shape, lazy.dtype, lazy.nbytes) == ((rows, 3), tensor.dtype, tensor.nbytes)
    for index in (slice(None), slice(first, last), (slice(None), slice(*columns)), (slice(first, last), slice(None))):
        assert torch.equal(lazy[index], tensor[index]), index


def test_rows_have_memory_of_their_own_size(tmp_path):
    save_file({"t": torch.arange(24.0).reshape(8, 3)}, tmp_path / "model.safetensors")
    part = TensorFiles(tmp_path)["t"][2:4]
    assert part.untyped_storage().nbytes() == 2 * 3 * 4
    part.zero_()
    assert load_file(tmp_path / "model.safetensors")["t"][2, 0] == 6, "the file is not mapped"


def write_header(path: Path, entry: dict, data: bytes) -> Path:
    header = json.dumps({"t": entry}).encode()
    path.mkdir()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "found 8 bytes at 0; expected 12, for (3,)"),
        ({"dtype": "BF16", "shape": [6], "data_offsets": [-4, 8]}, "found 12 bytes at -4"),
        ({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}, "found dtype F8_E4M3"),
    ],
)
def test_refuses_headers_that_contradict_themselves(tmp_path, entry, expected):
    files = TensorFiles(write_header(tmp_path / "m", entry, bytes(8)))
    with pytest.raises(UserError) as refused:
        files["t"]
    assert expected in str(refused.value)


def test_a_file_that_shrinks_is_noticed(tmp_path):
    save_file({"t": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    lazy = TensorFiles(tmp_path)["t"]
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-4])
    assert torch.equal(lazy[:2], torch.ones(2, 2))
    with pytest.raises(UserError, match="does not change while read"):
        lazy[:]
