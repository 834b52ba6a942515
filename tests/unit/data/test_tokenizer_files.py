"""A directory's tokenizer is the one that transformers loads: the same ids, the same end-of-text token, or one line."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, normalizers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from remit_megatron.data import tokenizer_files
from remit_megatron.data.special_tokens import own_special_tokens, special_tokens
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.models.family import families
from remit_megatron.runtime.errors import UserError
from tests.unit.data.test_tokenizer import make_tokenizer

TEXTS = [
    "the thing, then 12345 <extra> words",
    " the<extra>the <|endoftext|> the",
    "Zürich 東京 \U0001f600\r\n\tthe  <s>",
    "</s> <pad> the [X]",
    "",
]
EXTRA = {
    "content": "<extra>",
    "special": True,
    "normalized": False,
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
}


def general(**values: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"} | values


def sentencepiece_like(directory: Path) -> None:
    """What LlamaTokenizer is made for: Metaspace, byte fallback."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"the ,0123456789xyzwordsng",
        "th",
        "▁th",
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(names))}
    merges = [("t", "h"), ("▁", "th")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))


# What lies beside tokenizer.json, by name of the file; and whether transformers has to be asked.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "nothing": ({}, False),
    "general": ({"tokenizer_config": general()}, False),
    "a model's configuration": ({"config": {"model_type": "llama"}, "tokenizer_config": general()}, False),
    "eos in the map only": (
        {"tokenizer_config": {}, "special_tokens_map": {"eos_token": "<s>"}, "config": {"eos_token_id": 259}},
        False,
    ),
    "the map comes first": (
        {"tokenizer_config": general(), "special_tokens_map": {"eos_token": {"content": "<s>", "lstrip": False}}},
        False,
    ),
    "the map is left aside": (
        {"tokenizer_config": general(added_tokens_decoder={"300": EXTRA}), "special_tokens_map": {"eos_token": "<s>"}},
        True,
    ),
    "added token": ({"tokenizer_config": general(added_tokens_decoder={"260": EXTRA})}, True),
    "added token that is not special": (
        {"tokenizer_config": general(added_tokens_decoder={"260": EXTRA | {"special": False, "normalized": True}})},
        True,
    ),
    "added token that takes spaces": (
        {"tokenizer_config": general(added_tokens_decoder={"260": EXTRA | {"lstrip": True, "rstrip": True}})},
        True,
    ),
    "known token with other flags": (
        {
            "tokenizer_config": general(
                added_tokens_decoder={"259": EXTRA | {"content": "<|endoftext|>", "lstrip": True}}
            )
        },
        True,
    ),
    "known token with its own flags": (
        {"tokenizer_config": general(added_tokens_decoder={"259": EXTRA | {"content": "<|endoftext|>"}})},
        False,
    ),
    "part of the vocabulary": ({"tokenizer_config": general(additional_special_tokens=["the"])}, True),
    "extra special tokens": ({"tokenizer_config": general(extra_special_tokens=["<extra>", "[X]"])}, True),
    "named tokens": ({"tokenizer_config": general(extra_special_tokens={"x_token": "[X]"}, pad_token="<pad>")}, True),
    "added_tokens.json": ({"added_tokens": {"<extra>": 260}}, True),
    "special tokens are split": ({"tokenizer_config": general(split_special_tokens=True)}, True),
    "no effect": (
        {
            "tokenizer_config": general(
                add_bos_token=True, model_max_length=4, clean_up_tokenization_spaces=True, legacy=True, bos_token="<s>"
            )
        },
        False,
    ),
    "GPT-2": ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}}, True),
    "Qwen 2": (
        {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}, "config": {"model_type": "llama"}},
        True,
    ),
    "Llama, byte level": (
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}, "config": {"model_type": "llama"}},
        True,
    ),
    "OLMo 2 with another class": (
        {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}, "config": {"model_type": "olmo2"}},
        True,
    ),
    "class in the model's configuration": (
        {"config": {"model_type": "llama", "tokenizer_class": "Qwen2Tokenizer"}},
        True,
    ),
    "unknown class": ({"tokenizer_config": general(tokenizer_class="OwnTokenizer")}, True),
    "a model with a class of its own": ({"config": {"model_type": "qwen2"}}, True),
}


