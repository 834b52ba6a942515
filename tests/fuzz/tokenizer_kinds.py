"""Tokenizers as people have them: whole directories of valid files that differ where releases differ.

A model of the library of each kind, tokens that were added in any of the places that such files have, flags, classes,
names for the end of text. Every directory is one that some program could have written, so that what reads it gets
beyond its first check.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

CORPUS = ["hello world " * 9, "the other the other", "12345 Zürich and the end</s>"]
SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<pad>"]
# In a vocabulary already, new, with spaces at their edges, a part of others, and beyond Latin letters.
CONTENTS = (
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<pad>",
    "<x>",
    "[X]",
    "the",
    "he",
    " the",
    "<x> ",
    "Ü",
    "<|im_start|>",
    "3",
)
TEXTS = [
    "Hello, world",
    " the  the\n",
    "a <x> b<x>c  <x>",
    "<|endoftext|>x <|endoftext|> the<|im_start|> he",
    "</s> <s>the [X]\t<pad> 12345 \u00dcr",
    "Zu\u0308rich \u6771\u4eac \U0001f600 ﬁ",
    "theTHE<x >other",
    "",
]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _byte_level(**pre: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=bool(pre)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre:
        split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**pre)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _sentencepiece() -> tokenizers.Tokenizer:
    """As the first two Llamas: one step puts \u2581 before a text and in place of spaces, bytes stand for the rest."""
    names = [
        "<unk>",
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"thewordlyns ,12",
        "th",
        "\u2581th",
    ]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys([*names, "\u2581the"]))}
    merges = [("t", "h"), ("\u2581", "th"), ("\u2581th", "e")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.add_special_tokens(SPECIAL)
    return backend


def _unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), *((name, 0.0) for name in SPECIAL), ("\u2581the", -1.0), ("\u2581", -2.0), ("he", -3.0)]
    pieces += [(letter, -4.0) for letter in "thewordly ,12"]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(SPECIAL)
    return backend


def _word_piece() -> tokenizers.Tokenizer:
    names = ["[UNK]", *SPECIAL, "the", "he", "##llo", "##r", "a", "b", "c", "1", "##2", "##3", "ur"]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(SPECIAL)
    return backend


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": _byte_level,
    "byte level behind a split": lambda: _byte_level(add_prefix_space=False, use_regex=False),
    "sentencepiece": _sentencepiece,
    "unigram": _unigram,
    "word piece": _word_piece,
}
_kept: dict[str, str] = {}


def backend_of(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of its own, of a kind that is trained once."""
    if kind not in _kept:
        _kept[kind] = KINDS[kind]().to_str()
    return tokenizers.Tokenizer.from_str(_kept[kind])


