"""`remit evaluate compare` on samples written here, whose verdicts are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remit_megatron import cli
from remit_megatron.evaluation import results
from remit_megatron.evaluation.compare import find_sides, pair
from remit_megatron.evaluation.statistics import compare_paired


def write(folder: Path, model: str, tasks: dict[str, list[dict[str, Any]]], **changes: Any) -> Path:
    """An output of remit evaluate."""
    content = results.read_json(folder / "results.json")
    for task, lines in tasks.items():
        lines = [{"doc_hash": f"{task}{line.get('subtask')}{line['doc_id']}", "response": "", **line} for line in lines]
        results.write_samples(results.samples_path(folder, model, task), lines)
        scores = [score for line in lines for score in line.get("scores", [line["score"]])]
        content.setdefault(model, {})[task] = {
            "score": float(np.mean(scores)), "stderr": 0.0, "metric": "acc", "filter": "none", "shots": 5,
            "items": len(lines), "column": task.upper(), "chat_template": False, "higher_is_better": True, **changes,
        }  # fmt: skip
    results.write_json(folder / "results.json", content)
    return folder


def binary(right: int, of: int) -> list[dict[str, Any]]:
    return [{"doc_id": i, "score": float(i < right)} for i in range(of)]


def run(*words: object, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    code = cli.main(["evaluate", "compare", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_table_and_verdicts(tmp_path, capsys):
    write(tmp_path / "a", "base", {"one": binary(30, 100), "two": binary(50, 100)})
    write(tmp_path / "b", "remit", {"one": binary(45, 100), "two": binary(49, 100)})
    code, text = run(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out", capsys=capsys)
    assert code == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["model", "ONE", "TWO", "mean"]
    assert lines[2:5] == [
        ["base", "30.0", "**50.0**", "40.0"], ["remit", "**45.0**", "49.0", "**47.0**"], ["shots", "5", "5", ""],
    ]  # fmt: skip
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["remit"]
    # 15 gained and none lost: 2 / 2^15; one lost: 1. Holm multiplies the smaller by two.
    assert found["items"]["one"]["p"] == pytest.approx(2 / 2**15)
    assert found["items"]["one"]["p_holm"] == pytest.approx(4 / 2**15)
    assert found["items"]["two"]["p"] == 1
    assert found["items"]["one"]["low"] > 0 > found["items"]["two"]["low"]
    assert found["mean"]["difference"] == pytest.approx(0.07) and found["seeds"] is None
    assert "Whether another seed of the training would say the same" in text


def test_seeds_are_another_question(tmp_path, capsys):
    """Three seeds a side: each item's mean over them for the items, each training's score for the seeds."""
    scores = {"base": (30, 34, 29), "remit": (36, 37, 35)}
    sides = []
    for name, rights in scores.items():
        folders = [write(tmp_path / f"{name}{i}", name, {"one": binary(right, 100)}) for i, right in enumerate(rights)]
        sides.append(f"{name}={','.join(map(str, folders))}")
    code, text = run(*sides, "--output", tmp_path / "out", capsys=capsys)
    assert code == 0 and "trained again" in text and "3 seeds" in text
    import scipy.stats

    found = json.loads((tmp_path / "out" / "compare.json").read_text())["remit"]
    assert found["seeds"]["one"]["p"] == pytest.approx(scipy.stats.ttest_rel(scores["remit"], scores["base"]).pvalue)
    assert found["items"]["one"]["difference"] == pytest.approx(0.05)
    assert found["items"]["one"]["test"].startswith("permutation")
    code, text = run(sides[0], f"remit={tmp_path / 'remit0'}", capsys=capsys)
    assert code == 2 and "3 and 1 seeds" in text


def test_subtasks_and_instructions_are_clusters(tmp_path):
    generator = np.random.default_rng(0)
    for model in ("a", "b"):
        group = [
            {"doc_id": i, "subtask": f"s{s}", "score": float(generator.integers(2))}
            for s in range(12)
            for i in range(5)
        ]
        prompts = []
        for i in range(40):
            given = [float(value) for value in generator.integers(2, size=1 + i % 3)]
            prompts.append({"doc_id": i, "score": float(np.mean(given)), "scores": given})
        write(tmp_path / model, model, {"group": group, "ifeval": prompts, "few": group[:30]})
    sides = find_sides([str(tmp_path / "a"), str(tmp_path / "b")])
    group, ifeval, few = (pair(*sides, task) for task in ("group", "ifeval", "few"))
    assert (group.unit, len(group.a), set(group.weights)) == ("subtasks", 12, {5.0})
    assert (ifeval.unit, len(ifeval.a), ifeval.weights.sum()) == ("prompts", 40, 79.0)
    assert (few.unit, len(few.a)) == ("items", 30), "six subtasks are too few to be resampled"
    for task, pairs in (("group", group), ("ifeval", ifeval)):
        scores = [side.runs[0].tasks[task]["score"] for side in sides]
        assert compare_paired(pairs, resamples=99).difference == pytest.approx(scores[1] - scores[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shots": 0}, "shots: found 0; expected 5"),
        ({"metric": "acc_norm"}, "metric: found acc_norm"),
        ({"chat_template": True}, "chat_template: found True"),
        ({"generation": {"max_gen_toks": 8}}, "generation: found {'max_gen_toks': 8}; expected {'max_gen_toks': 16}"),
    ],
)
def test_other_settings_are_not_compared(change, said, tmp_path, capsys):
    write(tmp_path / "a", "base", {"one": binary(30, 100)}, generation={"max_gen_toks": 16})
    write(tmp_path / "b", "remit", {"one": binary(45, 100)}, **change)
    code, text = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert code == 2 and said in text


def test_other_items_are_not_compared(tmp_path, capsys):
    write(tmp_path / "a", "base", {"one": binary(30, 100)})
    other = [{**line, "doc_hash": f"other {line['doc_id']}"} for line in binary(45, 100)]
    write(tmp_path / "b", "remit", {"one": other})
    code, text = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert code == 2 and "another content" in text
    write(tmp_path / "c", "shorter", {"one": binary(30, 90)})
    code, text = run(tmp_path / "a", tmp_path / "c", capsys=capsys)
    assert code == 2 and "items: found 90; expected 100" in text


def test_other_prompts_are_not_compared(tmp_path, capsys):
    """But through a chat template, which is each model's own."""
    for name in ("a", "b"):
        lines = [{**line, "prompt_hash": name} for line in binary(30, 100)]
        write(tmp_path / name, name, {"one": lines})
        write(tmp_path / f"{name}_chat", name, {"one": lines}, chat_template=True)
    code, text = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert code == 2 and "another prompt" in text
    code, text = run(tmp_path / "a_chat", tmp_path / "b_chat", capsys=capsys)
    assert code == 0 and "precision" not in text


