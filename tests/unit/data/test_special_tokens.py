"""``--add-special-tokens``: the ids that AutoTokenizer gives by default, and a line where they are not asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from remit_megatron.cli import main
from remit_megatron.data.build import build_dataset
from remit_megatron.data.indexed import IndexedTokens
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.mix import mix
from remit_megatron.data.recipe import load_recipe
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.runtime.errors import UserError

TEXTS = ["a", " leading and trailing ", "two\nlines", "<s> spelled out</s>", "wörter 日本", "x" * 3000]
BEGIN, END = 256, 257
TEMPLATES = {
    "begin": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)]),
    "both": processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]),
    "twice": processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", BEGIN)]),
    "bert": processors.BertProcessing(("</s>", END), ("<s>", BEGIN)),
    "sequence": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)]),
        ]
    ),
    "byte_level": processors.ByteLevel(trim_offsets=False),
    "none": None,
}
ADDED = {
    "begin": ((BEGIN,), ()),
    "both": ((BEGIN,), (END,)),
    "twice": ((BEGIN, BEGIN), ()),
    "bert": ((BEGIN,), (END,)),
    "sequence": ((BEGIN,), ()),
    "byte_level": None,
    "none": None,
}


def make(folder: Path, kind: str, **configuration: object) -> Path:
    """Every byte a token, ``<s>`` and ``</s>``, and a post-processor."""
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if (processor := TEMPLATES[kind]) is not None:
        backend.post_processor = processor
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | configuration
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder


def write_corpus(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def documents(prefix: Path) -> list[list[int]]:
    data = IndexedTokens(prefix)
    return [data.read(number).tolist() for number in range(len(data))]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_ids_are_those_of_transformers(tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = make(tmp_path / "tokenizer", kind)
    corpus = write_corpus(tmp_path / "c.jsonl")
    manifest = build_dataset([corpus], tokenizer, tmp_path / "out", add_special_tokens=True, append_eod=False)
    opened = AutoTokenizer.from_pretrained(tokenizer)
    assert documents(tmp_path / "out") == [opened(text)["input_ids"] for text in TEXTS]
    assert manifest.special_tokens == read_manifest(tmp_path / "out", verify=True).special_tokens == ADDED[kind]
    # As Megatron's preprocess_data with --append-eod: the end of document comes behind all that.
    build_dataset([corpus], tokenizer, tmp_path / "ended", add_special_tokens=True)
    assert documents(tmp_path / "ended") == [[*opened(text)["input_ids"], END] for text in TEXTS]
    plain = build_dataset([corpus], tokenizer, tmp_path / "plain", append_eod=False)
    assert documents(tmp_path / "plain") == [opened(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert plain.special_tokens is None and "special_tokens" not in (tmp_path / "plain.json").read_text()


@pytest.mark.parametrize("keys", [{"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}], ids=str)
@pytest.mark.parametrize("kind", ["begin", "none"])
def test_what_the_configuration_says_counts_as_it_does_there(tmp_path, kind, keys):
    from transformers import AutoTokenizer

    tokenizer = make(tmp_path / "tokenizer", kind, **keys)
    build_dataset([write_corpus(tmp_path / "c.jsonl")], tokenizer, tmp_path / "out", add_special_tokens=True)
    opened = AutoTokenizer.from_pretrained(tokenizer)
    assert documents(tmp_path / "out") == [[*opened(text)["input_ids"], END] for text in TEXTS]


def test_a_bare_file_and_several_workers(tmp_path):
    tokenizer = make(tmp_path / "tokenizer", "both") / "tokenizer.json"
    bare = tmp_path / "bare.json"
    bare.write_bytes(tokenizer.read_bytes())
    corpus = write_corpus(tmp_path / "c.jsonl")
    for number, path in enumerate((tokenizer, bare)):
        build_dataset([corpus], path, tmp_path / f"out{number}", add_special_tokens=True, workers=1 + number)
    assert documents(tmp_path / "out0") == documents(tmp_path / "out1")
    assert all(ids[0] == BEGIN and ids[-2:] == [END, END] for ids in documents(tmp_path / "out1"))


@pytest.mark.parametrize(
    ("kind", "words", "line"),
    [
        ("begin", [], "<s> before each text is not added, which transformers and Megatron's preprocess_data do"),
        ("both", [], "<s> before each text and </s> after each text is not added"),
        ("none", [], None),
        ("byte_level", [], None),
        ("begin", ["--add-special-tokens"], None),
        ("none", ["--add-special-tokens"], "--add-special-tokens adds nothing"),
        ("both", ["--add-special-tokens"], "each document ends in two of </s>"),
        ("both", ["--add-special-tokens", "--no-eod"], None),
    ],
)
def test_one_line_where_it_matters(tmp_path, caplog, kind, words, line):
    tokenizer = make(tmp_path / "tokenizer", kind)
    given = ["--input", str(write_corpus(tmp_path / "c.jsonl")), "--tokenizer", str(tokenizer), "--workers", "1"]
    assert main(["data", "build", *given, "--output", str(tmp_path / "out"), *words]) == 0
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("remit_megatron")]
    lines = [found for found in lines if "their texts spell one" not in found]  # of the texts, not of the tokenizer
    assert len(lines) == (line is not None) and all(found.startswith(str(line)) for found in lines), lines


@pytest.mark.parametrize(
    ("name", "line"), [("RobertaTokenizer", "<s> before each text and </s> after each text"), ("GPT2Tokenizer", None)]
)
def test_a_class_that_adds_tokens_by_itself(tmp_path, caplog, name, line):
    """Nothing in tokenizer.json says so: transformers makes the post-processor of the class."""
    from transformers import AutoTokenizer

    words = dict.fromkeys(("unk_token", "cls_token"), "<s>") | dict.fromkeys(("pad_token", "sep_token"), "</s>")
    tokenizer = make(tmp_path / "tokenizer", "none", tokenizer_class=name, mask_token="a", **words)
    corpus = write_corpus(tmp_path / "c.jsonl")
    build_dataset([corpus], tokenizer, tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if "is not added, which transformers" in record.message]
    assert [found.split(" is not added")[0] for found in said] == ([] if line is None else [line])
    opened = AutoTokenizer.from_pretrained(tokenizer)
    build_dataset([corpus], tokenizer, tmp_path / "with", add_special_tokens=True, append_eod=False)
    assert documents(tmp_path / "with") == [opened(text)["input_ids"] for text in TEXTS]


def test_a_mix_is_of_one_kind(tmp_path, caplog):
    """Said once for all sources; what was built the other way is built again only when asked."""
    tokenizer = make(tmp_path / "tokenizer", "begin")
    for name in ("a", "b"):
        write_corpus(tmp_path / f"{name}.jsonl").open("a").write(json.dumps({"text": name}) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        "sources:\n- {name: a, weight: 1, files: a.jsonl}\n- {name: b, weight: 1, files: b.jsonl}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    options = {"tokenizer": str(tokenizer), "root": str(tmp_path), "output": str(tmp_path / "out")}
    mix(recipe, **options)
    assert sum("is not added" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(UserError, match=r"texts without --add-special-tokens; expected .*--overwrite builds it again"):
        mix(recipe, **options, add_special_tokens=True)
    mix(recipe, **options, add_special_tokens=True, overwrite=True)
    assert all(ids[0] == BEGIN for name in ("a", "b") for ids in documents(tmp_path / "out" / name))
    mix(recipe, **options, add_special_tokens=True)
    with pytest.raises(UserError, match=r"texts with \(\(256,\), \(\)\) around them"):
        mix(recipe, **options)


def test_a_vocabulary_of_words_without_a_token_for_others(tmp_path):
    """The library raises a bare Exception: the record is bad, and a sample text of our own is passed over."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"x": 0, "y": 1, "<end>": 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<end>"])
    (tmp_path / "t").mkdir()
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    opened = load_tokenizer(tmp_path / "t")
    assert opened.encode_each(["xyx", "yay", "y"]) == [[0, 1, 0], None, [1]]
    with pytest.raises(UserError, match=r"no ids for 'yay'; expected a tokenizer that encodes it"):
        opened.encode_batch(["xyx", "yay"])
    (tmp_path / "a.jsonl").write_text('{"text": "xyx"}\n{"text": "yay"}\n{"text": "y"}\n')
    build = {"tokenizer": str(tmp_path / "t"), "output": str(tmp_path / "a")}
    with pytest.raises(UserError, match=r"a.jsonl:2: found text that the tokenizer has no ids for"):
        build_dataset([str(tmp_path / "a.jsonl")], **build)
    build_dataset([str(tmp_path / "a.jsonl")], **build, on_error="skip")
    assert documents(tmp_path / "a") == [[0, 1, 0, 2], [1, 2]]


