"""An export is what transformers loads as the model that was trained, whatever config.json said of the model before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import patches

patches.apply()

from remit_megatron.conversion import loading  # noqa: E402
from remit_megatron.conversion.processes import process_groups  # noqa: E402
from remit_megatron.conversion.source import resolve  # noqa: E402
from remit_megatron.conversion.to_huggingface import export_model  # noqa: E402
from remit_megatron.conversion.to_megatron import import_model  # noqa: E402
from remit_megatron.models.build import build_chunks, default_arguments, model_config  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.families import make_case  # noqa: E402
from tests.tiny import make_llama  # noqa: E402

EMBEDDING = "model.embed_tokens.weight"


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def test_the_name_of_the_file_that_weights_came_from_is_not_kept(tmp_path):
    """transformers looks for that file alone, and an export has another."""
    model = make_llama(tmp_path / "model", seed=3, num_hidden_layers=1)
    expected = state_of(model)
    (model / "model.safetensors").rename(model / "student.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "student.safetensors"}))
    import_model(model, tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "exported")
    found = state_of(tmp_path / "exported")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == config


@pytest.mark.parametrize("trained", [True, False])
def test_a_row_of_padding_that_was_trained_is_kept(tmp_path, monkeypatch, caplog, trained):
    """Tied, it is part of the head, and the softmax moves it; transformers sets it to zero where config.json names
    it, and gives the padding token a logit of 0."""
    case = "youtu-narrow_values_tied"
    model = make_case(tmp_path / "model", case, seed=2, num_hidden_layers=1, pad_token_id=5)
    if trained:  # as a checkpoint of a run holds it
        held = load_file(model / "model.safetensors")
        held[EMBEDDING][5] = 0.25
        save_file(held, model / "model.safetensors", metadata={"format": "pt"})
        monkeypatch.setattr(loading.HuggingFaceWeights, "_tensor", without_zeros(loading.HuggingFaceWeights._tensor))
    import_model(model, tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "exported")
    row = state_of(tmp_path / "exported")[EMBEDDING][5]
    assert torch.equal(row, torch.full_like(row, 0.25 if trained else 0.0))
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["pad_token_id"] == (None if trained else 5)
    assert ("config.json gets no pad_token_id (was 5)" in caplog.text) == trained


def flipped_bit(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.distcp")
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        (byte,) = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def other_base_of_rope(checkpoint: Path) -> None:
    file = checkpoint / "hf" / "config.json"
    content = file.read_text()
    assert "10000.0" in content
    file.write_text(content.replace("10000.0", "50000.0"))


@pytest.mark.parametrize("change", [flipped_bit, other_base_of_rope])
def test_a_checkpoint_that_changed_is_not_loaded(tmp_path, change):
    """As `init`, reference or for log-probabilities: sizes are the same, and what is wrong looks like any weight."""
    import_model(make_llama(tmp_path / "model", seed=3, num_hidden_layers=1), tmp_path / "checkpoint")
    change(tmp_path / "checkpoint")
    source = resolve(tmp_path / "checkpoint")
    with process_groups(alone=True) as groups:
        chunks = build_chunks(model_config(source.hf_config, default_arguments()), groups)
        with pytest.raises(UserError, match=r"checkpoint: found a damaged one: .*; expected files that are as"):
            loading.load_weights(chunks, source)


def without_zeros(tensor_of):
    def read(self, name: str):
        tensor = tensor_of(self, name)
        tensor.zero_row = None
        return tensor

    return read
