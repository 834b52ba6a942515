"""Tokenizer files that somebody edited: ids are those of transformers, or the files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from remit_megatron.data.special_tokens import special_tokens
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.runtime.errors import UserError
from tests.fuzz.damage import REFUSED, altered, damaged, examples, handled
from tests.fuzz.tokenizer_kinds import TEXTS as MORE_TEXTS
from tests.fuzz.tokenizer_kinds import directories, write_files

TEXTS = ["Hello, world", "  a  b\n", "<|endoftext|>x<|im_start|>", "é€\x00", ""]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|endoftext|>",
    "bos_token": None,
    "model_max_length": 1000,
    "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
}


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A byte-level BPE with everything that such files have."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world " * 9, "the other the other"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return json.loads(tokenizer.to_str())


def write(directory: Path, content: Any, config: Any = None) -> Path:
    directory.mkdir(exist_ok=True)
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / "tokenizer.json").write_bytes(text)
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG if config is None else config))
    return directory


def use(directory: Path) -> None:
    """Everything that the product asks of a tokenizer; where transformers loads the files, ids are its."""
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode_batch(TEXTS)
    try:
        theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        if getattr(theirs.backend_tokenizer.model, "dropout", None) is not None:
            theirs.backend_tokenizer.model.dropout = None  # merges skipped at random, which we never do
        expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    except BaseException as error:  # a panic of the library is no Exception
        assert not isinstance(error, KeyboardInterrupt | SystemExit)
    else:
        assert ids == expected
    assert max((max(each, default=-1) for each in ids), default=-1) < tokenizer.vocab_size
    tokenizer.decode(ids[0])
    assert len(tokenizer.digest) == 64
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size


def test_whole(tmp_path, content):
    use(write(tmp_path / "t", content))


def small(content: dict[str, Any]) -> dict[str, Any]:
    """Without most of the vocabulary and its merges, so that alterations fall elsewhere."""
    vocabulary = dict(list(content["model"]["vocab"].items())[:270])
    merges = [pair for pair in content["model"]["merges"] if "".join(pair) in vocabulary]
    return content | {"model": content["model"] | {"vocab": vocabulary, "merges": merges}}


def places(content: dict[str, Any]) -> dict[str, Any]:
    """Everything but the vocabulary, which is put back afterwards."""
    return content | {"model": {name: value for name, value in content["model"].items() if name != "vocab"}}


@examples(200)
@given(data=st.data())
def test_altered_tokenizer(tmp_path, content, data):
    whole = small(content)
    changed = data.draw(altered(places(whole)))
    if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
        changed["model"].setdefault("vocab", whole["model"]["vocab"])
    handled(lambda: use(write(tmp_path / "t", changed)))


@examples(80)
@given(data=st.data())
def test_damaged_tokenizer(tmp_path, content, data):
    original = json.dumps(small(content)).encode()
    handled(lambda: use(write(tmp_path / "t", data.draw(damaged(original)))))


@examples(120)
@given(data=st.data())
def test_altered_configuration(tmp_path, content, data):
    directory = write(tmp_path / "t", content, data.draw(altered(CONFIG)))
    generation = data.draw(altered({"eos_token_id": [0, 1], "bos_token_id": 0}))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    handled(lambda: use(directory))


@examples(150)
@given(files=directories())
def test_valid_directories(tmp_path, files):
    """Ids with and without special tokens, and the end of text, are those of transformers wherever it loads the files,
    and of what it makes of them when it saves them."""
    directory = write_files(tmp_path / "t", files)
    tokenizer = handled(lambda: load_tokenizer(directory))
    try:
        theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception:
        return  # read or refused; `same_as_transformers` of the unit tests has what is known
    assert tokenizer is not REFUSED, "transformers loads it"
    ids = tokenizer.encode_batch(MORE_TEXTS)
    assert ids == [theirs(text, add_special_tokens=False)["input_ids"] for text in MORE_TEXTS]
    around = handled(lambda: special_tokens(tokenizer))
    if around is not REFUSED:
        whole = [[*around.before, *each, *around.after] for each in ids]
        assert whole == [theirs(text, add_special_tokens=True)["input_ids"] for text in MORE_TEXTS]
    if theirs.eos_token is not None:
        try:
            assert tokenizer.eod_id == theirs.eos_token_id
        except UserError:  # one that transformers appends to the vocabulary
            assert theirs.eos_token not in tokenizer._backend.get_vocab() or tokenizer._eos[2]
    theirs.save_pretrained(tmp_path / "saved")
    if (tmp_path / "saved" / "tokenizer.json").exists():
        again = handled(lambda: load_tokenizer(tmp_path / "saved"))
        saved = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)  # which may not be the same
        expected = [saved(text, add_special_tokens=False)["input_ids"] for text in MORE_TEXTS]
        assert again is REFUSED or again.encode_batch(MORE_TEXTS) == expected
