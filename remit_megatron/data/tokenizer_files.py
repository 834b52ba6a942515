"""The tokenizer that transformers' ``AutoTokenizer`` makes of a directory, as an object of the ``tokenizers`` library.

``tokenizer.json`` alone does not say it. tokenizer_config.json and special_tokens_map.json bring further tokens, and
``tokenizer_class`` may name a class that takes vocabulary and merges only and builds the rest anew (transformers 5:
LlamaTokenizer, GPT2Tokenizer, Qwen2Tokenizer). So transformers itself is asked, without a network and without code from
the directory; that costs its import, about 3 s. It is spared where it is plain that nothing but ``tokenizer.json`` is
used: the general class, and no token that the file does not have. A directory without that file, with a SentencePiece
model or vocabulary and merges, is transformers' to read as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from remit_megatron.runtime.auto_tokenizer import by_transformers as _by_transformers
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import parse_json

FILE, CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
# What transformers makes a tokenizer of where there is no tokenizer.json, of those that travel with a model.
_OTHER_FILES = ("tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")
# Classes that load tokenizer.json as it is, and models for which transformers has no other (a test compares).
_GENERAL_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
GENERAL_MODELS = (None, "llama", "olmo2", "smollm3", "youtu", "youtu_llm")
# Settings of the general class that change no id.
_WITHOUT_EFFECT = frozenset(
    (
        "added_tokens_decoder", "additional_special_tokens", "add_bos_token", "add_eos_token", "backend",
        "chat_template", "clean_up_tokenization_spaces", "errors", "extra_special_tokens", "is_local", "legacy",
        "max_length", "model_input_names", "model_max_length", "name_or_path", "pad_to_multiple_of",
        "pad_token_type_id", "padding_side", "processor_class", "sp_model_kwargs", "spaces_between_special_tokens",
        "special_tokens_map_file", "stride", "tokenizer_class", "truncation_side", "truncation_strategy",
        "use_default_system_prompt", "local_files_only",
    )
)  # fmt: skip
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class OpenedTokenizer:
    """What a directory's files make.

    Attributes:
        backend: as transformers would hold it.
        eos_token: as transformers would have it; None where there is none.
        eos_file: the file that names it; None where a class does by default.
        eos_appended: no file gives it an id, so that transformers appends it to the vocabulary.
        vocab_size: largest id + 1 of ``tokenizer.json`` itself; without one, of the vocabulary.
    """

    backend: tokenizers.Tokenizer
    eos_token: str | None
    eos_file: Path | None
    eos_appended: bool
    vocab_size: int


def vocabulary_file(directory: Path) -> Path | None:
    """The file of a directory that a tokenizer is made of: ``tokenizer.json`` first; None where there is none."""
    return next((directory / name for name in (FILE, *_OTHER_FILES) if (directory / name).is_file()), None)


def open_file(path: Path, field: str) -> tokenizers.Tokenizer:
    """A ``tokenizer.json`` as it is.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and its panics are no Exception at all
        expected = "a tokenizer.json of the tokenizers library"
        raise UserError(field, f"{path}, which cannot be read ({error})", expected) from None


def open_directory(directory: Path, field: str) -> OpenedTokenizer:
    """The tokenizer of a directory with a `vocabulary_file`.

    Raises:
        UserError: a file cannot be read, or transformers does not load the directory, or not with this library.
    """
    own = open_file(directory / FILE, field) if (directory / FILE).is_file() else None
    config, mapped = _json(directory / CONFIG, field), _json(directory / SPECIAL_TOKENS, field)
    if not isinstance(config.get("added_tokens_decoder", {}), dict):
        raise UserError(field, f"{directory / CONFIG} with added_tokens_decoder of another kind", "a JSON object")
    if "added_tokens_decoder" in config:  # transformers then leaves the map aside
        mapped = {}
    eos_token, eos_file = None, None
    for content, name in ((mapped, SPECIAL_TOKENS), (config, CONFIG)):
        if "eos_token" in content:
            eos_token, eos_file = _text(content["eos_token"]), directory / name
            break
    if own is not None and _is_plain(own, config, mapped, directory, field):
        backend = own
    else:
        backend, eos_token = _by_transformers(directory, field)
    # Without tokenizer.json, what was appended to the vocabulary is among the added tokens.
    vocabulary = backend.get_vocab(with_added_tokens=False) if own is None else own.get_vocab(with_added_tokens=True)
    numbered = set(vocabulary) | set(_json(directory / ADDED_TOKENS, field))
    numbered |= {_text(token) for token in config.get("added_tokens_decoder", {}).values()}
    return OpenedTokenizer(
        backend=backend,
        eos_token=eos_token,
        eos_file=eos_file,
        eos_appended=eos_token is not None and eos_token not in numbered,
        vocab_size=max(vocabulary.values(), default=-1) + 1,
    )


def largest_id(backend: tokenizers.Tokenizer) -> int:
    """Of the vocabulary with added tokens."""
    return max(backend.get_vocab(with_added_tokens=True).values())


def _json(path: Path, field: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(field, f"{path}, which cannot be read ({error})", "a JSON object") from None
    if not isinstance(content, dict):
        raise UserError(field, f"{path}, which holds a {type(content).__name__}", "a JSON object")
    return content


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_plain(
    backend: tokenizers.Tokenizer, config: dict[str, Any], mapped: dict[str, Any], directory: Path, field: str
) -> bool:
    """Whether ``backend``, the file alone, is what transformers would load."""
    model = _json(directory / "config.json", field)
    classes = (config.get("tokenizer_class"), model.get("tokenizer_class"))
    if any(name not in _GENERAL_CLASSES for name in classes) or model.get("model_type") not in GENERAL_MODELS:
        return False
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    named = list(_named_tokens(config | mapped))
    if any(_text(token) not in known for token in named) or (directory / ADDED_TOKENS).exists():
        return False
    settings = {name for name, value in config.items() if value and not name.endswith("_token")}
    if not settings <= _WITHOUT_EFFECT:
        return False
    return all(_is_same(token, known) for token in config.get("added_tokens_decoder", {}).values())


def _named_tokens(content: dict[str, Any]) -> Iterator[Any]:
    for name, value in content.items():
        if name.endswith("_token") and not isinstance(value, bool | None):
            yield value
        elif name in ("extra_special_tokens", "additional_special_tokens") and value:
            yield from value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]


def _is_same(described: Any, known: dict[str, tokenizers.AddedToken]) -> bool:
    """Whether a token is described with the very flags that the file gives it."""
    token = known.get(_text(described) or "") if isinstance(described, dict) else None
    return token is not None and all(described.get(flag) == getattr(token, flag) for flag in _FLAGS)
