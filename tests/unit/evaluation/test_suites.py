"""Suites, and what is found wrong with them before a model is loaded."""

from __future__ import annotations

import pytest
import yaml

from remit_megatron.evaluation.definitions import find
from remit_megatron.evaluation.suites import known_suites, load_suite
from remit_megatron.evaluation.task_files import plan_suite, splits_of, write_task_files
from remit_megatron.runtime.errors import UserError


def suite_of(tmp_path, *tasks, **more):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"tasks": list(tasks), **more}))
    return load_suite(str(path))


@pytest.mark.parametrize(
    "name", ["pretrain10", "posttrain10", "easy", "smollm2", pytest.param("extended", marks=pytest.mark.slow)]
)
def test_every_suite_of_the_repository_can_be_run(name):
    """Every task is one of lm-eval's, and metric, filter and shots exist for it."""
    assert set(known_suites()) == {"pretrain10", "posttrain10", "easy", "extended", "smollm2"}
    suite = load_suite(name)
    planned = plan_suite(suite, data=None)
    assert [item.shots for item in planned] == [entry.shots for entry in suite.entries]
    if name.endswith("10"):
        assert len(planned) == 10
    assert suite.chat_template == (name == "posttrain10")


def test_the_papers_shots():
    planned = {item.entry.column: item for item in plan_suite(load_suite("pretrain10"), data=None)}
    shots = {name: item.shots for name, item in planned.items()}
    assert shots == dict(GSM8K=8, MATH=4, GPQA=5, BBH=3, IFE=0, HE=0, MBPP=3, TQA=0, **{"ARC-C": 25}, MMLU_P=5)
    assert [len(planned[name].leaves) for name in ("MATH", "BBH", "MMLU_P", "GSM8K")] == [7, 27, 14, 1]
    assert [name for name, item in planned.items() if item.unsafe] == ["HE", "MBPP"]


def test_one_task_is_a_suite():
    (item,) = plan_suite(load_suite("gsm8k"), data=None)
    assert (item.shots, item.metric, item.filter) == (5, "exact_match", "strict-match")


@pytest.mark.parametrize(
    ("task", "field", "expected"),
    [
        ({"task": "gsm8"}, "task", "gsm8k"),
        ({"task": "gsm8k", "shot": 3}, "tasks[0].shot", "shots"),
        ({"task": "gsm8k", "shots": "many"}, "tasks[0].shots", "a number"),
        ({"task": "gsm8k", "shots": -1}, "tasks[0].shots", "0 or more"),
        ({"task": "gsm8k", "filter": "strict"}, "filter", "strict-match, flexible-extract"),
        ({"task": "gsm8k", "metric": "acc"}, "metric", "exact_match"),
        ({"task": ["gsm8k", "arc_easy"]}, "tasks[0].name", "a name"),
        ({"task": "ifeval", "shots": 3}, "shots", "no answer"),
        ({"task": "bbh_cot_fewshot_navigate", "shots": 4}, "shots", "at most 3"),
        ({"task": "gsm8k", "name": "../x"}, "tasks[0].name", "letters"),
    ],
)
def test_wrong_entries_are_refused(task, field, expected, tmp_path):
    with pytest.raises(UserError) as caught:
        plan_suite(suite_of(tmp_path, task), data=None)
    assert field in caught.value.field and expected in str(caught.value)


def test_two_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="twice"):
        suite_of(tmp_path, "gsm8k", {"task": "gsm8k", "shots": 8})
    suite_of(tmp_path, "gsm8k", {"task": "gsm8k", "shots": 8, "name": "gsm8k_8"})


def test_all_that_is_missing_is_named_at_once(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    suite = suite_of(tmp_path, {"task": "gsm8k", "shots": 8}, "gpqa_main_zeroshot", "mmlu_pro")
    with pytest.raises(UserError) as caught:
        plan_suite(suite, data=tmp_path)
    text = str(caught.value)
    assert "gsm8k/train.jsonl" in text and "gpqa" in text and "gated" in text and "mmlu_pro/test.jsonl" in text
    # Without shots the training split is not needed.
    plan_suite(suite_of(tmp_path, {"task": "gsm8k", "shots": 0}), data=tmp_path)


def test_every_subtasks_file_is_named_and_none_of_code_that_is_not_run(tmp_path):
    with pytest.raises(UserError) as caught:
        plan_suite(suite_of(tmp_path, "humaneval", {"task": "bbh_cot_fewshot", "data": "bbh"}), data=tmp_path)
    text = str(caught.value)
    assert "28 files" in text and "bbh/{boolean_expressions," in text and ",word_sorting}/test.jsonl" in text
    assert "humaneval/test.jsonl" in text
    with pytest.raises(UserError, match="27 files"):
        suite = suite_of(tmp_path, "humaneval", {"task": "bbh_cot_fewshot", "data": "bbh"})
        plan_suite(suite, data=tmp_path, code=False)


def test_a_name_that_is_nothing_is_told_the_suites(tmp_path):
    with pytest.raises(UserError, match=r"a suite \(easy, .*near it: pretrain10"):
        plan_suite(load_suite("pretrain11"), data=None)


def test_subtasks_do_not_share_one_file(data, tmp_path):
    """A folder of the group's name would give every subtask the same items."""
    names = ["bbh_cot_fewshot_boolean_expressions", "bbh_cot_fewshot_word_sorting"]
    suite = suite_of(tmp_path, {"task": names, "name": "bbh", "data": "bbh", "shots": 3})
    (item,) = plan_suite(suite, data=data)
    assert [files["test"].parent.name for files in item.files] == ["boolean_expressions", "word_sorting"]
    with pytest.raises(UserError, match="missing"):
        plan_suite(suite_of(tmp_path, {"task": [*names, "bbh_cot_fewshot_navigate"], "name": "bbh"}), data=data)


def test_an_item_is_kept_out_of_its_own_examples(tmp_path):
    """GPQA has one split; lm-eval leaves an item out only where the examples' split is test_split."""
    leaf = find("gpqa_main_n_shot").leaves[0]
    assert splits_of(leaf, 5).shared and not splits_of(leaf, 0).shared
    (item,) = plan_suite(suite_of(tmp_path, {"task": "gpqa_main_n_shot", "shots": 5}), data=None)
    write_task_files(item, tmp_path / "files", cache=tmp_path)
    written = yaml.safe_load((tmp_path / "files" / "gpqa_main_n_shot.yaml").read_text())
    assert (written["test_split"], written["fewshot_split"], written["validation_split"]) == ("train", "train", None)
    assert written["num_fewshot"] == 5 and written["include"].endswith("gpqa_main_n_shot.yaml")


def test_a_changed_item_is_another_key(data, tmp_path):
    import shutil

    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    suite = load_suite("gsm8k")
    (before,) = plan_suite(suite, data=data)
    (same,) = plan_suite(suite, data=copied)
    assert before.digest() == same.digest()
    with open(copied / "gsm8k/test.jsonl", "a") as file:
        file.write('{"question": "c", "answer": "d"}\n')
    (after,) = plan_suite(suite, data=copied)
    assert after.digest() != before.digest()
