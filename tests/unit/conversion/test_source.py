"""What a path may point to, and the one line that each wrong one ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from remit_megatron.conversion.directories import complete_directory
from remit_megatron.conversion.source import resolve, weights_digest, weights_fingerprint
from remit_megatron.runtime.checkpoints import write_manifest
from remit_megatron.runtime.errors import UserError

CONFIG = {"model_type": "llama", "vocab_size": 7}


def write_config(directory: Path, **changes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return directory


def write_hf(directory: Path) -> Path:
    save_file({"a": torch.arange(6.0), "b": torch.ones(3, 2)}, write_config(directory) / "model.safetensors")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def write_sharded(directory: Path) -> Path:
    write_config(directory)
    save_file({"a": torch.ones(2)}, directory / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, directory / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_checkpoint(directory: Path, iteration: int, *, complete: bool = True) -> Path:
    write_config(directory / "hf")
    (directory / "hf" / "tokenizer.json").write_text("{}")
    (directory / ".metadata").write_bytes(b"m")
    (directory / "__0_0.distcp").write_bytes(bytes(100))
    if complete:
        write_manifest(directory, iteration=iteration)
    return directory


def test_huggingface_directories(tmp_path):
    source = resolve(write_hf(tmp_path / "one"))
    assert (source.kind, source.iteration, source.tokenizer) == ("huggingface", None, tmp_path / "one")
    assert source.hf_config == CONFIG and source.hf_files == tmp_path / "one"
    assert resolve(write_sharded(tmp_path / "two")).tokenizer is None


@pytest.mark.parametrize("write", [write_hf, write_sharded])
def test_a_fingerprint_is_of_the_weights_and_not_of_their_place(tmp_path, write):
    found = weights_fingerprint(resolve(write(tmp_path / "one")))
    assert found == weights_fingerprint(resolve(write(tmp_path / "two")))
    for file in (tmp_path / "two").glob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert weights_fingerprint(resolve(tmp_path / "two")) != found
        file.write_bytes(content)


def test_the_fingerprint_of_a_large_file_is_of_blocks_all_over_it(tmp_path):
    """Other weights differ everywhere; it may cost no more than they do."""
    for name, seed in (("one", 1), ("two", 2), ("again", 1)):
        numbers = torch.randn(1_000_001, generator=torch.Generator().manual_seed(seed))
        save_file({"a": numbers}, write_config(tmp_path / name) / "model.safetensors")
    one, two, again = (weights_fingerprint(resolve(tmp_path / name)) for name in ("one", "two", "again"))
    assert one == again != two
    file = tmp_path / "again" / "model.safetensors"
    content = file.read_bytes()
    for place in (0.0, 0.4, 1.0):  # the beginning, a block within, the end
        first = round((len(content) - (1 << 16)) * place)
        file.write_bytes(content[:first] + bytes(1 << 16) + content[first + (1 << 16) :])
        if place:  # the header is not read here
            assert weights_fingerprint(resolve(tmp_path / "again")) != one
        file.write_bytes(content)


def test_the_fingerprint_of_a_checkpoint_is_its_digest(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    write_checkpoint(root / "iter_0000002", 2)
    source = resolve(tmp_path / "run")
    assert weights_fingerprint(source) == weights_digest(source)


def test_a_run_stands_for_its_newest_complete_checkpoint(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    write_checkpoint(root / "iter_0000010", 10)
    newest = write_checkpoint(root / "iter_0000020", 20)
    write_checkpoint(root / "iter_0000030", 30, complete=False)
    for path in (tmp_path / "run", root, newest):
        source = resolve(path)
        assert (source.kind, source.path, source.iteration) == ("checkpoint", newest, 20)
        assert source.tokenizer == newest / "hf" == source.hf_files
    (newest / "__0_0.distcp").write_bytes(bytes(99))
    assert resolve(tmp_path / "run").iteration == 10


def test_digests_are_read_when_asked(tmp_path):
    directory = write_checkpoint(tmp_path / "checkpoint", 5)
    (directory / "__0_0.distcp").write_bytes(b"x" * 100)
    assert resolve(directory).iteration == 5
    with pytest.raises(UserError, match="sha256"):
        resolve(directory, digests=True)


def missing(path: Path) -> Path:
    return path / "nothing"


def a_file(path: Path) -> Path:
    (path / "file").write_text("x")
    return path / "file"


def empty(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def unrelated(path: Path) -> Path:
    (path / "notes.txt").write_text("x")
    return path


def half_checkpoint(path: Path) -> Path:
    return write_checkpoint(path / "iter_0000010", 10, complete=False)


def only_half_checkpoints(path: Path) -> Path:
    write_checkpoint(path / "iter_0000010", 10, complete=False)
    return path


def file_lost(path: Path) -> Path:
    (write_checkpoint(path / "c", 1) / "__0_0.distcp").unlink()
    return path / "c"


def no_config(path: Path) -> Path:
    (write_checkpoint(path / "c", 1, complete=False) / "hf" / "config.json").unlink()
    write_manifest(path / "c", iteration=1)
    return path / "c"


def broken_config(path: Path) -> Path:
    (write_hf(path) / "config.json").write_text('{"model_type": "lla')
    return path


def quantized(path: Path) -> Path:
    write_hf(path)
    return write_config(path, quantization_config={"bits": 4})


def quantized_by_nothing(path: Path) -> Path:
    """Of which transformers makes no model."""
    write_hf(path)
    return write_config(path, quantization_config={})


def pickled(path: Path) -> Path:
    (write_config(path) / "pytorch_model.bin").write_bytes(b"x")
    return path


def no_weights(path: Path) -> Path:
    return write_config(path)


def shard_missing(path: Path) -> Path:
    (write_sharded(path) / "model-00002-of-00002.safetensors").unlink()
    return path


def tensor_elsewhere(path: Path) -> Path:
    save_file({"c": torch.ones(2)}, write_sharded(path) / "model-00002-of-00002.safetensors")
    return path


def no_index(path: Path) -> Path:
    (write_sharded(path) / "model.safetensors.index.json").unlink()
    return path


def broken_index(path: Path) -> Path:
    (write_sharded(path) / "model.safetensors.index.json").write_text("[]")
    return path


def cut(path: Path, size: int) -> Path:
    file = write_hf(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    return path


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (missing, "no directory"),
        (a_file, "(a file)"),
        (empty, "an empty directory"),
        (unrelated, "neither of these"),
        (half_checkpoint, "no manifest.json"),
        (only_half_checkpoints, "no complete checkpoint among 1"),
        (file_lost, "no file; expected 100 bytes"),
        (no_config, "config.json"),
        (broken_config, "no JSON"),
        (quantized, "bits"),
        (quantized_by_nothing, "quantization_config"),
        (pickled, "only pytorch_model.bin"),
        (no_weights, "no weights"),
        (shard_missing, "model-00002-of-00002.safetensors, which is not there"),
        (tensor_elsewhere, "no tensor b"),
        (no_index, "2 safetensors files and no model.safetensors.index.json"),
        (broken_index, "TypeError"),
        (lambda path: cut(path, 4), "requires a buffer of 8 bytes"),
        (lambda path: cut(path, 40), "a header of"),
        (lambda path: cut(path, -3), "bytes where the header speaks of"),
    ],
)
def test_refusals(tmp_path, make, found):
    path = make(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve(path)
    assert found in str(caught.value) and "\n" not in str(caught.value)


def test_directories_are_complete_or_absent(tmp_path):
    target = tmp_path / "deep" / "target"
    with pytest.raises(RuntimeError), complete_directory(target, field="--output", needed_bytes=0) as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with complete_directory(target, field="--output", needed_bytes=0) as directory:
        (directory / "whole").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["target"] and (target / "whole").exists()
    with pytest.raises(UserError, match="which exists"), complete_directory(target, field="--output", needed_bytes=0):
        pass


def test_no_space_is_refused_before_work(tmp_path):
    output = complete_directory(tmp_path / "x", field="--output", needed_bytes=1 << 60)
    with pytest.raises(UserError, match="GB free") as caught, output:
        raise AssertionError("started")
    assert caught.value.field == "--output" and list(tmp_path.iterdir()) == []