def write(directory: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def same_as_transformers(directory: Path) -> None:
    expected = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    found = load_tokenizer(directory)
    for opened in (found, pickle.loads(pickle.dumps(found))):
        for text, ids in zip(TEXTS, opened.encode_batch(TEXTS), strict=True):
            assert ids == expected(text, add_special_tokens=False)["input_ids"], text
    assert found.vocab_size == max(expected.get_vocab().values()) + 1
    if expected.eos_token_id is not None:
        assert found.eod_id == expected.eos_token_id


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(tmp_path, monkeypatch, name):
    files, asks = CASES[name]
    asked = []
    real = tokenizer_files._by_transformers
    monkeypatch.setattr(tokenizer_files, "_by_transformers", lambda *args: asked.append(args) or real(*args))
    same_as_transformers(write(make_tokenizer(tmp_path), files))
    assert bool(asked) == asks, "the import of transformers is spared where it would change nothing, and only there"


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("prefix", [None, True, False])
def test_llama_is_built_anew(tmp_path, prefix, legacy):
    sentencepiece_like(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_prefix_space": prefix}
    same_as_transformers(write(tmp_path, {"tokenizer_config": config}))
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the", add_special_tokens=False).ids
    # The file alone would have begun the text with a space, whatever the configuration says.
    assert (load_tokenizer(tmp_path).encode_batch(["the"]) == [own]) == (prefix is not False)


def test_a_default_of_a_class_is_no_end_of_text(tmp_path):
    """GPT2Tokenizer appends <|endoftext|> where there is none; the model's configuration knows better."""
    directory = make_tokenizer(tmp_path, special=("<s>", "<end>"))
    write(directory, {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}, "config": {"eos_token_id": 259}})
    assert load_tokenizer(directory).eod_id == 259
    write(directory, {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<gone>"}})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: found eos_token '<gone>'"):
        _ = load_tokenizer(directory).eod_id


def test_an_end_of_text_that_is_no_text(tmp_path):
    """A file may give "" a number; the library takes no such token, and transformers has no number for it."""
    directory = make_tokenizer(tmp_path / "t")
    content = general(eos_token="", added_tokens_decoder={"0": {"content": "", "special": True}})
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    assert transformers.AutoTokenizer.from_pretrained(directory).eos_token_id is None
    with pytest.raises(UserError, match=r"tokenizer_config\.json: found eos_token ''; expected a token of"):
        _ = load_tokenizer(directory).eod_id


def vocabulary_and_merges(directory: Path) -> None:
    content = json.loads((make_tokenizer(directory, special=("<s>",)) / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    vocabulary = content["model"]["vocab"] | {"<|endoftext|>": 258}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    write(directory, {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}})


def sentencepiece_model(directory: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS[:2], "the words then the extra words"] * 20),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(directory, {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", **names}})


@pytest.mark.parametrize("model_type", [None, "llama"])
@pytest.mark.parametrize("make", [vocabulary_and_merges, sentencepiece_model])
def test_a_directory_without_tokenizer_json(tmp_path, make, model_type):
    """As OpenLLaMA has it. What the same tokenizer is with one is the same to data and caches."""
    make(tmp_path)
    if model_type:
        write(tmp_path, {"config": {"model_type": model_type}})
    same_as_transformers(tmp_path)
    found = load_tokenizer(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").exists() and found.digests == (found.digest,)
    assert again.digest == found.digest and again.eod_id == found.eod_id
    assert found.own_vocab_size == (259 if make is vocabulary_and_merges else 310)
    assert own_special_tokens(found) == special_tokens(found)


def own_code(directory: Path) -> None:
    (directory / "own.py").write_text("raise RuntimeError('code from a directory was run')\n")
    auto_map = {"AutoTokenizer": ["own.Slow", "own.Fast"]}
    write(directory, {"tokenizer_config": {"tokenizer_class": "OwnTokenizer", "auto_map": auto_map}})


def wrong_flags(directory: Path) -> None:
    write(directory, {"tokenizer_config": general(added_tokens_decoder={"260": {"content": "<x>", "lstrip": "left"}})})


def not_an_object(directory: Path) -> None:
    write(directory, {"tokenizer_config": []})


def not_json(directory: Path) -> None:
    (directory / "special_tokens_map.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (own_code, "which AutoTokenizer does not load (ValueError"),
        (wrong_flags, "which AutoTokenizer does not load (TypeError"),
        (
            lambda directory: write(directory, {"tokenizer_config": general(added_tokens_decoder=[1])}),
            "of another kind",
        ),
        (
            lambda directory: write(directory, {"tokenizer_config": {"tokenizer_class": "ByT5Tokenizer"}}),
            "loads as",
        ),
        (not_an_object, "which holds a list"),
        (not_json, "cannot be read"),
    ],
    ids=["code", "flags", "decoder", "python", "list", "broken"],
)
def test_what_transformers_does_not_load_is_refused(tmp_path, change: Callable[[Path], object], found):
    change(make_tokenizer(tmp_path))
    with pytest.raises(UserError) as refused:
        load_tokenizer(tmp_path, field="--tokenizer")
    assert found in str(refused.value) and str(refused.value).startswith("--tokenizer: found")
    assert "\n" not in str(refused.value)


def test_dropout_is_off(tmp_path):
    directory = make_tokenizer(tmp_path)
    expected = load_tokenizer(directory).encode_batch(["the " * 50])
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (directory / "tokenizer.json").write_text(json.dumps(content))
    for files in (
        {},
        {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}},
        {"tokenizer_config": general(pad_token="<p>")},
    ):
        opened = load_tokenizer(write(directory, files))
        assert (
            opened.encode_batch(["the " * 50])
            == expected
            == pickle.loads(pickle.dumps(opened)).encode_batch(["the " * 50])
        )


def test_our_families_have_the_general_class():
    ours = {name for family in families().values() for name in family.model_types}
    assert ours == set(tokenizer_files.GENERAL_MODELS) - {None}
    assert {TOKENIZER_MAPPING_NAMES.get(name) for name in ours} <= {None, "TokenizersBackend"}


def test_plain_tokenizers_cost_no_import(tmp_path):
    write(make_tokenizer(tmp_path), {"tokenizer_config": general(), "config": {"model_type": "llama"}})
    code = (
        "import sys; from remit_megatron.data.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]).digest;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
