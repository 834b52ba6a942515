"""Model directories with damaged files: tensors are those that the safetensors library reads, or the file is refused;
config.json gives arguments or is refused by a field's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from remit_megatron.conversion.source import read_config, resolve, weights_digest
from remit_megatron.conversion.tensor_files import DTYPES, TensorFiles
from remit_megatron.models.family import family_of
from tests.families import CASES, hf_values
from tests.fuzz.damage import REFUSED, altered, damaged, examples, handled

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.weight": torch.arange(4.0).to(torch.bfloat16),
    "c": torch.ones(3, 1, dtype=torch.float16),
    "empty": torch.zeros(0, 2),
}
INDEX = "model.safetensors.index.json"


def write(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    safetensors.torch.save_file(TENSORS, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory as the product reads it."""
    source = resolve(directory)
    assert source.hf_config["model_type"] == "llama"
    files = TensorFiles(directory)
    tensors = {name: files[name][:] if files[name].shape else files[name] for name in files.names()}
    weights_digest(source)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def library(file: Path) -> dict[str, torch.Tensor] | None:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError):
        return None


def same(directory: Path) -> None:
    found = handled(lambda: read(directory))
    if found is REFUSED:
        return
    expected = library(directory / "model.safetensors")
    assert expected is not None, "the library refuses the file"
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_whole(tmp_path):
    directory = write(tmp_path / "m")
    assert read(directory).keys() == TENSORS.keys() and set(DTYPES.values()) == {v.dtype for v in TENSORS.values()}
    same(directory)


@examples(200)
@given(data=st.data())
def test_damaged_bytes(tmp_path, data):
    directory = write(tmp_path / "m")
    file = directory / "model.safetensors"
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    same(directory)


@examples(200)
@given(data=st.data())
def test_altered_header(tmp_path, data):
    directory = write(tmp_path / "m")
    file = directory / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(data.draw(altered(json.loads(content[8 : 8 + length])))).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    same(directory)


@examples(100)
@given(data=st.data())
def test_altered_index(tmp_path, data):
    directory = write(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    index = {"metadata": {"total_size": 46}, "weight_map": dict.fromkeys(TENSORS, "one.safetensors")}
    (directory / INDEX).write_text(json.dumps(data.draw(altered(index))))
    found = handled(lambda: read(directory))
    if found is not REFUSED:
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in found.items())


@pytest.mark.parametrize("case", CASES)
@examples(60)
@given(data=st.data())
def test_altered_configuration(case, data):
    config = data.draw(altered(hf_values(case)))
    if isinstance(config, dict):
        handled(lambda: use_configuration(config))


def use_configuration(config: dict[str, Any]) -> None:
    family = family_of(config)
    values = family.arguments(config)
    for size in ("num_layers", "hidden_size", "vocab_size", "num_attention_heads", "kv_channels"):
        assert type(values[size]) is int and values[size] > 0, size
    assert values["num_attention_heads"] % values["num_query_groups"] == 0
    family.names(config)
    family.unlisted_parameters(config)
    assert family.exported(config)["model_type"] == family.model_types[0]


@examples(100)
@given(data=st.data())
def test_damaged_configuration(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data.draw(damaged(json.dumps(hf_values(CASES[0])).encode())))
    config = handled(lambda: read_config(tmp_path))
    if config is not REFUSED:
        handled(lambda: use_configuration(config))
