"""``remit logprobs``: log-probabilities, order and form of its lines on several layouts, and what it refuses."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import zstandard

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


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        (GOOD + b'{"text": "a', 2, "found text that is not JSON"),
        (GOOD + b'{"words": "a"}', 2, "found no field 'text' among 'words'; expected a string in field 'text'\n"),
        (b'["a"]', 1, "found JSON list"),
        (b'"a"', 1, "found JSON str"),
        (b'{"text": 12}', 1, "found int (12) in field 'text'"),
        (b'{"text": null}', 1, "found NoneType"),
        (b'{"text": "a\\ud800b"}', 1, "found half of a surrogate pair at character 1"),
        (GOOD * 2 + b'{"text": "a\xff"}', 3, "found byte 12, which is not UTF-8"),
        (b'{"text": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 1, "found text that is not JSON"),
        (b'{"text": "a", "text": "b"}', 1, "found field 'text' 2 times, with different values"),
        (GOOD + b"\n" + GOOD, 2, "found a blank line"),
        (GOOD + b" \r\n\n" + GOOD, 2, "found a blank line"),
        (json.dumps({"text": "a" * 257}).encode(), 1, "found 257 tokens; expected at most 256"),
    ],
    ids=lambda value: value[6:30] if isinstance(value, str) else None,
)
def test_bad_lines_are_named_and_nothing_is_written(pool, material, tmp_path, content, line, found):
    (tmp_path / "in.jsonl").write_bytes(content + b"\n")
    words = [*model_of(material), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    (message,) = pool.run(refused, world_size=1, words=words)
    assert f"{message}\n".startswith(f"{tmp_path / 'in.jsonl'}:{line}: {found}"), message
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_lines_as_they_come(pool, material, tmp_path):
    """A byte-order mark, CRLF, blank lines at the end; the same from gzip, Zstandard and a file of any other name."""
    content = b'\xef\xbb\xbf{"text": "a b"}\r\n{"text": ""}\r\n{"n": 1, "text": "1 + 2"}\r\n\r\n\n'
    half = content.index(b"\n") + 1
    (tmp_path / "in.txt").write_bytes(content)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "in.jsonl.zst").write_bytes(compress(content[:half]) + compress(content[half:]))
    results = set()
    for source in sorted(tmp_path.iterdir()):
        words = [*model_of(material), "--input", str(source), "--output", str(tmp_path / "out")]
        pool.run(run_logprobs, world_size=1, words=words)
        results.add((tmp_path / "out").read_text())
    (text,) = results
    assert ["".join(json.loads(line)["tokens"]) for line in text.splitlines()] == ["a b", "", "1 + 2"]


def test_a_model_whose_positions_are_a_default(pool, material, tmp_path):
    """config.json may leave out what transformers' class has."""
    model = shutil.copytree(material["model"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["max_position_embeddings"]
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a" * 300}) + "\n")
    words = ["--hf", str(model), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    pool.run(run_logprobs, world_size=1, words=words)
    assert len(json.loads((tmp_path / "out").read_text())["logprobs"]) == 300


def test_a_model_that_gives_no_numbers(pool, material, tmp_path):
    """One NaN in the embedding of "b": the first line that has it is named, on every rank."""
    broken = tmp_path / "broken"
    shutil.copytree(material["model"], broken)
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][2 + CHARACTERS.index("b"), 0] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "cab"}\n{"text": "b"}\n')
    words = ["--hf", str(broken), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    lines = pool.run(refused, world_size=2, words=[*words, "--tp", "2"])
    found = f"a log-probability of nan at token 1 of {tmp_path / 'in.jsonl'}:3"
    assert {line.split(";")[0] for line in lines} == {f"{broken}: found {found}"}
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob(".*"))


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
        ([*model_of(material), *given[:2], "--output", given[1]], "the texts themselves; expected another file"),
        ([*model_of(material), *given[:2], "--output", str(tmp_path)], "(a directory); expected a file"),
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
