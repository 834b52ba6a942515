"""Runs by TRL that would learn nothing, or with another model than the files say: one line says why, and they end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from remit_megatron.cli import main
from tests.posttrain_runs import content_of, in_child, write_lines

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
STAGES = ["sft", "dpo", "rlvr"]


pytestmark = pytest.mark.usefixtures("trl_once")


@pytest.fixture
def posttrain(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a stage with the model changed; exit code, and the lines on standard error that are for a person."""

    def run(
        stage: str, change: Callable[[Path], None] | None = None, lines: list[dict[str, Any]] | None = None, **trl: Any
    ) -> tuple[int, str]:
        directory = tmp_path / "changed"
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(model, directory, dirs_exist_ok=True)
        if change is not None:
            change(directory)
        content = content_of(stage, directory, tmp_path, **({"max_steps": 2} | trl))
        if lines is not None:
            write_lines(tmp_path / f"{stage}.jsonl", lines)
        path = tmp_path / "stage.yaml"
        path.write_text(json.dumps(content))
        code = in_child(lambda: main(["posttrain", stage, str(path)]))
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error: ", "warning: "))]
        return code, "\n".join(said)

    return run


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def work(directory: Path) -> None:
        held = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
        change(held)
        save_file(held, directory / "model.safetensors", metadata={"format": "pt"})

    return work


def nan(held: dict[str, torch.Tensor]) -> None:
    held["model.norm.weight"][3] = torch.nan


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_that_are_none_end_the_run(stage, posttrain, tmp_path):
    code, said = posttrain(stage, weights(nan))
    assert code == 70
    assert said.startswith("error: ") and "\n" not in said
    assert (
        "probabilities of the next token that are not finite" if stage == "rlvr" else "step 1: found loss nan"
    ) in said
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run").glob("checkpoints/checkpoint-*"))


def test_a_rate_that_breaks_the_weights_ends_the_run(posttrain, tmp_path):
    code, said = posttrain("sft", learning_rate=1e38, max_steps=6, max_grad_norm=0.0)
    assert code == 70 and said.startswith("error: step 2: found loss nan"), said
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_missing_weights_are_not_drawn_at_random(stage, posttrain, tmp_path):
    code, said = posttrain(stage, weights(lambda held: held.pop("model.layers.0.mlp.up_proj.weight")))
    assert code == 2 and said.startswith("error: model: found no model.layers.0.mlp.up_proj.weight in "), said
    assert not (tmp_path / "run").exists()


def test_rewards_that_are_all_the_same_teach_nothing(posttrain, tmp_path):
    lines = [{"prompt": "1+1=", "answer": "99999"}] * 8  # longer than a completion may be
    code, said = posttrain("rlvr", lines=lines)
    assert code == 70 and "nothing was learnt, and no model is written" in said, said
    assert not (tmp_path / "run" / "model").exists()
    assert posttrain("dpo") == (0, ""), "a run that learns says nothing of the kind"


def test_a_head_of_its_own_stays_one(posttrain, tmp_path):
    """config.json says tied, the files hold two matrices: transformers trains both, and the result says so."""

    def other(held: dict[str, torch.Tensor]) -> None:
        held[HEAD] = held[EMBEDDING].flip(0).contiguous()

    code, said = posttrain("sft", weights(other))
    assert code == 0, said
    result = tmp_path / "run" / "model"
    assert json.loads((result / "config.json").read_text())["tie_word_embeddings"] is False
    held = load_file(result / "model.safetensors")
    assert not torch.equal(held[HEAD], held[EMBEDDING])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result)
    assert torch.equal(loaded.lm_head.weight, held[HEAD]) and torch.equal(
        loaded.model.embed_tokens.weight, held[EMBEDDING]
    )


def test_a_tied_model_stays_tied(posttrain, tmp_path):
    assert posttrain("sft") == (0, "")
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["tie_word_embeddings"] is True


def added(token: str) -> Callable[[Path], None]:
    """A token behind the model's rows; ``pad`` makes it the padding token."""

    def change(directory: Path) -> None:
        file = directory / "tokenizer_config.json"
        more = {"pad_token": token} if token == "<pad>" else {"extra_special_tokens": [token]}
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
        config = json.loads((directory / "config.json").read_text())
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        config["vocab_size"] = rows = tokenizer.convert_tokens_to_ids(token)
        (directory / "config.json").write_text(json.dumps(config))
        weights(lambda held: held.update({EMBEDDING: held[EMBEDDING][:rows].clone()}))(directory)

    return change


ROWLESS = {
    "sft": {"prompt": "1+2=", "completion": "3<row>"},
    "dpo": {"prompt": "1+2=", "chosen": "3", "rejected": "4<row>"},
    "rlvr": {"prompt": "<row>1+2=", "answer": "3"},
}
FINE = {
    "sft": {"prompt": "1+2=", "completion": "3"},
    "dpo": {"prompt": "1+2=", "chosen": "3", "rejected": "4"},
    "rlvr": {"prompt": "1+2=", "answer": "3"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_ids_without_a_row_are_named(stage, posttrain, tmp_path):
    code, said = posttrain(stage, added("<row>"), lines=[FINE[stage]] * 7 + [ROWLESS[stage]])
    assert code == 2 and f"{stage}.jsonl:8: found ids up to 45; expected below 45" in said, said
    assert not (tmp_path / "run").exists()
    code, said = posttrain(stage, lines=[FINE[stage]] * 8, max_steps=1)
    assert code == 0, said  # the tokenizer is as large, and no line has the token


def test_a_padding_token_without_a_row_is_named(posttrain):
    code, said = posttrain("sft", added("<pad>"))
    assert code == 2 and "pad_token in " in said and "'<pad>' with id 45; expected below 45" in said, said


@pytest.mark.parametrize(
    ("stage", "trl", "says"),
    [
        ("sft", {"learning_rate": 0.0}, "trl.learning_rate: found 0.0; expected a number above 0"),
        ("dpo", {"learning_rate": -1e-3}, "trl.learning_rate: found -0.001"),
        ("sft", {"max_steps": 0}, "trl.max_steps: found 0; expected at least 1, or -1"),
        ("sft", {"max_steps": -1, "num_train_epochs": 0}, "trl.num_train_epochs: found 0; expected a number above 0"),
        ("sft", {"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "data.train: found 12 lines"),
        ("rlvr", {"per_device_train_batch_size": 64}, "data.train: found 12 lines; expected at least 16"),
    ],
)
def test_a_run_of_no_steps_is_refused(stage, trl, says, posttrain):
    code, said = posttrain(stage, **trl)
    assert code == 2 and said.startswith(f"error: {says}"), said
