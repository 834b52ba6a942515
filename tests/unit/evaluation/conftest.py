"""Tiny models and items in the hub's columns, shared by the tests of the room."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """`remit evaluate` sets variables that its libraries read; other tests must not see them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random Llamas with long enough contexts."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    changes: dict[str, Any] = {"num_hidden_layers": 1, "max_position_embeddings": 4096}
    return {
        name: tiny.make_llama(folder / name, seed=seed, tokenizer=tokenizer, **changes)
        for seed, name in enumerate(("first", "second"))
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A split: JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as --data takes it, with a few items of each task."""
    folder = tmp_path_factory.mktemp("data")
    for split, start in (("train", 0), ("test", 100)):
        sums = [
            {"question": f"what is {i} + 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"}
            for i in range(start, start + 8)
        ]
        write_rows(folder / f"gsm8k/{split}.jsonl", sums)
    for name in ("boolean_expressions", "word_sorting"):
        write_rows(
            folder / f"bbh/{name}/test.jsonl", [{"input": f"not {i}", "target": str(i % 2 == 0)} for i in range(6)]
        )
    problem = [{"problem": f"{i} + 1", "solution": f"\\boxed{{{i + 1}}}", "level": "1", "type": "t"} for i in range(6)]
    write_rows(folder / "minerva_math/counting_and_probability/test.jsonl", problem)
    for name in ("ARC-Challenge", "ARC-Easy"):
        for split, start in (("train", 0), ("test", 40)):
            rows = [
                {
                    "id": f"q{i}",
                    "question": f"which one is {i}?",
                    "choices": {"text": [str(i + k) for k in range(4)], "label": list("ABCD")},
                    "answerKey": "ABCD"[i % 4],
                }
                for i in range(start, start + 9)
            ]
            write_rows(folder / f"ai2_arc/{name}/{split}.jsonl", rows)
    endings = [["a", "b cd", "ef", "ghi"] for _ in range(6)]
    rows = [
        {
            "ind": i,
            "activity_label": "run",
            "ctx_a": "she",
            "ctx_b": f"runs {i}",
            "endings": choices,
            "label": str(i % 4),
        }
        for i, choices in enumerate(endings)
    ]
    write_rows(folder / "hellaswag/validation.jsonl", rows)
    for split, start in (("train", 0), ("validation", 20)):
        rows = [
            {
                "question": f"is it {i}",
                "choices": {"label": list("ABCDE"), "text": list("vwxyz")},
                "answerKey": "ABCDE"[i % 5],
            }
            for i in range(start, start + 8)
        ]
        write_rows(folder / f"commonsense_qa/{split}.jsonl", rows)
    return folder