def test_another_precision_is_said(tmp_path, capsys):
    for name, dtype in (("a", "float32"), ("b", "bfloat16")):
        write(tmp_path / name, name, {"one": binary(30, 100)}, dtype=dtype)
    code, text = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert code == 0 and "Not all computed in the same precision: float32, bfloat16." in text


def test_models_of_one_directory_and_one_of_several(tmp_path, capsys):
    for model, right in (("x", 10), ("y", 20), ("z", 30)):
        write(tmp_path / "all", model, {"one": binary(right, 50)})
    code, text = run(tmp_path / "all", capsys=capsys)
    assert code == 0 and "## y against x" in text and "## z against x" in text
    code, text = run(f"{tmp_path / 'all'}:y", f"{tmp_path / 'all'}:z", capsys=capsys)
    assert code == 0 and "## z against y" in text
    code, text = run(tmp_path / "all", f"{tmp_path / 'all'}:z", capsys=capsys)
    assert code == 2 and "3 models in it" in text
    (tmp_path / "file").write_text("")
    code, text = run(tmp_path / "all", "--output", tmp_path / "file", capsys=capsys)
    assert code == 2 and "(a file)" in text
    (tmp_path / "results.json").write_text("{")
    code, text = run(tmp_path, capsys=capsys)
    assert code == 2 and "no JSON" in text
    code, text = run(tmp_path / "all", "--limit", "3", capsys=capsys)
    assert code == 2 and "--limit: found 3" in text
    code, text = run(f"{tmp_path / 'all'}:w", f"{tmp_path / 'all'}:z", capsys=capsys)
    assert code == 2 and "no model w" in text


def test_texts_with_line_ends_of_other_kinds(tmp_path, capsys):
    """JSON lets them stand in a line, and `str.splitlines` cuts there."""
    lines = binary(30, 60)
    lines[3]["response"] = "a\u2028b\u2029c\x85d"
    for name, right in (("a", 30), ("b", 40)):
        write(tmp_path / name, name, {"one": [{**lines[i], **line} for i, line in enumerate(binary(right, 60))]})
    code, text = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert code == 0 and "66.7" in text
    assert results.read_samples(results.samples_path(tmp_path / "a", "a", "one"))[3]["response"].endswith("d")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", {"results": {"arc_easy": {"acc,none": 0.5}}, "configs": {}}),
        ("results.json", {"results": {}, "n-shot": 5}),
        ("results.json", [1]),
        ("details.json", {"a": 1}),
    ],
)
def test_files_of_another_program_are_refused(tmp_path, capsys, name, content):
    write(tmp_path / "b", "remit", {"one": binary(45, 100)})
    write(tmp_path / "a", "base", {"one": binary(45, 100)})
    (tmp_path / "a" / name).write_text(json.dumps(content))
    code, text = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert code == 2 and "a file of another program; expected what remit evaluate wrote" in text
