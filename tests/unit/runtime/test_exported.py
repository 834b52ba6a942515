"""A Hugging Face directory behind a path: what is exported, what is found again, what is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from remit_megatron.conversion.weight_files import tensor_files
from remit_megatron.runtime import exported
from remit_megatron.runtime.checkpoints import verify
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.exported import huggingface_model, model_digest
from tests.tiny import make_llama, make_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    return make_llama(root / "hf", seed=1, tokenizer=make_tokenizer(root / "tokenizer"))


@pytest.fixture(scope="module")
def checkpoint(original):
    output = original.parent / "checkpoint"
    words = [sys.executable, "-m", "remit_megatron", "import", "--hf", str(original), "--output", str(output)]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    return output


def test_a_hugging_face_directory_is_itself(original):
    found = huggingface_model(original)
    assert (found.path, found.source, found.run_dir) == (original, original, None)
    assert found.digest == model_digest(original)


def test_the_digest_is_of_weights_and_tokenizer(original, tmp_path):
    copy = shutil.copytree(original, tmp_path / "copy")
    (copy / "README.md").write_text("not part of the model")
    assert model_digest(copy) == model_digest(original)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x"}))
    assert model_digest(copy) != model_digest(original)


def in_a_folder(original: Path, directory: Path, *, by_config: bool) -> Path:
    """The model with its weights in a folder below, where its index, or config.json, names them."""
    shutil.copytree(original, directory)
    (directory / "below").mkdir()
    (directory / "model.safetensors").rename(directory / "below" / "a b.safetensors")
    if by_config:
        content = json.loads((directory / "config.json").read_text()) | {
            "transformers_weights": "below/a b.safetensors"
        }
        (directory / "config.json").write_text(json.dumps(content))
        return directory
    names = load_file(directory / "below" / "a b.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "below/a b.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("by_config", [False, True])
def test_weights_in_a_folder_below_are_of_the_model(original, tmp_path, by_config):
    directory = in_a_folder(original, tmp_path / "model", by_config=by_config)
    before = huggingface_model(directory).digest
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert tensor_files(directory).keys() <= loaded.keys()
    file = directory / "below" / "a b.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert huggingface_model(directory).digest != before  # what is kept by it is not of the new weights


def test_a_checkpoint_is_exported_once_under_any_path(original, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("REMIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK", "1")  # a child that took itself for rank 1 of 2 would wait for rank 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = huggingface_model(checkpoint)
    ids = torch.arange(2, 40).unsqueeze(0)
    outputs = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (original, first.path)
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)

    # The same files in a run directory: found, not exported again.
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / "iter_0000007")
    started = time.monotonic()
    again = huggingface_model(run)
    assert time.monotonic() - started < 2
    assert (again.path, again.digest, again.run_dir) == (first.path, first.digest, run)

    # An export that was damaged is not used.
    weights = next(first.path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    assert huggingface_model(checkpoint).path == first.path
    transformers.AutoModelForCausalLM.from_pretrained(first.path)


def test_what_is_no_model_is_refused(original, checkpoint, tmp_path):
    def refuse(path, text):
        with pytest.raises(UserError) as error:
            huggingface_model(path, field="--student")
        assert str(error.value).startswith("--student: found ") and text in str(error.value)

    refuse(tmp_path / "nothing", "no directory")
    refuse(tmp_path, "none of these")
    (tmp_path / "half").mkdir()
    shutil.copy(original / "config.json", tmp_path / "half")
    refuse(tmp_path / "half", "without *.safetensors")
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    next(damaged.glob("*.distcp")).unlink()
    refuse(damaged, "half a checkpoint")


def test_a_failed_export_is_one_line(checkpoint, tmp_path, monkeypatch):
    """Damage that only the digests show is found by the export itself."""
    monkeypatch.setenv("REMIT_CACHE_DIR", str(tmp_path / "cache"))
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    file = next(damaged.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["properties"]["iteration"] = 3
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"whose export failed .*sha256"):
        huggingface_model(damaged)


@pytest.mark.parametrize("number", [0, errno.ENOLCK])
def test_two_nodes_export_at_once(tmp_path, monkeypatch, caplog, number):
    """Without locks, or with locks that each has for itself: who is second takes what the first has made."""

    def flock(*_):
        if number:
            raise OSError(number, os.strerror(number))

    def export(checkpoint: Path, output: Path, field: str) -> None:
        if checkpoint.name == "slow":
            assert exported._exported(checkpoint.with_name("quick"), "0" * 64, field).is_dir()
        output.mkdir()
        (output / "config.json").write_text(checkpoint.name)

    monkeypatch.setenv("REMIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(exported, "_export", export)
    for damaged in (False, True):
        model = exported._exported(tmp_path / "slow", "0" * 64, "MODEL")
        assert (model / "config.json").read_text() == "quick"
        place = verify(model.parent).files
        assert list(place) == ["model/config.json"]
        assert sorted(os.listdir(tmp_path / "exported")) == [f".{'0' * 32}.lock", "0" * 32]
        if not damaged:
            (model / "config.json").write_text("half")
    assert ("cannot be locked" in caplog.text) is bool(number)
