"""`remit check reference`: the figures are those of transformers on the same tokens, on every layout."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.training.test_evaluation import definition, write_requests
from tests.distributed.training.test_training import LAYOUTS, configuration, material

__all__ = ["material"]

SAMPLES = 10


def checked(directory: str, config: dict[str, Any], output: str) -> None:
    """The command on this rank."""
    import patches

    patches.apply()
    from remit_megatron.run.configuration import load_config
    from remit_megatron.scoring.check_reference import check_reference

    path = Path(directory) / f"run_{os.environ['RANK']}.yaml"
    path.write_text(json.dumps(config))
    assert check_reference(load_config(path), samples=SAMPLES, output=output) == 0


def tokens_of_the_text(material) -> np.ndarray:
    """[SAMPLES, 65] the sequences, as the data layer gives them."""
    from remit_megatron.data.blend import open_blend

    blend = open_blend(
        [(None, str(material["corpus"]))], sequence_length=64, num_samples=SAMPLES, seed=1234, packing_seed=0, eod_id=0
    )
    return np.stack([np.append(item["tokens"], item["labels"][-1:]) for item in (blend[n] for n in range(SAMPLES))])


def losses(model_directory: Path, tokens: np.ndarray) -> np.ndarray:
    """[SAMPLES, 64] of transformers in float64, each document by itself."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float64).eval()
    found = np.zeros((len(tokens), 64))
    for row, ids in enumerate(torch.from_numpy(tokens).long()):
        starts = [0, *(np.nonzero(tokens[row, :-1] == 0)[0] + 1).tolist(), 64]
        for first, end in itertools.pairwise(starts):
            if first == end:
                continue
            with torch.no_grad():
                scores = model(ids[None, first:end]).logits[0].log_softmax(-1)
            found[row, first:end] = -scores.gather(1, ids[first + 1 : end + 1, None])[:, 0].numpy()
    return found


@pytest.fixture(scope="module")
def truth(material) -> dict[str, Any]:
    tokens = tokens_of_the_text(material)
    student, reference = (losses(material[name], tokens) for name in ("student", "reference"))
    masked = figures_of(student, reference, tokens[:, :-1] != 0, document_means(student - reference, tokens), 0.3)
    return figures_of(student, reference, np.ones_like(student, dtype=bool)) | {"masked": masked}


def document_means(delta: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[SAMPLES, 64] mean of each document's labels that count, at each of them."""
    means = np.zeros_like(delta)
    for row in range(len(delta)):
        starts = [0, *(np.nonzero(tokens[row, :-1] == 0)[0] + 1).tolist(), 64]
        for first, end in itertools.pairwise(starts):
            # What its end-of-document predicts is the last of its labels and does not count, but in the last document.
            last = end - 1 if end > first and tokens[row, end - 1] == 0 else end
            if last > first:
                means[row, first:last] = delta[row, first:last].mean()
    return means


def figures_of(
    student: np.ndarray,
    reference: np.ndarray,
    counted: np.ndarray,
    means: np.ndarray | None = None,
    epsilon: float = 0.2,
) -> dict[str, Any]:
    """Of the labels that count, [SAMPLES, 64] all; centered on their sequences' means where none are given."""
    delta = student - reference
    if means is None:
        means = (delta * counted).sum(1, keepdims=True) / counted.sum(1, keepdims=True)
    return {
        "tokens": counted.sum(),
        "student_loss": student[counted].mean(),
        "reference_loss": reference[counted].mean(),
        "difference": delta[counted].mean(),
        "tokens_ahead": (delta[counted] > 0).mean(),
        "weights": np.clip(2 / (1 + np.exp(-(delta - means))), 1 - epsilon, 1 + epsilon)[counted],
    }


def test_what_the_run_masks_does_not_count(pool, material, truth, tmp_path):
    """The first token of a document, which nothing before it tells: a sharper model pays most for it."""
    config = configuration(material, tmp_path / "run", {"name": "remit", "centering": "document", "epsilon": 0.3})
    assert config["data"]["mask_eod_loss"]
    output = tmp_path / "found.json"
    pool.run(checked, world_size=1, directory=str(tmp_path), config=config, output=str(output))
    found, expected = json.loads(output.read_text())["text"], truth["masked"]
    assert found["tokens"] == expected["tokens"] < SAMPLES * 64
    for figure in ("student_loss", "reference_loss", "tokens_ahead"):
        assert found[figure] == pytest.approx(expected[figure], abs=1e-4), figure
    assert abs(expected["student_loss"] - truth["student_loss"]) > 1e-3, "the mask tells them apart"
    assert found["loss_difference"]["value"] == pytest.approx(expected["difference"], abs=1e-4)
    assert found["weight_std"] == pytest.approx(expected["weights"].std(), abs=1e-4)


@pytest.mark.parametrize("name", ["one", "tp2_pp2", "pp2_virtual2", "cp2", "dp2"])
def test_figures_are_those_of_transformers(pool, material, truth, tmp_path, name):
    world_size, layout = (1, {}) if name == "one" else LAYOUTS[name]
    suite, questions = write_requests(tmp_path / "requests")
    config = configuration(material, tmp_path / "run", {"name": "remit"}, **layout)
    config["data"]["mask_eod_loss"] = False
    config["evaluation"] = {"suite": str(suite), "data": str(tmp_path / "requests")}
    output = tmp_path / "found.json"
    pool.run(checked, world_size=world_size, directory=str(tmp_path), config=config, output=str(output))
    found = json.loads(output.read_text())
    text = found["text"]
    assert text["tokens"] == SAMPLES * 64
    for figure in ("student_loss", "reference_loss", "tokens_ahead"):
        assert text[figure] == pytest.approx(truth[figure], abs=1e-4), figure
    assert text["loss_difference"]["value"] == pytest.approx(truth["difference"], abs=1e-4)
    assert text["weight_std"] == pytest.approx(truth["weights"].std(), abs=1e-4)
    assert text["clipped"] == pytest.approx(np.isin(truth["weights"], (0.8, 1.2)).mean(), abs=2e-3)
    for role in ("student", "reference"):
        expected = definition(material[role], questions)
        assert {task["task"]: task[role] for task in found["tasks"]} == {
            task: pytest.approx(figures["score"], abs=1e-4) for task, figures in expected.items()
        }
    gold = next(task for task in found["tasks"] if task["task"] == "sums/gold")
    assert gold["difference"]["value"] == pytest.approx(gold["student"] - gold["reference"])  # fewer bits are better
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"data_cache"}, "nothing is trained"