@st.composite
def described_tokens(draw: Any, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A token as tokenizer_config.json describes one; in half of the cases just as the file beside it has it."""
    content = draw(st.sampled_from(CONTENTS))
    if content in known and draw(st.booleans()):
        return known[content]
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    changed = {name: draw(st.booleans()) for name in draw(st.lists(st.sampled_from(FLAGS), max_size=2))}
    return {"content": content} | common | changed


@st.composite
def named(draw: Any, known: dict[str, dict[str, Any]]) -> Any:
    """What stands under eos_token and its like."""
    described = draw(described_tokens(known)) | {"__type": "AddedToken"}  # by which transformers knows it
    return draw(st.sampled_from((described["content"], described["content"], described)))


@st.composite
def directories(draw: Any) -> dict[str, Any]:
    """The content of each file of a directory by name."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    backend = backend_of(kind)
    for _ in range(draw(st.integers(0, 2))):
        token = draw(described_tokens({}))
        backend.add_tokens([tokenizers.AddedToken(**token)])
    if draw(st.booleans()):
        first = draw(st.sampled_from(("<s>", "<|endoftext|>")))
        single = draw(st.sampled_from((f"{first} $A", f"{first} $A </s>", "$A </s>")))
        ids = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>", "<|endoftext|>")]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    if draw(st.integers(0, 3)) == 0:
        backend.enable_truncation(3)
        backend.enable_padding(pad_token="<pad>", length=9)
    content = json.loads(backend.to_str())
    if kind.startswith("byte") and draw(st.integers(0, 5)) == 0:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # as old files have them
    known = {
        token["content"]: {key: value for key, value in token.items() if key != "id"}
        for token in content["added_tokens"]
    }
    numbers = {token["content"]: token["id"] for token in content["added_tokens"]}
    files: dict[str, Any] = {"tokenizer.json": content}
    if draw(st.integers(0, 5)):
        files["tokenizer_config.json"] = draw(_configurations(known, numbers, backend.get_vocab_size()))
    if draw(st.integers(0, 2)) == 0:
        names = draw(st.lists(st.sampled_from(("eos_token", "bos_token", "unk_token", "pad_token")), unique=True))
        files["special_tokens_map.json"] = {name: draw(named(known)) for name in names}
    if draw(st.integers(0, 7)) == 0:
        files["added_tokens.json"] = {draw(st.sampled_from(CONTENTS)): backend.get_vocab_size()}
    if draw(st.booleans()):
        types = ("llama", "olmo2", "smollm3", "youtu", "youtu_llm", "qwen2", "gpt2", "nothing known")
        files["config.json"] = {
            "model_type": draw(st.sampled_from(types)),
            "eos_token_id": draw(st.sampled_from((1, [3, 1]))),
        }
    if draw(st.integers(0, 2)) == 0:
        files["generation_config.json"] = {"eos_token_id": draw(st.sampled_from((0, [2, 1], [])))}
    return files


@st.composite
def _configurations(draw: Any, known: dict[str, Any], numbers: dict[str, int], size: int) -> dict[str, Any]:
    config: dict[str, Any] = {}
    classes = ("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer")
    if draw(st.integers(0, 3)):
        config["tokenizer_class"] = draw(st.sampled_from((*classes[:2], *classes[:2], *classes)))
    for name in ("eos_token", "bos_token", "pad_token", "unk_token", "cls_token"):
        if draw(st.integers(0, 1 if name == "eos_token" else 3)) == 0:
            config[name] = draw(st.one_of(st.none(), named(known), named(known)))
    if draw(st.booleans()):
        decoder: dict[str, Any] = {}
        for content, token in known.items():
            if draw(st.integers(0, 3)):
                decoder[str(numbers[content])] = token
        for _ in range(draw(st.integers(0, 1))):
            decoder[str(draw(st.sampled_from((size, size, size + 3, 4))))] = draw(described_tokens(known))
        config["added_tokens_decoder"] = decoder
    choices: dict[str, tuple[Any, ...]] = {
        "additional_special_tokens": (["<x>"], ["<s>", "</s>"], ["the"], []),
        "extra_special_tokens": (["<x>"], {"image_token": "[X]"}, {}, ["</s>"]),
        "add_bos_token": (True, False),
        "add_eos_token": (True, False),
        "add_prefix_space": (True, False, None),
        "legacy": (True, False),
        "clean_up_tokenization_spaces": (True, False),
        "split_special_tokens": (True, False),
        "do_lower_case": (True, False),
        "model_max_length": (4, 1000000000000000019884624838656),
        "padding_side": ("left",),
        "chat_template": ("{{ messages }}", [{"name": "default", "template": "{{ messages }}"}]),
        "errors": ("replace",),
        "use_default_system_prompt": (False,),
        "max_length": (2,),
        "truncation": (True,),
        "normalizer": (None,),
        "vocab_size": (4,),
        "unk_id": (0,),
        "anything": (1,),
    }
    for name in draw(st.lists(st.sampled_from(sorted(choices)), max_size=4, unique=True)):
        config[name] = draw(st.sampled_from(choices[name]))
    return config


def write_files(directory: Path, files: dict[str, Any]) -> Path:
    """A fresh directory with these files."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory
