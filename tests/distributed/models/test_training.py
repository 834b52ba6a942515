"""Every family trains with ReMiT alike on one process and on tensor x pipeline ranks, with a reference of its own.

What is exported afterwards is the same, from whatever layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_conversion import resave, run_export, run_import
from tests.distributed.training.test_training import train
from tests.families import FIRST_CASES, hf_values, make_case
from tests.tiny import make_tokenizer, write_documents

STEPS = 10
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2_pp2_sp": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    from remit_megatron.data.build import build_dataset

    root = tmp_path_factory.mktemp("models_training")
    tokenizer = make_tokenizer(root / "tokenizer")
    documents = write_documents(root / "documents.jsonl", count=200, seed=3)
    build_dataset([str(documents)], tokenizer=str(tokenizer), output=str(root / "corpus"))
    return {"root": root, "tokenizer": tokenizer, "corpus": root / "corpus"}


def configuration(data: dict[str, Path], init: Path, reference: Path, run_dir: Path, **megatron: Any) -> dict[str, Any]:
    return {
        "init": str(init),
        "objective": {"name": "remit"},
        "reference": {"checkpoint": str(reference)},
        "data": {"train": str(data["corpus"]), "tokenizer": str(data["tokenizer"]), "num_workers": 0},
        "megatron": {
            "seq_length": 32,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "train_iters": STEPS,
            "lr": 1e-3,
            # Adam moves a weight by a full step however small its gradient is: without a floor, rounding decides
            # where weights go whose gradient all but vanishes.
            "adam_eps": 1e-5,
            "min_lr": 1e-4,
            "make_vocab_size_divisible_by": 8,
        }
        | megatron,
        "run_dir": str(run_dir),
        "logging": {"tensorboard": False},
    }


@pytest.mark.parametrize("case", FIRST_CASES)
def test_ten_steps_on_two_layouts_end_in_the_same_weights(pool, data, case):
    import transformers

    root = data["root"] / case
    student = make_case(root / "student", case, seed=1, tokenizer=data["tokenizer"])
    theta = {"rope_type": "default", "rope_theta": 70000.0}  # models of one family differ in it
    reference = make_case(root / "reference", case, seed=2, tokenizer=data["tokenizer"], rope_parameters=theta)
    pool.run(run_import, world_size=1, hf=str(student), output=str(root / "imported"))
    exported: dict[str, Path] = {}
    metrics: dict[str, list[dict[str, Any]]] = {}
    for layout, (world_size, sizes) in LAYOUTS.items():
        config = configuration(data, root / "imported", reference, root / layout, **sizes)
        metrics[layout] = train(pool, config, world_size=world_size)
        exported[layout] = root / f"{layout}_exported"
        pool.run(run_export, world_size=1, checkpoint=str(root / layout), output=str(exported[layout]))
    alone, split = metrics.values()
    assert len(alone) == len(split) == STEPS
    assert alone[0]["weight_std"] > 0.01, "the reference has a say"
    for first, second in zip(alone, split, strict=True):
        assert second["lm_loss"] == pytest.approx(first["lm_loss"], rel=1e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    start, left, right = (load_file(path / "model.safetensors") for path in (student, *exported.values()))
    assert start.keys() == left.keys() == right.keys()
    for name, tensor in left.items():
        assert not torch.equal(tensor, start[name]), f"{name} was trained"
        assert (right[name] - tensor).abs().max() <= 1e-4, name

    # A third layout reads what the second wrote, and its export is that of the second.
    checkpoint = root / "tp2_pp2_sp" / "checkpoints" / f"iter_{STEPS:07d}"
    pool.run(resave, world_size=2, checkpoint=str(checkpoint), output=str(root / "third"), tp=1, pp=2, divisor=1)
    pool.run(run_export, world_size=1, checkpoint=str(root / "third"), output=str(root / "third_exported"))
    for name, tensor in load_file(root / "third_exported" / "model.safetensors").items():
        assert torch.equal(tensor, right[name]), name

    assert json.loads((exported["one"] / "config.json").read_text())["model_type"] == hf_values(case)["model_type"]
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in exported.values())
    prompt = torch.tensor([[5, 9, 17, 3]])
    decoded = [model.generate(prompt, max_new_tokens=12, do_sample=False).tolist() for model in (first, second)]
    assert decoded[0] == decoded[1]
