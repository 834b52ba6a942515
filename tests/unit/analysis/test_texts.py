"""Texts cut into pieces: nothing lost, classes as documented."""

from __future__ import annotations

import gzip
import json

import pytest

from remit_megatron.analysis.texts import TextTokenizer, class_of, looks_like_code, tokenize_all
from tests.tiny import make_tokenizer

TRICKY = "naïve 你好 👩‍👩‍👧 \t x\n\n  def f(x):\r\n    return 3.14 # ½ "


def real_tokenizer(shared_data, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((shared_data / "dolma2_tokenizer.json").read_bytes())
    return TextTokenizer(tmp_path, field="tokenizer")


def test_pieces_are_the_text(shared_data, tmp_path):
    """With a byte-level tokenizer, whose tokens may end inside a character."""
    cut = real_tokenizer(shared_data, tmp_path).tokenize(1, TRICKY)
    assert "".join(cut.pieces) == TRICKY
    assert len(cut.pieces) == len(cut.ids) == len(cut.tokens) == len(cut.classes)
    assert "" in cut.pieces  # a token inside a character has no piece of its own
    assert cut.bytes_predicted == len(TRICKY.encode()) - len(cut.pieces[0].encode())


def test_truncation_in_the_file_is_not_followed(tmp_path):
    directory = make_tokenizer(tmp_path / "tokenizer")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    cut = TextTokenizer(directory, field="tokenizer").tokenize(1, "abcdef")
    assert len(cut.ids) == 6
    (short,) = tokenize_all([(1, "abcdef")], TextTokenizer(directory, field="t"), longest=9, max_tokens=4, path="f")
    assert (short.pieces, short.bytes_predicted) == (["a", "b", "c", "d"], 3)


@pytest.mark.parametrize(
    ("piece", "code", "kind"),
    [
        (" 42", False, "digits"),
        ("3.5", False, "digits"),
        ("x1", False, "words"),
        (" therefore", False, "connectives"),
        (" Because", False, "connectives"),
        ("becauses", False, "words"),
        (" +", False, "operators"),
        ("<<", False, "operators"),
        (",", False, "punctuation"),
        ("\n\n", True, "space"),
        (" if", False, "connectives"),
        (" if", True, "code"),
        ("42", True, "digits"),
        ("", False, "space"),
    ],
)
def test_classes(piece, code, kind):
    assert class_of(piece, code=code) == kind


def test_code_and_prose_are_told_apart_on_real_data(shared_data):
    with gzip.open(shared_data / "HumanEval.jsonl.gz", "rt") as stream:
        programs = [record["canonical_solution"] for record in map(json.loads, stream)]
    with open(shared_data / "gsm8k_train.jsonl") as stream:
        problems = [json.loads(line)["question"] for line in list(stream)[:300]]
    assert sum(map(looks_like_code, programs)) >= 0.95 * len(programs)
    assert sum(map(looks_like_code, problems)) == 0
