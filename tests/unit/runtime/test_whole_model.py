"""What transformers would make another model of is refused, by what transformers itself says of its loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.whole_model import check_whole
from tests.tiny import make_llama

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("whole") / "model", seed=1, num_hidden_layers=2)


def without(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights[WEIGHT]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def configured(**values: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def adapter(directory: Path) -> None:
    """As peft writes it beside a model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory)
    wrapped = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(str(directory))


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"nothing of the kind")


REFUSED = [
    (without, f"no {WEIGHT} in "),
    (configured(num_hidden_layers=3), "and 8 more; expected every weight"),
    (configured(vocab_size=50), r"of shape (51, 48) in "),
    (adapter, "an adapter that transformers applies where peft is installed"),
    (no_weights, "which transformers cannot load"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=["missing", "layers", "shape", "adapter", "damaged"])
def test_another_model_is_refused(model, tmp_path, change, says):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    state = torch.get_rng_state()
    check_whole(directory, field="model")
    assert torch.equal(torch.get_rng_state(), state), "the check draws nothing from who has seeded it"
    change(directory)
    with pytest.raises(UserError) as refused:
        check_whole(directory, field="model")
    assert says in str(refused.value) and str(refused.value).startswith("model: found ")
    assert "\n" not in str(refused.value)


def test_transformers_loads_another_model(model, tmp_path):
    """Why: it does so without an error, at random or with the adapter."""
    prompt = torch.arange(1, 9).unsqueeze(0)

    def logits(directory: Path) -> torch.Tensor:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            return loaded(prompt).logits

    for change in (without, adapter):
        directory = tmp_path / change.__name__
        shutil.copytree(model, directory)
        change(directory)
        assert not torch.allclose(logits(directory), logits(model), atol=1e-3), change.__name__


def test_other_kinds_are_left_to_who_loads_them(tmp_path):
    """lm-eval also runs models that are no causal language models, and such that bring code of their own."""
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=20)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    check_whole(tmp_path, field="MODEL", any_kind=True)
    with pytest.raises(UserError, match="a causal language model"):
        check_whole(tmp_path, field="model")


def test_pickled_weights_are_looked_at_where_they_are_loaded(model, tmp_path):
    """lm-eval loads them, and transformers draws what is missing there at random, too."""
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    held = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(held, directory / "pytorch_model.bin")
    check_whole(directory, field="MODEL", any_kind=True)
    del held[WEIGHT]
    torch.save(held, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"no {WEIGHT} in "):
        check_whole(directory, field="MODEL", any_kind=True)
