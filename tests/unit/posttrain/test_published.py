"""Published data to lines: made files of the forms that open-instruct reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remit_megatron import cli
from remit_megatron.posttrain.examples import read_examples
from remit_megatron.posttrain.published import convert
from remit_megatron.posttrain.rewards import VerifiedReward
from remit_megatron.runtime.errors import UserError
from tests.posttrain_runs import write_lines


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED, SAID, OTHER = message("user", "2+3?"), message("assistant", "5"), message("assistant", "6")
ARGUMENTS = ("N", "quantifier", "end_phrase", "keyword_list", "word", "forbidden_words", "letter", "i", "first_word")


def constraint(name: str, **given: Any) -> str:
    """As published: all arguments, most of them null."""
    return json.dumps({"func_name": name, **dict.fromkeys(ARGUMENTS), **given})


RECORDS: dict[str, list[dict[str, Any]]] = {
    "sft": [
        {"id": "a_1", "messages": [message("system", "S"), ASKED, SAID], "source": "one"},
        {"id": "a_2", "messages": [ASKED, SAID, ASKED, OTHER], "source": "two"},
    ],
    "dpo": [
        {"id": "p1", "prompt": "2+3?", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER], "source": "x"},
        {"id": "p2", "prompt": "", "chosen": [ASKED, SAID, ASKED, SAID], "rejected": [ASKED, SAID, ASKED, OTHER]},
    ],
    "rlvr": [
        {"messages": [ASKED], "ground_truth": "5", "dataset": "gsm8k", "constraint_type": "", "constraint": ""},
        {"messages": [ASKED], "ground_truth": r"\frac{10}{2}", "dataset": "MATH"},
        {"messages": [ASKED], "ground_truth": constraint("verify_paragraph_count", N=3), "dataset": "ifeval"},
        {"messages": [ASKED, SAID], "ground_truth": ["5"], "dataset": ["gsm8k"]},
    ],
}
LINES = {
    "sft": [{"messages": record["messages"]} for record in RECORDS["sft"]],
    "dpo": [
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]},
        {"prompt": [ASKED, SAID, ASKED], "chosen": [SAID], "rejected": [OTHER]},
    ],
    "rlvr": [
        {"prompt": [ASKED], "answer": "5", "verifier": "gsm8k"},
        {"prompt": [ASKED], "answer": r"\frac{10}{2}", "verifier": "math"},
        {"prompt": [ASKED], "answer": constraint("verify_paragraph_count", N=3), "verifier": "ifeval_old"},
        {"prompt": [ASKED], "answer": "5", "verifier": "gsm8k"},
    ],
}


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "rlvr"])
def test_the_published_forms(stage: str, form: str, tmp_path: Path) -> None:
    """A folder as the hub has it; what comes of it is what a run reads."""
    folder = tmp_path / "published/data"
    folder.mkdir(parents=True)
    records = RECORDS[stage][:3]  # the fourth of rlvr has lists in place of texts, which no table mixes
    (write_parquet if form == "parquet" else write_lines)(folder / f"train-00000-of-00001.{form}", records)
    output = tmp_path / "out" / "lines.jsonl"
    convert([str(tmp_path / "published")], output, stage=stage)
    assert written(output) == LINES[stage][:3]
    examples = read_examples([str(output)], stage=stage, field="data.train")
    assert [example.fields for example in examples] == LINES[stage][:3]
    if stage == "rlvr":
        reward = VerifiedReward(examples, None)
        good = ["It is 5.", r"So $\boxed{5}$", "a\n* * *\nb\n* * *\nc"]
        assert [reward.score(index, text) for index, text in enumerate(good)] == [1.0, 1.0, 1.0]
        assert [reward.score(index, "one") for index in range(3)] == [0.0, 0.0, 0.0]


def test_several_verifiers_in_lists(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", RECORDS["rlvr"])
    convert([str(tmp_path / "in.jsonl")], tmp_path / "out.jsonl", stage="rlvr")
    assert written(tmp_path / "out.jsonl") == LINES["rlvr"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"text": "x"}, "no messages; expected a record with messages"),
    ("sft", {"messages": [message("usr", "x")]}, "role 'usr' in messages"),
    ("sft", {"messages": [message("assistant", "x", tool_calls=[{"a": 1}])]}, "tool_calls in a message"),
    ("dpo", {"chosen": [ASKED, SAID], "rejected": [message("user", "x"), OTHER]}, "of different prompts"),
    ("dpo", {"chosen": [SAID], "rejected": [OTHER]}, "of different prompts"),
    ("dpo", {"chosen": [ASKED, ASKED], "rejected": [ASKED, OTHER]}, "an answer of 'user'"),
    ("rlvr", {"messages": [ASKED], "ground_truth": "x", "dataset": "gsm8k"}, "gsm8k: found answer 'x'"),
    ("rlvr", {"messages": [ASKED], "ground_truth": "", "dataset": "MATH"}, "an empty answer"),
    ("rlvr", {"messages": [ASKED], "ground_truth": "x", "dataset": "code"}, "dataset 'code'; expected a verifier"),
    ("rlvr", {"messages": [ASKED], "ground_truth": "[{'instruction_id': []}]", "dataset": "ifeval"}, "IFEvalG"),
    ("rlvr", {"messages": [ASKED], "ground_truth": ["1", "2"], "dataset": ["gsm8k", "math"]}, "2 values of dataset"),
    (
        "rlvr",
        {"messages": [ASKED], "ground_truth": constraint("verify_paragraph_count"), "dataset": "ifeval"},
        "verify_paragraph_count with arguments none; expected N",
    ),
]


@pytest.mark.parametrize(("stage", "record", "says"), BAD)
def test_records_that_cannot_be_lines(
    stage: str, record: dict[str, Any], says: str, tmp_path: Path, capsys: Any
) -> None:
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(file, [RECORDS[stage][0], record])
    words = ["posttrain", "lines", stage, "--input", str(file), "--output", str(output)]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert f"{file}:2" in error and says in error and error.count("\n") == 1 and not output.exists()
    assert cli.main([*words, "--leave-out"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{output}: 1 lines") and says in said[1] and said[1].startswith("left out: 1 records")
    assert written(output) == LINES[stage][:1]


def test_answers_that_math_verify_cannot_read(tmp_path: Path) -> None:
    """Found here, and not in the midst of a run."""
    write_lines(tmp_path / "in.jsonl", [{"messages": [ASKED], "ground_truth": r"$\text{}$", "dataset": "math"}])
    with pytest.raises(UserError, match="expected an expression that math-verify reads"):
        convert([str(tmp_path / "in.jsonl")], tmp_path / "out.jsonl", stage="rlvr")


def test_files_that_are_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "x"}])
    with pytest.raises(UserError, match=r"a.parquet: found columns text; expected columns messages"):
        convert([str(tmp_path / "a.parquet")], tmp_path / "out.jsonl", stage="sft")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(UserError, match=r"b.parquet: found a file that cannot be read"):
        convert([str(tmp_path / "b.parquet")], tmp_path / "out.jsonl", stage="sft")
    with pytest.raises(UserError, match=r"--output: found .*out.json; expected a file that ends in .jsonl"):
        convert([str(tmp_path / "b.parquet")], tmp_path / "out.json", stage="sft")
    with pytest.raises(UserError, match="remit posttrain lines makes them"):
        read_examples([str(tmp_path / "a.parquet")], stage="sft", field="data.train")
    assert not list(tmp_path.glob("out*"))
