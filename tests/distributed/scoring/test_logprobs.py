"""``remit logprobs``: log-probabilities, order and form of its lines on several layouts, and what it refuses."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from remit_megatron.runtime.errors import UserError
from tests.tiny import CHARACTERS, make_llama, make_tokenizer

TEXTS = [
    "1 + 2 = 3",
    "",
    "a",
    "the longest of them all, by far. " * 5,
    "Ω",
    "ab",
    "1 + 2 = 3",
    *(c * 7 for c in CHARACTERS),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, Path]:
    """A model with a vocabulary larger than its tokenizer's, and texts."""
    root = tmp_path_factory.mktemp("logprobs")
    tokenizer = make_tokenizer(root / "tokenizer")
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    (root / "input.jsonl").write_text(lines)
    return {
        "root": root,
        "model": make_llama(root / "model", seed=7, tokenizer=tokenizer, vocab_size=53),
        "input": root / "input.jsonl",
    }


@pytest.fixture(scope="module")
def expected(material) -> list[list[float]]:
    """Log-probabilities of transformers, each text by itself."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(material["model"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(material["model"])
    found = []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.int64)
            if ids.shape[1] < 2:
                found.append([])
                continue
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            found.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


def run_logprobs(words: list[str]) -> None:
    """The command, in a rank process."""
    from remit_megatron.scoring import command

    parser = argparse.ArgumentParser()
    command.add_logprobs_arguments(parser)
    assert command.run_logprobs(parser.parse_args(words)) == 0


def refused(words: list[str]) -> str:
    """The one line that the command ends with."""
    try:
        run_logprobs(words)
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")


def check(path: Path, expected: list[list[float]], tolerance: float = 2e-5) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == len(TEXTS)
    for text, record, wanted in zip(TEXTS, records, expected, strict=True):
        assert record.keys() == {"token_ids", "tokens", "logprobs"}
        assert len(record["token_ids"]) == len(record["tokens"]) == len(record["logprobs"]) == len(text)
        if text and text != "Ω":
            assert "".join(record["tokens"]) == text
        if text:
            assert record["logprobs"][0] is None
        assert record["logprobs"][1:] == pytest.approx(wanted, abs=tolerance)
    assert not [name for name in path.parent.iterdir() if name.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("ranks", "tp", "pp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 1), (4, 2, 2)], ids=lambda value: str(value)
)
def test_equals_transformers(pool, material, expected, ranks, tp, pp):
    output = material["root"] / f"output_{ranks}_{tp}_{pp}.jsonl"
    words = ["--hf", str(material["model"]), "--input", str(material["input"]), "--output", str(output)]
    words += ["--nproc", str(ranks), "--tp", str(tp), "--pp", str(pp), "--batch-tokens", "64"]
    pool.run(run_logprobs, world_size=ranks, words=words)
    check(output, expected)


def test_command_starts_its_own_ranks(material, expected):
    output = material["root"] / "launched.jsonl"
    words = ["--hf", material["model"], "--input", material["input"], "--output", output, "--tp", "2"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "remit_megatron", "logprobs", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check(output, expected)


def model_of(material: dict[str, Path]) -> list[str]:
    return ["--hf", str(material["model"])]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (['{"text": "a"}', '{"text": "a'], "line 2: found no JSON"),
        (['{"text": "a"}', '{"words": "a"}'], "line 2: found text None"),
        (['["a"]'], "line 1: found list"),
        ([json.dumps({"text": "a" * 257})], "line 1: found 257 tokens; expected at most 256"),
    ],
    ids=["json", "field", "object", "long"],
)
def test_bad_lines_are_named_and_nothing_is_written(pool, material, tmp_path, lines, found):
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    words = [*model_of(material), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    (line,) = pool.run(refused, world_size=1, words=words)
    assert found in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_options(pool, material, tmp_path):
    from tests.unit.conversion.test_source import write_hf

    given = ["--input", str(material["input"]), "--output", str(tmp_path / "out.jsonl")]
    bare = write_hf(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    cases: list[tuple[list[str], str]] = [
        (["--checkpoint", str(material["model"]), *given], "or the option --hf"),
        (["--hf", str(tmp_path / "nothing"), *given], "--hf: found no directory"),
        (["--hf", str(bare), *given], "no tokenizer"),
        ([*model_of(material), *given, "--tp", "0"], "--tp: found 0"),
        ([*model_of(material), *given, "--nproc", "3", "--tp", "2"], "--nproc: found 3"),
        ([*model_of(material), "--input", str(tmp_path / "no"), "--output", "out.jsonl"], "--input: found no file"),
        ([*model_of(material), *given[:2], "--output", str(tmp_path / "no" / "out")], "--output: found no directory"),
    ]
    for words, found in cases:
        (line,) = pool.run(refused, world_size=1, words=words)
        assert found in line


def test_layout_must_divide_the_model(pool, material, tmp_path):
    words = [*model_of(material), "--input", str(material["input"]), "--output", str(tmp_path / "out.jsonl")]
    for ranks, option in ((3, "--tp"), (3, "--pp")):
        lines = pool.run(refused, world_size=ranks, words=[*words, option, str(ranks)])
        assert all("parallel_size: found 3" in line for line in lines)


def test_microbatches_hold_every_pair_once():
    from remit_megatron.scoring.logprobs import microbatches

    texts: list[Any] = [list(range(n)) for n in (0, 1, 2, 9, 30, 9, 3)]
    batches = microbatches(texts, batch_tokens=20)
    assert sorted(line for batch in batches for line in batch.lines) == [2, 3, 4, 5, 6]
    for batch in batches:
        assert batch.tokens.numel() <= 20 or len(batch.lines) == 1
        for row, line in enumerate(batch.lines):
            counted = batch.labels[row] != -100
            assert batch.tokens[row][counted].tolist() == texts[line][:-1]
            assert batch.labels[row][counted].tolist() == texts[line][1:]