def refused(directory: str, config: dict[str, Any]) -> str:
    """What the command says on this rank, instead of figures."""
    from remit_megatron.runtime.errors import DoNotRestart

    with pytest.raises(DoNotRestart) as caught:
        checked(directory, config, str(Path(directory) / "found.json"))
    return str(caught.value)


@pytest.mark.parametrize(("role", "layout"), [("reference", "one"), ("reference", "dp2"), ("student", "one")])
def test_models_that_give_no_numbers(pool, material, tmp_path, role, layout):
    """A letter that the reference has no numbers for: its figures would be those of the other tokens alone."""
    import torch
    from safetensors.torch import load_file, save_file

    world_size, arguments = (1, {}) if layout == "one" else LAYOUTS[layout]
    broken = tmp_path / "broken"
    shutil.copytree(material[role], broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][2] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = configuration(material, tmp_path / "run", {"name": "remit"}, **arguments)
    config |= {"init": str(broken)} if role == "student" else {"reference": {"checkpoint": str(broken)}}
    lines = pool.run(refused, world_size=world_size, directory=str(tmp_path), config=config)
    field = "init" if role == "student" else "reference.checkpoint"
    assert all(line.startswith(f"{field}: found ") and "without a finite score" in line for line in lines), lines


def test_documents_that_the_text_does_not_mark(pool, material, tmp_path):
    """Centering by document would be by sequence, and the figures those of another run."""
    from remit_megatron.data.build import build_dataset
    from tests.tiny import make_tokenizer, write_documents

    texts, tokenizer = write_documents(tmp_path / "c.jsonl", count=300, seed=9), make_tokenizer(tmp_path / "tokenizer")
    build_dataset([texts], tokenizer, tmp_path / "without", append_eod=False)
    objective = {"name": "remit", "centering": "document"}
    config = configuration(material, tmp_path / "run", objective)
    config["data"] |= {"train": [str(tmp_path / "without")], "mask_eod_loss": False, "document_mask": False}
    config["data"].pop("valid", None)
    (line,) = pool.run(refused_input, world_size=1, directory=str(tmp_path), config=config)
    assert line.startswith(f"objective.centering: found document with {tmp_path / 'without'}, built without"), line


def refused_input(directory: str, config: dict[str, Any]) -> str:
    """The line about the configuration that the command ends with."""
    from remit_megatron.runtime.errors import UserError

    with pytest.raises(UserError) as caught:
        checked(directory, config, str(Path(directory) / "found.json"))
    return str(caught.value)
