"""Two tiny models of one family that disagree, and texts for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import make_llama, make_tokenizer

TEXTS = [
    "the sum 12+34=46, so that 46-34=12.",
    "a",  # one token: nothing to predict
    "because 7+8=15, therefore 15 is due?",
    "abc def 0123 " * 6,
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """``student``, ``reference``, ``later`` (a second student), ``other`` (another tokenizer), ``texts`` (JSONL)."""
    root = tmp_path_factory.mktemp("analysis")
    tokenizer = make_tokenizer(root / "tokenizer")
    found = {
        name: make_llama(root / name, seed=seed, tokenizer=tokenizer, max_position_embeddings=128)
        for seed, name in enumerate(("student", "reference", "later", "other"))
    }
    content = json.loads((found["other"] / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (found["other"] / "tokenizer.json").write_text(json.dumps(content))
    found["texts"] = root / "texts.jsonl"
    found["texts"].write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return found
