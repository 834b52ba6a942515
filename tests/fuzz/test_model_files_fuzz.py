"""Model directories with damaged files: tensors are those that the safetensors library reads, or the file is refused;
config.json gives arguments or is refused by a field's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from remit_megatron.conversion.loading import HuggingFaceWeights, hf_names
from remit_megatron.conversion.source import read_config, resolve, weights_digest
from remit_megatron.conversion.tensor_files import DTYPES, TensorFiles
from remit_megatron.models.family import family_of
from remit_megatron.runtime.errors import UserError
from tests.families import CASES, hf_values
from tests.fuzz import weight_directories
from tests.fuzz.damage import REFUSED, altered, damaged, examples, handled
from tests.fuzz.parity import quiet

TIED = (weight_directories.EMBEDDING, weight_directories.HEAD)
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.weight": torch.arange(4.0).to(torch.bfloat16),
    "c": torch.ones(3, 1, dtype=torch.float16),
    "empty": torch.zeros(0, 2),
}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    quiet()


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


def with_header(directory: Path, change: Callable[[dict[str, Any]], bytes]) -> None:
    """Gives the file of weights another header before the same bytes of tensors."""
    file = directory / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length]))
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


@examples(200)
@given(data=st.data())
def test_altered_header(tmp_path, data):
    directory = write(tmp_path / "m")
    with_header(directory, lambda header: json.dumps(data.draw(altered(header))).encode())
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


@st.composite
def headers(draw: Any, header: dict[str, Any]) -> bytes:
    """A header that is JSON and nearly right: entries moved, given other dtypes of their size, twice, or spread out."""
    entries = [(name, dict(entry)) for name, entry in header.items()]
    tensors = [entry for name, entry in entries if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 3))):
        entry, other = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
        kind = draw(st.sampled_from(("offsets", "dtype", "shape", "order", "again", "name", "metadata", "dimension")))
        if kind == "offsets":
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        elif kind == "dtype":
            names = ("F16", "BF16", "F32", "I16", "U16", "F8_E4M3", "F8_E5M2", "I64", "BOOL", "F64", "C64", "F4", "f16")
            entry["dtype"] = draw(st.sampled_from(names))
        elif kind == "shape":
            entry["shape"] = draw(st.sampled_from(([6], [3, 2], [1, 6], [2, 2], [], [0], [0, 7], [2, 1, 1, 2])))
        elif kind == "order":
            entries = draw(st.permutations(entries))
        elif kind == "again":
            entries.append((draw(st.sampled_from(("a", "c", "__metadata__", "d"))), dict(entry)))
        elif kind == "name":
            place = draw(st.integers(0, len(entries) - 1))
            entries[place] = (
                draw(st.sampled_from(("", "\u00e9", "a.b", "__metadata__", "x" * 300))),
                entries[place][1],
            )
        elif kind == "metadata":
            entries.insert(0, ("__metadata__", draw(st.sampled_from(({}, {"format": "tf"}, {"a": 1}, {"": ""}, None)))))
        else:
            entry["shape"] = [*entry["shape"], 1]
    separators = draw(st.sampled_from(((",", ":"), (", ", ": "), (",\n", ":\t"))))
    parts = [json.dumps(name) + separators[1] + json.dumps(entry, separators=separators) for name, entry in entries]
    return ("{" + separators[0].join(parts) + "}").encode() + b" " * draw(st.sampled_from((0, 0, 1, 7)))


@examples(200)
@given(data=st.data())
def test_nearly_right_header(tmp_path, data):
    directory = write(tmp_path / "m")
    with_header(directory, lambda header: data.draw(headers(header)))
    same(directory)


def by_transformers(directory: Path) -> tuple[dict[str, torch.Tensor], bool] | None:
    """Its weights in float32 and whether it found all of them, or None where it loads nothing."""
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    except Exception:  # of any kind, from any of its parts
        return None
    return dict(model.state_dict()), not any(report[kind] for kind in ("missing_keys", "mismatched_keys"))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """What an import, a run and a reference take."""
    weights = HuggingFaceWeights(resolve(directory))
    names = sorted(hf_names(weights.names, 1))
    found = {name: tensor[:] for name, tensor in zip(names, weights.used(), strict=True)}
    for name, tensor in found.items():
        if tensor.shape != weight_directories.SHAPES[name]:
            raise UserError(name, tensor.shape, "what `tensors` refuses")
    return found


@examples(120)
@given(made=weight_directories.directories())
def test_which_files_make_a_model(tmp_path, made):
    """Whatever lies beside each other: the values that transformers takes, or one line; and what it finds whole is
    taken, but for a head that differs from the matrix it is said to be tied to."""
    directory = made.write(tmp_path / "m")
    found, theirs = handled(lambda: weights_of(directory)), by_transformers(directory)
    if theirs is None:
        named = {"model.safetensors", INDEX} & {file.name for file in directory.iterdir()}
        assert found is REFUSED or not named, "one file of another name is all that transformers does not take"
    elif found is REFUSED:
        expected, whole = theirs
        differs = made.config.get("tie_word_embeddings") and not torch.equal(*(expected[name] for name in TIED))
        unknown = "_scale" in json.dumps(made.texts)
        assert not whole or differs or unknown
    else:
        assert all(torch.equal(tensor.float(), theirs[0][name]) for name, tensor in found.items())
        assert theirs[1], "transformers draws a weight at random"


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
