"""Tasks whose right answers no tiny model gives (MMLU-Pro, IFEval, MBPP, HumanEval, GPQA), scored on answers written
here: of the items 0 to 5 the even ones are right. Then the page that a report makes of these very files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.models.huggingface import HFLM

from remit_megatron import cli
from tests.tiny import make_llama, make_tokenizer
from tests.unit.analysis.runs import make_run
from tests.unit.evaluation.conftest import write_rows
from tests.unit.evaluation.plain import run_plain

ITEMS = 6
TASKS: list[dict[str, Any]] = [
    {"task": "mmlu_pro_math", "shots": 2, "data": "mmlu_pro", "generation": {"max_gen_toks": 16}},
    {"task": "ifeval", "shots": 0, "metric": "prompt_level_strict_acc", "generation": {"max_gen_toks": 16}},
    {"task": "mbpp", "shots": 3, "metric": "pass_at_1", "generation": {"max_gen_toks": 16}},
    {"task": "humaneval", "shots": 0, "metric": "pass@1", "filter": "create_test", "generation": {"max_gen_toks": 16}},
    {"task": "gpqa_main_zeroshot", "shots": 0, "metric": "acc", "data": "gpqa_main"},
]


def answer(prompt: str) -> str:
    """What the model is made to say to the last item of a prompt."""
    number = int(re.findall(r"item (\d+)", prompt)[-1])
    right = number % 2 == 0
    if "multiple choice" in prompt:
        return f" So it is clear. The answer is ({'ABCDEFGHIJ'[number if right else number + 1]})."
    if "[BEGIN]" in prompt:
        return f"def f(x):\n    return x + {number if right else number + 1}\n"
    if "def g" in prompt:
        return f"    return x * {number if right else number + 1}\n"
    return "<<a title>> and no more" if right else "<<a title>>, and a comma"


def likelihood(prompt: str, choice: str) -> tuple[float, bool]:
    """Highest for the letter of the choice that reads "right" after an even item, and for another one after an odd."""
    number = int(re.findall(r"item (\d+)", prompt)[-1])
    text = re.findall(rf"{re.escape(choice.strip())} (.*)", prompt)[-1]
    return (-1.0 if (text == "right") == (number % 2 == 0) else -2.0), False


@pytest.fixture
def scripted(monkeypatch):
    """Both lm-eval's model and ours answer from the script."""
    ask = {
        "generate_until": lambda self, requests, **_: [answer(request.args[0]) for request in requests],
        "loglikelihood": lambda self, requests, **_: [likelihood(*request.args) for request in requests],
    }
    for name, method in ask.items():
        monkeypatch.setattr(HFLM, name, method)


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    """Six items of each task, in the hub's columns."""
    folder = tmp_path_factory.mktemp("items")
    choices = [str(k) for k in range(10)]
    for split in ("test", "validation"):
        rows = [
            {
                "question": f"item {i}?",
                "options": choices,
                "answer": "ABCDEFGHIJ"[i],
                "answer_index": i,
                "category": "math",
                "cot_content": f"A: Let's think step by step. The answer is ({'ABCDEFGHIJ'[i]}).",
            }
            for i in range(ITEMS)
        ]
        write_rows(folder / f"mmlu_pro/{split}.jsonl", rows)
    instructions = ["punctuation:no_comma", "detectable_format:title"]
    rows = [
        {"key": i, "prompt": f"item {i}", "instruction_id_list": instructions, "kwargs": [{"relation": None}] * 2}
        for i in range(ITEMS)
    ]
    write_rows(folder / "ifeval/train.jsonl", rows)
    (folder / "nltk_data/tokenizers/punkt_tab/english").mkdir(parents=True)  # none of these instructions reads it
    rows = [
        {"task_id": i, "text": f"item {i}", "code": "", "test_list": [f"assert f({k}) == {k + i}" for k in range(3)]}
        for i in range(ITEMS)
    ]
    write_rows(folder / "mbpp/test.jsonl", rows)
    rows = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def g{i}(x):\n    """item {i}"""\n',
            "test": f"def check(candidate):\n    assert candidate(3) == {3 * i}\n",
            "entry_point": f"g{i}",
        }
        for i in range(ITEMS)
    ]
    write_rows(folder / "humaneval/test.jsonl", rows)
    wrong = {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
    rows = [{"Question": f"item {i}", "Correct Answer": "right", **wrong} for i in range(ITEMS)]
    write_rows(folder / "gpqa_main/train.jsonl", rows)
    return folder


def evaluate(model: Path, items: Path, output: Path) -> dict[str, Any]:
    suite = output.parent / "five.yaml"
    suite.write_text(yaml.safe_dump({"tasks": TASKS}))
    words = ["evaluate", f"remit={model}", f"--suite={suite}", f"--data={items}", f"--output={output}"]
    assert cli.main([*words, "--allow-code", "--batch-size=4"]) == 0
    return json.loads((output / "results.json").read_text())["remit"]


def test_right_and_wrong_answers_are_told_apart_and_reported(scripted, models, items, tmp_path, monkeypatch):
    import nltk

    results = evaluate(models["first"], items, tmp_path / "evaluation")
    monkeypatch.setattr(nltk.data, "path", [str(items / "nltk_data")])
    assert [entry["task"] for entry in TASKS] == list(results)
    for task, entry in results.items():
        path = tmp_path / "evaluation/samples/remit" / f"{task}.jsonl"
        scores = [json.loads(line)["score"] for line in path.read_text().splitlines()]
        assert scores == [1.0, 0.0] * (ITEMS // 2), task
        assert entry["score"] == 0.5 and entry["items"] == ITEMS and entry["dtype"] == "float32"
    plain = run_plain(
        models["first"], items, tmp_path / "plain", shots={"mmlu_pro_math": 2, "ifeval": 0}, limit=ITEMS,
        batch_size=4, max_gen_toks=16,
    )  # fmt: skip
    for task, logged in plain.items():
        path = tmp_path / "evaluation/samples/remit" / f"{task}.jsonl"
        ours = [json.loads(line) for line in path.read_text().splitlines()]
        logged = sorted((one for one in logged if one["filter"] == results[task]["filter"]), key=lambda x: x["doc_id"])
        for line, one in zip(ours, logged, strict=True):
            assert line["score"] == float(one[results[task]["metric"]])
            assert (line["prompt_hash"], line["response"]) == (one["prompt_hash"], one["resps"][0][0])

    # The report of two runs, of these results and of what `remit analyze` makes of two models.
    runs = [make_run(tmp_path / "ntp"), make_run(tmp_path / "remit", objective={"name": "remit", "epsilon": 0.2})]
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    small = [make_llama(tmp_path / name, seed=i, tokenizer=tokenizer) for i, name in enumerate(("base", "guide"))]
    write_rows(tmp_path / "texts.jsonl", [{"text": "the sum 12+34=46, so that 46-34=12."}, {"text": "7+8=15"}])
    words = ["--student", small[0], "--reference", small[1], "--input", tmp_path / "texts.jsonl"]
    for name in ("heatmap", "kl", "weights"):
        assert cli.main(["analyze", name, *map(str, words), "--output", str(tmp_path / "analysis" / name)]) == 0
    outputs = [word for kind in ("html", "md") for word in ("--output", str(tmp_path / f"report.{kind}"))]
    assert cli.main(["report", *map(str, runs), *outputs]) == 0  # results and parts are found beside the runs
    table = (tmp_path / "report.md").read_text()
    for task, entry in results.items():
        assert task in table and entry["metric"] in table
    page = (tmp_path / "report.html").read_text()
    delta = json.loads((tmp_path / "analysis/heatmap/heatmap.jsonl").read_text().splitlines()[0])["delta"][1]
    assert f"{delta:+.3f}" in page and len(page) < 1_000_000
    for title in ("KL divergence to the reference", "What the reference finds more likely"):
        assert title in page and title in table
