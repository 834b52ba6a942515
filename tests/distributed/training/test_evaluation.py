"""A suite scored during training: equal to transformers on the exported model, on every layout; training goes on."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch

from tests.distributed.training.test_training import LAYOUTS, configuration, material
from tests.tiny import CHARACTERS

__all__ = ["material"]

LENGTH = 64
CHECKED = ("tp2", "pp2", "tp2_pp2", "tp2_sp", "dp2_overlap", "pp2_virtual2", "cp2")
EVALUATED = [0, 2, 4, 5]


def write_requests(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A task of gold answers and one of choices, very uneven, one longer than a sequence: suite and questions."""
    generator = random.Random(11)

    def text(shortest: int, longest: int) -> str:
        return "".join(generator.choice("abcde fgh 0123 +=") for _ in range(generator.randint(shortest, longest)))

    questions: list[dict[str, Any]] = []
    for doc_id in range(9):
        context = text(70, 90) if doc_id == 4 else text(1, 40)
        questions.append({"task": "sums/gold", "id": doc_id, "choices": [(context, " " + text(1, 12))], "gold": 0})
    for doc_id in range(7):
        context, count = text(3, 30), 2 + doc_id % 3
        choices = [(context, " " + text(1, 15)) for _ in range(count)]
        questions.append({"task": "words/rc", "id": doc_id, "choices": choices, "gold": doc_id % count})
    for name, metric in (("sums/gold", "bits_per_byte"), ("words/rc", "acc_per_char")):
        (folder / name).mkdir(parents=True)
        described = {"task_config": {"primary_metric": metric, "num_shots": 3}}
        (folder / name / "config.json").write_text(json.dumps(described))
        lines = [
            {
                "request_type": "loglikelihood",
                "doc_id": question["id"],
                "idx": index,
                "label": question["gold"],
                "request": {"context": context, "continuation": continuation},
            }
            for question in questions
            if question["task"] == name
            for index, (context, continuation) in enumerate(question["choices"])
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (folder / name / "requests.jsonl.gz").write_bytes(gzip.compress(content))
    suite = folder / "toy.yaml"
    suite.write_text("requests: [sums/gold, {task: words/rc}]\n")
    return suite, questions


def definition(model_directory: Path, questions: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The same figures from transformers in float64, one request at a time."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory)
    found: dict[str, list[tuple[float, float]]] = {}
    for question in questions:
        logprobs = []
        for texts in question["choices"]:
            before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
            ids = torch.tensor([(before + after)[-LENGTH - 1 :]])
            with torch.no_grad():
                scores = model(ids).logits.log_softmax(-1)
            picked = scores[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            logprobs.append(float(picked[-len(after) :].sum()))
        answers, gold = [answer for _, answer in question["choices"]], question["gold"]
        bits = -logprobs[gold] / math.log(2) / len(answers[gold].encode())
        normed = [value / len(answer) for value, answer in zip(logprobs, answers, strict=True)]
        right = float(normed.index(max(normed)) == gold)
        found.setdefault(question["task"], []).append((bits if question["task"] == "sums/gold" else right, bits))
    means = {
        task: [sum(column) / len(values) for column in zip(*values, strict=True)] for task, values in found.items()
    }
    return {task: {"score": score, "bits_per_byte": bits} for task, (score, bits) in means.items()}


def trained(directory: str, config: dict[str, Any]) -> dict[str, Any]:
    """A run on this rank; its files."""
    import os

    import patches

    patches.apply()
    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train

    path = Path(directory) / f"run_{os.environ['RANK']}.yaml"
    path.write_text(json.dumps(config))
    assert train(load_config(path)) == 0
    run_dir = Path(config["run_dir"])
    files = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "evaluation")}
    return {
        name: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        for name, file in files.items()
    }


def exported(run_dir: str) -> None:
    import patches

    patches.apply()
    from remit_megatron.conversion.to_huggingface import export_model

    export_model(run_dir, Path(run_dir) / "hf")


def stopped(directory: str, config: dict[str, Any]) -> str:
    """The same of a run that must not be started again; what it said."""
    from remit_megatron.runtime.errors import DoNotRestart

    with pytest.raises(DoNotRestart) as failure:
        trained(directory, config)
    return str(failure.value)


def trained_alone(directory: str, config: dict[str, Any]) -> dict[str, Any]:
    """The same with one request in each row."""
    import patches

    patches.apply()
    from remit_megatron.scoring import requests

    with mock.patch.object(requests, "lay_out", partial(_alone, requests.lay_out)):
        return trained(directory, config)


def _alone(lay_out, encoded, *, sequence_length: int, together: bool):
    assert together, "documents can be kept apart on this layout"
    rows = lay_out(encoded, sequence_length=sequence_length, together=False)
    assert all(len(row.places) == 1 for row in rows)
    return rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[Path, Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("requests")
    return (folder, *write_requests(folder))


def evaluated(material, run_dir: Path, toy, **megatron: Any) -> dict[str, Any]:
    config = configuration(material, run_dir, {"name": "remit"}, **megatron)
    return config | {"evaluation": {"every": 2, "suite": str(toy[1]), "data": str(toy[0])}}


@pytest.fixture(scope="module")
def alone(pool, material, toy, tmp_path_factory) -> dict[str, Any]:
    """On one process, and what transformers says of the models before and after."""
    folder = tmp_path_factory.mktemp("one")
    config = evaluated(material, folder / "run", toy)
    found = pool.run(trained, world_size=1, directory=str(folder), config=config)[0]
    pool.run(exported, world_size=1, run_dir=str(folder / "run"))
    before, after = (definition(model, toy[2]) for model in (material["student"], folder / "run" / "hf"))
    return found | {"before": before, "after": after}


def same(found: dict[str, Any], expected: dict[str, dict[str, float]]) -> None:
    assert found.keys() == expected.keys()
    for task, figures in expected.items():
        for name, value in figures.items():
            assert found[task][name] == pytest.approx(value, abs=1e-4), (task, name)


def test_one_process_equals_transformers(alone):
    first, *_, last = alone["evaluation"]
    assert [record["iteration"] for record in alone["evaluation"]] == EVALUATED
    same(first["tasks"], alone["before"])
    same(last["tasks"], alone["after"])
    assert abs(alone["before"]["sums/gold"]["score"] - alone["after"]["sums/gold"]["score"]) > 0.01, "it has learnt"
    assert last["tasks"]["words/rc"]["items"] == 7 and last["tasks"]["sums/gold"]["shots"] == 3
    assert 0 < last["share"] < 1 and last["seconds"] > 0 and last["consumed_tokens"] == 5 * 8 * LENGTH


def test_training_goes_on_bit_for_bit(pool, material, alone, tmp_path):
    config = configuration(material, tmp_path / "run", {"name": "remit"})
    without = pool.run(trained, world_size=1, directory=str(tmp_path), config=config)[0]
    assert without["evaluation"] == []
    timed = ("tokens_per_second", "step_seconds", "reference_seconds", "tflops", "mfu")
    for record, plain in zip(alone["metrics"], without["metrics"], strict=True):
        assert {k: v for k, v in record.items() if k not in timed} == {k: v for k, v in plain.items() if k not in timed}


@pytest.mark.parametrize("name", CHECKED)
def test_layouts_agree(pool, material, toy, alone, tmp_path, name):
    world_size, layout = LAYOUTS[name]
    config = evaluated(material, tmp_path / "run", toy, **layout)
    found = pool.run(trained, world_size=world_size, directory=str(tmp_path), config=config)[0]["evaluation"]
    assert [record["iteration"] for record in found] == EVALUATED
    same(found[0]["tasks"], alone["before"])
    same(found[-1]["tasks"], alone["after"])


def test_one_request_in_a_row(pool, material, toy, alone, tmp_path):
    """As where documents cannot be kept apart."""
    config = evaluated(material, tmp_path / "run", toy, train_iters=1)
    found = pool.run(trained_alone, world_size=2, directory=str(tmp_path), config=config)[0]["evaluation"]
    same(found[0]["tasks"], alone["before"])


def test_a_student_that_gives_no_numbers(pool, material, toy, tmp_path):
    """One NaN, in the embedding of a letter that some requests have: known before the first step, on every rank."""
    broken = tmp_path / "broken"
    shutil.copytree(material["student"], broken)
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][2 + CHARACTERS.index("g"), 0] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = evaluated(material, tmp_path / "run", toy, pipeline_model_parallel_size=2) | {"init": str(broken)}
    lines = pool.run(stopped, world_size=2, directory=str(tmp_path), config=config)
    assert len(set(lines)) == 1 and lines[0].startswith("evaluation: "), lines
    assert "log-probabilities are not finite" in lines[0]
    assert not (tmp_path / "run" / "evaluation.jsonl").exists() and not list((tmp_path / "run").glob("*/iter_*"))
    (*_, ended) = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    assert ended["code"] == 70
