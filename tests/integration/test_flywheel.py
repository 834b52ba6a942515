"""A flywheel of real stages at the smallest size, killed in every one of them: the results of the undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.flywheel.plan import Plan
from remit_megatron.flywheel.records import read_record
from remit_megatron.runtime.files import sha256_file
from tests.integration.conftest import REPOSITORY, write
from tests.posttrain_runs import lines_of, write_lines
from tests.tiny import make_llama
from tests.unit.flywheel.conftest import WORKER, events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # a whole chain of stages

KILLS = 40
ITEMS = [{"input": f"{i}+{i}=", "target": str(2 * i % 10)} for i in range(1, 25)]
CHOICES = [str(digit) for digit in range(0, 10, 2)]
EVERY = ("base", "start", "sft", "dpo", "rlvr", "check", "score", "midtrain", "result", "evaluate", "report", "count")
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}


@pytest.fixture(scope="module")
def turn(material, config_for, tmp_path_factory) -> Path:
    """A folder in which a flywheel of every kind of stage ran undisturbed and killed."""
    root = tmp_path_factory.mktemp("turn")
    student = make_llama(root / "student", seed=1, tokenizer=material["tokenizer"], **SMALL)
    content = config_for(root / "unused", train_iters=6, save_interval=2)
    content["logging"] = {"tensorboard": False}
    content["data"]["num_workers"] = 0
    run = write(root / "run.yaml", content)
    configs = {name: str(write(root / f"{name}.yaml", posttraining(name, root))) for name in ("sft", "dpo", "rlvr")}
    suite, data = last_digit(root)
    (root / "worker.py").write_text(WORKER)
    guided = {"config": str(run), "model": "${stage:base}", "reference": "${stage:rlvr@step-2}"}
    stages = {
        "base": {"kind": "train", "config": str(run), "model": str(student), "objective": "ntp"},
        "start": {"kind": "export", "model": "${stage:base}"},
        "sft": {"kind": "sft", "config": configs["sft"], "model": "${stage:start}"},
        "dpo": {"kind": "dpo", "config": configs["dpo"], "model": "${stage:sft}"},
        "rlvr": {"kind": "rlvr", "config": configs["rlvr"], "model": "${stage:dpo}"},
        "check": {"kind": "check", "samples": 8, **guided},
        "score": {"kind": "score", "all": True, **guided},
        "midtrain": {"kind": "train", "objective": "remit", "scores": "${stage:score}", **guided},
        "result": {"kind": "export", "model": "${stage:midtrain}"},
        "evaluate": {"kind": "evaluate", "model": "${stage:result}", "suite": str(suite), "data": str(data)},
        "report": {"kind": "report", "runs": ["${stage:midtrain}"], "results": ["${stage:evaluate}"]},
        "count": {
            "kind": "command",
            "words": [sys.executable, "worker.py", "{output}", 20, 0.05, "${stage:result}/config.json"],
        },
    }
    write(root / "flywheel.yaml", {"run_dir": "unused", "seed": 7, "stages": stages})
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = ["tests.integration.flywheel_kills", "flywheel.yaml", str(KILLS), "3", "outcome.json"]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, env=environment, capture_output=True, text=True, timeout=1200
    )
    logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in root.glob("*/stages/*/log.txt"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{logs}"
    return root


def posttraining(stage: str, root: Path) -> dict[str, Any]:
    """Four steps on a dozen sums, each saved."""
    lines = write_lines(root / f"{stage}.jsonl", lines_of(stage))
    trl: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 1}
    trl |= {"learning_rate": 1e-2, "gradient_checkpointing": False}
    content: dict[str, Any] = {"model": "unused", "run_dir": "unused", "data": {"train": [str(lines)]}}
    if stage == "rlvr":
        trl |= {"num_generations": 4, "max_completion_length": 3, "per_device_train_batch_size": 16}
        content |= {"verifier": "number_at_end", "keep": {"every": 2}}
    return {**content, "chat_template": "none", "trl": trl}


def last_digit(root: Path) -> tuple[Path, Path]:
    """A suite of one task file, and the folder of its items."""
    (root / "data/last").mkdir(parents=True)
    write_lines(root / "data/last/test.jsonl", ITEMS)
    task = {"task": "last_digit", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"doc_to_text": "{{input}}", "doc_to_choice": CHOICES, "doc_to_target": "{{target}}", "num_fewshot": 0}
    task |= {"target_delimiter": "", "metadata": {"version": 1.0}}
    task |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    write(root / "task.yaml", task)
    suite = write(root / "suite.yaml", {"tasks": [{"task": "task.yaml", "name": "last", "shots": 0}]})
    return suite, root / "data"


def results(root: Path, name: str, monkeypatch) -> dict[str, object]:
    """What counts of every stage: losses and rewards without times, weights."""
    monkeypatch.chdir(root)
    found: dict[str, object] = {}
    for id_, planned in Plan("flywheel.yaml", [f"run_dir={name}"]).planned.items():
        record = read_record(planned.directory)
        assert record is not None and record.status == "done"
        for path in sorted(planned.directory.rglob("*")):
            place = f"{id_}/{path.relative_to(planned.directory)}"
            weights = path.suffix == ".safetensors" and ".tmp" not in place and "checkpoint" not in place
            if weights or path.suffix == ".scores":
                found[place] = sha256_file(path)
            elif path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                timed = ("step_seconds", "tokens_per_second", "reference_seconds", "tflops", "mfu")
                found[place] = [{key: line[key] for key in line if key not in timed} for line in lines]
            elif path.name in ("output", "check.json"):
                found[place] = path.read_text()
            elif path.parent.name == "evaluation" and path.name == "results.json":
                found[place] = json.loads(path.read_text())["result"]
    return found


def test_killed_in_every_stage_it_ends_with_the_same(turn, monkeypatch) -> None:
    outcome = json.loads((turn / "outcome.json").read_text())
    assert outcome["code"] == 0
    # Of 40: the last stages may have ended before they were to be killed.
    assert len(outcome["kills"]) >= 20
    starts = Counter(stage for event, stage in events(turn / "killed") if event == "started")
    assert set(starts) == set(outcome["seconds"]) and min(starts.values()) > 1
    expected, found = results(turn, "straight", monkeypatch), results(turn, "killed", monkeypatch)
    kinds = {place.partition("/")[2].split("/")[0] for place in expected}
    assert kinds == set(EVERY) - {"report"} and found == expected


def test_nothing_that_was_done_was_started_again(turn) -> None:
    done: set[str] = set()
    for event, stage in events(turn / "killed"):
        assert event in ("started", "done")
        assert event == "done" or stage not in done
        done |= {stage} if event == "done" else set()
    assert len(done) == len(EVERY)
    assert len(events(turn / "killed")) > len(events(turn / "straight")) == 2 * len(EVERY)


def test_it_ends_with_results_and_a_page(turn) -> None:
    for name in ("straight", "killed"):
        found = json.loads((turn / name / "results.json").read_text())
        assert [one["figure"] for one in found["posttrain"]] == ["loss", "loss", "reward_mean"]
        page = (turn / name / "report.html").read_text()
        assert "Reward over post-training" in page and "Training loss" in page and "round1/midtrain" in page


def test_evaluation_is_a_stage(material, remit, tmp_path) -> None:
    """lm-eval on a task file and items of our own, in a stage; transformers says what must come out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    suite, data = last_digit(tmp_path)
    stage = {"kind": "evaluate", "model": str(material["student"]), "suite": str(suite), "data": str(data)}
    file = write(tmp_path / "flywheel.yaml", {"run_dir": str(tmp_path / "out"), "stages": {"evaluate": stage}})
    done = remit("flywheel", file, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

    tokenizer = AutoTokenizer.from_pretrained(material["student"])
    network = AutoModelForCausalLM.from_pretrained(material["student"]).double()
    right = 0
    for item in ITEMS:
        with torch.no_grad():
            logits = network(torch.tensor([tokenizer(item["input"])["input_ids"]])).logits[0, -1]
        scores = [logits[tokenizer(choice)["input_ids"][0]].item() for choice in CHOICES]
        right += CHOICES[scores.index(max(scores))] == item["target"]
    (found,) = json.loads((tmp_path / "out/results.json").read_text())["benchmarks"]
    assert (found["task"], found["items"], found["stage"]) == ("last", len(ITEMS), "round1/evaluate")
    assert found["score"] == right / len(ITEMS) and 0 < right < len(ITEMS)
    assert "last" in (tmp_path / "out/report.html").read_text()
    assert events(tmp_path / "out") == [("started", "round1/evaluate"), ("done", "round1/evaluate")]
    again = remit("flywheel", file, timeout=600)
    assert again.returncode == 0 and len(events(tmp_path / "out")) == 2
