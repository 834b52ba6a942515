"""Texts to analyse: JSON lines, cut into tokens, with the piece of text and the class of each token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.runtime.auto_tokenizer import by_transformers
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import parse_json

CLASSES: tuple[str, ...] = ("digits", "operators", "connectives", "code", "words", "punctuation", "space")

# Words that carry an argument from one step to the next.
_CONNECTIVE_WORDS = """
after although and as assume because before but consequently either finally first given hence how however if
instead let meanwhile moreover next not now only or otherwise second similarly since so still suppose than that then
therefore though thus unless until wait when whereas whether which while yet
"""
_CONNECTIVES = frozenset(_CONNECTIVE_WORDS.split())
_CODE_LINE = re.compile(
    r"^\s*(def |class |import |from \S+ import|return\b|#include|(for|while|if|elif|with|try|else)\b.*:\s*$"
    r"|[\w.\[\]]+\s*[-+*/]?=\s*\S)|[;{}]\s*$|^\s*>>>"
)
_CODE_SHARE = 0.4
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OPERATORS = frozenset("+-*/=<>^%×÷·≤≥≠±√∑∫$\\")


@dataclass(frozen=True)
class TokenizedText:
    """One text.

    Attributes:
        ids: token ids, no token added.
        tokens: vocabulary entries, as ``remit logprobs`` writes them.
        pieces: the text cut at its tokens: joined they are the text. A token that ends inside a character has "".
        classes: one of ``CLASSES`` for each token.
        bytes_predicted: UTF-8 bytes of the text behind its first token, which nothing precedes.
    """

    line: int
    ids: list[int]
    tokens: list[str]
    pieces: list[str]
    classes: list[str]
    bytes_predicted: int


def read_texts(path: str, *, text_key: str = "text", max_texts: int | None = None) -> list[tuple[int, str]]:
    """(line number, text) of a JSONL file.

    Raises:
        UserError: no such file, no texts in it, or a line without the key.
    """
    if not Path(path).is_file():
        raise UserError("--input", f"no file {path}", 'a file of lines like {"text": "..."}')
    expected = f'a line like {{"{text_key}": "..."}}'

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = [value for name, value in pairs if name == text_key]
        if any(value != values[0] for value in values):  # readers differ in which they take
            raise ValueError(f"{text_key} {len(values)} times, with different values")
        return dict(pairs)

    texts: list[tuple[int, str]] = []
    with open(path, "rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            if max_texts is not None and len(texts) == max_texts:
                break
            try:
                record = parse_json(raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw, object_pairs_hook=once)
                str(record.get(text_key) if isinstance(record, dict) else "").encode()  # half of a surrogate pair
            except ValueError as error:
                raise UserError(f"{path} line {line}", f"no JSON ({error})", expected) from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                found = f"{text_key} {text!r}" if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{path} line {line}", found, expected)
            texts.append((line, text))
    if not texts:
        raise UserError("--input", f"{path} without a text", 'a file of lines like {"text": "..."}')
    return texts


class TextTokenizer:
    """The tokenizer of a Hugging Face directory, as training reads it: nothing added, nothing cut, nothing random.

    Attributes:
        content: all that it does, to be compared with another's.

    Raises:
        UserError: there is none that transformers loads.
    """

    def __init__(self, directory: Path, *, field: str):
        self._backend, _ = by_transformers(directory, field)
        self._backend.no_truncation()
        self._backend.no_padding()
        model: Any = self._backend.model
        if getattr(model, "dropout", None) is not None:
            model.dropout = None  # or two models would be compared on different tokens
        self.content = (self._backend.to_str(), self._backend.encode_special_tokens)

    def tokenize(self, line: int, text: str) -> TokenizedText:
        """Cuts one text."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        pieces, reached = [], 0
        for _, end in encoding.offsets:
            pieces.append(text[reached : max(end, reached)])
            reached = max(end, reached)
        if pieces:
            pieces[-1] += text[reached:]
        code = looks_like_code(text)
        return TokenizedText(
            line=line,
            ids=encoding.ids,
            tokens=encoding.tokens,
            pieces=pieces,
            classes=[class_of(piece, code=code) for piece in pieces],
            bytes_predicted=len("".join(pieces[1:]).encode()),
        )


def looks_like_code(text: str) -> bool:
    """Whether most of a text is a program: the share of its lines that have the form of a statement."""
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and sum(bool(_CODE_LINE.search(line)) for line in lines) >= _CODE_SHARE * len(lines)


def class_of(piece: str, *, code: bool) -> str:
    """The class of a token by its text; in a program everything but digits and space is code."""
    bare = piece.strip()
    if not bare:
        return "space"
    if any(character.isdigit() for character in bare) and not any(character.isalpha() for character in bare):
        return "digits"
    if code:
        return "code"
    if all(character in _OPERATORS for character in bare):
        return "operators"
    if bare.lower() in _CONNECTIVES:
        return "connectives"
    return "words" if any(character.isalnum() for character in bare) else "punctuation"


def tokenize_all(
    texts: list[tuple[int, str]], tokenizer: TextTokenizer, *, longest: int, max_tokens: int | None, path: str
) -> list[TokenizedText]:
    """Tokens of every text that has something to predict.

    Args:
        longest: positions of the models.
        max_tokens: read the first so many tokens of each text; None refuses a text that is longer than ``longest``.

    Raises:
        UserError: a text is too long, or none has two tokens.
    """
    result = []
    for line, text in texts:
        cut = tokenizer.tokenize(line, text)
        if max_tokens is not None:
            cut = _first(cut, min(max_tokens, longest))
        if len(cut.ids) > longest:
            raise UserError(
                f"{path} line {line}",
                f"{len(cut.ids)} tokens",
                f"at most {longest}, the model's positions (--max-tokens)",
            )
        if len(cut.ids) > 1:
            result.append(cut)
    if not result:
        raise UserError("--input", f"{path} without a text of two tokens", "a text to predict")
    return result


def _first(text: TokenizedText, count: int) -> TokenizedText:
    if len(text.ids) <= count:
        return text
    pieces = text.pieces[:count]
    size = len("".join(pieces[1:]).encode())
    return TokenizedText(text.line, text.ids[:count], text.tokens[:count], pieces, text.classes[:count], size)
