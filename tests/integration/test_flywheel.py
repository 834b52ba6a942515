"""A flywheel of real stages at the smallest size, killed in every one of them: the results of the undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from remit_megatron.flywheel.plan import Plan
from remit_megatron.flywheel.records import read_record
from remit_megatron.runtime.files import sha256_file
from tests.integration.conftest import REPOSITORY, write
from tests.posttrain_runs import lines_of, write_lines
from tests.tiny import make_llama
from tests.unit.flywheel.conftest import WORKER, events

pytestmark = pytest.mark.timeout(1200)  # a whole chain of stages

KILLS = 36
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}


@pytest.fixture(scope="module")
def turn(material, config_for, tmp_path_factory) -> Path:
    """A folder in which a flywheel ran undisturbed and killed: base, RL on it, mid-training, exports, a program."""
    root = tmp_path_factory.mktemp("turn")
    student = make_llama(root / "student", seed=1, tokenizer=material["tokenizer"], **SMALL)
    content = config_for(root / "unused", train_iters=6, save_interval=2)
    content["logging"] = {"tensorboard": False}
    content["data"]["num_workers"] = 0
    run = write(root / "run.yaml", content)
    lines = write_lines(root / "lines.jsonl", lines_of("rlvr"))
    trl = {"max_steps": 4, "learning_rate": 1e-2, "num_generations": 4, "max_completion_length": 3}
    trl |= {"per_device_train_batch_size": 16, "gradient_checkpointing": False, "save_steps": 1}
    settings = {"model": "unused", "run_dir": "unused", "data": {"train": [str(lines)]}, "chat_template": "none"}
    rlvr = write(root / "rlvr.yaml", {**settings, "verifier": "number_at_end", "keep": {"every": 2}, "trl": trl})
    (root / "worker.py").write_text(WORKER)
    stages = {
        "base": {"kind": "train", "config": str(run), "model": str(student), "objective": "ntp"},
        "start": {"kind": "export", "model": "${stage:base}"},
        "rlvr": {"kind": "rlvr", "config": str(rlvr), "model": "${stage:start}"},
        "midtrain": {
            "kind": "train",
            "config": str(run),
            "objective": "remit",
            "model": "${stage:base}",
            "reference": "${stage:rlvr@step-2}",
        },
        "result": {"kind": "export", "model": "${stage:midtrain}"},
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


def results(root: Path, name: str, monkeypatch) -> dict[str, object]:
    """What counts of every stage: losses and rewards without times, weights."""
    monkeypatch.chdir(root)
    found: dict[str, object] = {}
    for id_, planned in Plan("flywheel.yaml", [f"run_dir={name}"]).planned.items():
        record = read_record(planned.directory)
        assert record is not None and record.status == "done"
        for path in sorted(planned.directory.rglob("*")):
            place = f"{id_}/{path.relative_to(planned.directory)}"
            if path.suffix == ".safetensors" and ".tmp" not in place and "checkpoint" not in place:
                found[place] = sha256_file(path)
            elif path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                timed = ("step_seconds", "tokens_per_second", "reference_seconds", "tflops", "mfu")
                found[place] = [{key: line[key] for key in line if key not in timed} for line in lines]
            elif path.name == "output":
                found[place] = path.read_text()
    return found


def test_killed_in_every_stage_it_ends_with_the_same(turn, monkeypatch) -> None:
    outcome = json.loads((turn / "outcome.json").read_text())
    assert outcome["code"] == 0
    # Of 36: the last stages may have ended before they were to be killed.
    assert len(outcome["kills"]) >= 20
    starts = Counter(stage for event, stage in events(turn / "killed") if event == "started")
    assert set(starts) == set(outcome["seconds"]) and min(starts.values()) > 1
    expected, found = results(turn, "straight", monkeypatch), results(turn, "killed", monkeypatch)
    assert len(expected) >= 8 and found == expected


def test_nothing_that_was_done_was_started_again(turn) -> None:
    done: set[str] = set()
    for event, stage in events(turn / "killed"):
        assert event in ("started", "done")
        assert event == "done" or stage not in done
        done |= {stage} if event == "done" else set()
    assert len(done) == 6
    assert len(events(turn / "killed")) > len(events(turn / "straight")) == 12


def test_it_ends_with_results_and_a_page(turn) -> None:
    for name in ("straight", "killed"):
        found = json.loads((turn / name / "results.json").read_text())
        assert [one["figure"] for one in found["posttrain"]] == ["reward_mean"]
        page = (turn / name / "report.html").read_text()
        assert "Reward over post-training" in page and "Training loss" in page and "round1/midtrain" in page


def test_evaluation_is_a_stage(material, remit, tmp_path) -> None:
    """lm-eval on a task file and items of our own, in a stage; transformers says what must come out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    items = [{"input": f"{i}+{i}=", "target": str(2 * i % 10)} for i in range(1, 25)]
    (tmp_path / "data/last").mkdir(parents=True)
    write_lines(tmp_path / "data/last/test.jsonl", items)
    choices = [str(digit) for digit in range(0, 10, 2)]
    task = {"task": "last_digit", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"doc_to_text": "{{input}}", "doc_to_choice": choices, "doc_to_target": "{{target}}", "num_fewshot": 0}
    task |= {"target_delimiter": "", "metadata": {"version": 1.0}}
    task |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    write(tmp_path / "task.yaml", task)
    suite = write(tmp_path / "suite.yaml", {"tasks": [{"task": "task.yaml", "name": "last", "shots": 0}]})
    stage = {"kind": "evaluate", "model": str(material["student"]), "suite": str(suite), "data": str(tmp_path / "data")}
    file = write(tmp_path / "flywheel.yaml", {"run_dir": str(tmp_path / "out"), "stages": {"evaluate": stage}})
    done = remit("flywheel", file, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

    tokenizer = AutoTokenizer.from_pretrained(material["student"])
    network = AutoModelForCausalLM.from_pretrained(material["student"]).double()
    right = 0
    for item in items:
        with torch.no_grad():
            logits = network(torch.tensor([tokenizer(item["input"])["input_ids"]])).logits[0, -1]
        scores = [logits[tokenizer(choice)["input_ids"][0]].item() for choice in choices]
        right += choices[scores.index(max(scores))] == item["target"]
    (found,) = json.loads((tmp_path / "out/results.json").read_text())["benchmarks"]
    assert (found["task"], found["items"], found["stage"]) == ("last", len(items), "round1/evaluate")
    assert found["score"] == right / len(items) and 0 < right < len(items)
    assert "last" in (tmp_path / "out/report.html").read_text()
    assert events(tmp_path / "out") == [("started", "round1/evaluate"), ("done", "round1/evaluate")]
    again = remit("flywheel", file, timeout=600)
    assert again.returncode == 0 and len(events(tmp_path / "out")) == 2