@pytest.mark.parametrize("number", [300, 70000])
def test_a_post_processor_with_numbers_of_its_own(tmp_path, number):
    """Tokens that no vocabulary has, and above 65,535 no file of 16-bit tokens."""
    folder = make(tmp_path / "tokenizer", "begin")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [number]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(
        UserError, match=rf"--add-special-tokens: found .* that adds token {number}, which its vocabulary"
    ):
        build_dataset([tmp_path / "a.jsonl"], folder, tmp_path / "out", add_special_tokens=True)


def test_a_vocabulary_of_words_of_its_own(tmp_path, caplog):
    """None of our sample texts gives a token: one of its own words tells what is put around a text."""
    backend = tokenizers.Tokenizer(models.WordLevel({"yay": 0, "nay": 1, "[CLS]": 2, "</s>": 3}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[CLS]", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "nay yay"}\n')
    build_dataset([tmp_path / "a.jsonl"], tmp_path, tmp_path / "a")
    assert "[CLS] before each text is not added" in caplog.text and documents(tmp_path / "a") == [[1, 0, 3]]
    build_dataset([tmp_path / "a.jsonl"], tmp_path, tmp_path / "b", add_special_tokens=True)
    assert documents(tmp_path / "b") == [[2, 1, 0, 3]]


def test_a_post_processor_that_cannot_be_repeated_is_said(tmp_path, caplog):
    folder = make(tmp_path / "tokenizer", "begin")
    content = json.loads((folder / "tokenizer.json").read_text())
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"]["single"] = [text, content["post_processor"]["single"][0], text]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    build_dataset([tmp_path / "a.jsonl"], folder, tmp_path / "out")
    assert "which changes a text's own tokens, is not applied" in caplog.text
