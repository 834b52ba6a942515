"""Shots are counted in the prompts, prompts that do not fit are counted too, and no item is its own example."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from remit_megatron import cli
from remit_megatron.evaluation.shots import check_shots, effective_shots, hold_items, read_anew
from remit_megatron.evaluation.suites import load_suite
from remit_megatron.evaluation.task_files import plan_suite, write_task_files
from remit_megatron.runtime.errors import UserError
from tests.unit.evaluation.conftest import write_rows


def load(tmp_path: Path, files: Path, **entry):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"tasks": [entry]}))
    (item,) = plan_suite(load_suite(str(path)), data=files)
    name = write_task_files(item, tmp_path / "tasks", cache=tmp_path / "datasets")
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False).load([name])
    return item, loaded["tasks"]


@pytest.mark.parametrize("shots", [0, 3])
def test_a_task_that_ignores_the_command_lines_shots_gets_the_suites(shots, tmp_path):
    """TruthfulQA's file says 0, which lm-eval's --num_fewshot does not replace; examples come from its own items."""
    rows = [{"question": f"q {i}?", "mc1_targets": {"choices": [f"yes {i}", "no"], "labels": [1, 0]}} for i in range(6)]
    write_rows(tmp_path / "truthfulqa_mc1" / "validation.jsonl", rows)
    item, tasks = load(tmp_path, tmp_path, task="truthfulqa_mc1", shots=shots)
    check_shots(item, tasks)
    task = tasks["truthfulqa_mc1"]
    assert effective_shots(task) == shots
    prompts = [task.fewshot_context(document, num_fewshot=shots) for document in task.eval_docs]
    for i, prompt in enumerate(prompts):
        assert prompt.count(f"q {i}?") == 1, "an item is its own example"
    # The six questions in the prompt of every example, and of the item.
    assert prompts[0].count("What is the square root of banana?") == 1 + shots


def test_shuffled_choices_do_not_let_an_item_into_its_own_examples(tmp_path):
    """GPQA shuffles the choices each time it reads an item, so that equality does not find it."""
    wrong = {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
    rows = [{"Question": f"question {i}?", "Correct Answer": "right", **wrong} for i in range(8)]
    write_rows(tmp_path / "gpqa_main" / "train.jsonl", rows)
    entry = {"task": "gpqa_main_n_shot", "shots": 5, "data": "gpqa_main"}
    item, tasks = load(tmp_path, tmp_path, **entry)
    with pytest.raises(UserError, match="item_key"):
        check_shots(item, tasks)
    item, tasks = load(tmp_path, tmp_path, **entry, item_key="Question")
    check_shots(item, tasks)
    task = tasks["gpqa_main_n_shot"]
    for i in range(8):
        prompt = task.fewshot_context(task.eval_docs[i], num_fewshot=5)
        assert prompt.count(f"question {i}?") == 1 and prompt.count("Question: question ") == 6


def test_items_are_scored_as_they_were_asked(tmp_path):
    """lm-eval shuffles GPQA's choices for the prompt, and again for the score; held, they stay."""
    wrong = {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
    rows = [{"Question": f"question {i}?", "Correct Answer": "right", **wrong} for i in range(8)]
    write_rows(tmp_path / "gpqa_main" / "train.jsonl", rows)
    entry = {"task": "gpqa_main_n_shot", "shots": 0, "data": "gpqa_main"}
    orders = []
    for _ in range(2):
        with read_anew():
            _, tasks = load(tmp_path, tmp_path, **entry)
            task = tasks["gpqa_main_n_shot"]
            assert list(task.eval_docs) != list(task.eval_docs), "lm-eval has mended it: hold_items can go"
            hold_items(task)
        assert list(task.eval_docs) == list(task.eval_docs)
        orders.append([document["answer"] for document in task.eval_docs])
    # The task's own generator goes on; in a new process both would begin at its seed.
    assert orders[0] != orders[1]


def test_another_number_of_examples_than_asked_for_is_refused(data, tmp_path):
    item, tasks = load(tmp_path, data, task="gsm8k", shots=3)
    tasks["gsm8k"].set_config("num_fewshot", 2)
    with pytest.raises(UserError, match="found 2 in its prompts; expected 3"):
        check_shots(item, tasks)


def test_prompts_that_lose_their_beginning_are_counted(models, data, tmp_path, capsys):
    """300 positions hold the item but not its five examples, which lm-eval cuts off without a word."""
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"tasks": [{"task": "gsm8k", "shots": 5, "generation": {"max_gen_toks": 4}}]}))
    for length, cut in ((128, 2), (2048, 0)):
        output = tmp_path / str(length)
        words = [str(models["first"]), f"--suite={suite}", f"--data={data}", f"--output={output}", "--limit=2"]
        assert cli.main(["evaluate", *words, f"--max-length={length}"]) == 0
        assert json.loads((output / "results.json").read_text())["first"]["gsm8k"]["cut"] == cut
        assert ("prompts cut" in capsys.readouterr().out) == bool(cut)


def test_ifeval_without_its_sentence_data_is_refused_at_the_start(models, data, tmp_path, monkeypatch, capsys):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    write_rows(
        tmp_path / "ifeval" / "train.jsonl", [{"prompt": "p", "instruction_id_list": [], "kwargs": [], "key": 1}]
    )
    words = [str(models["first"]), "--suite=ifeval", f"--data={tmp_path}", f"--output={tmp_path / 'out'}"]
    assert cli.main(["evaluate", *words]) == 2
    assert "punkt_tab" in capsys.readouterr().err
