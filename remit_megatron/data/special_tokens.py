"""The tokens that a tokenizer puts around a text where special tokens are asked for: begin of text, mostly.

They come from the post-processor. `transformers` adds them unless told otherwise, and so does Megatron's
``preprocess_data.py`` with a Hugging Face tokenizer; here they are added with ``--add-special-tokens`` only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from remit_megatron.data.tokenizer import Tokenizer
from remit_megatron.runtime.errors import UserError

_WORDS_TRIED = 100
_SAMPLES = ("a", "0", "the", " a")  # a text that gives tokens in any tokenizer


class SpecialTokens(NamedTuple):
    """Ids that come before and after a text; both may be empty."""

    before: tuple[int, ...]
    after: tuple[int, ...]


NOTHING = SpecialTokens((), ())


def own_special_tokens(tokenizer: Tokenizer) -> SpecialTokens | None:
    """What its post-processor adds, that of ``tokenizer.json`` or of the class that transformers makes of it; None for
    one that does something else than adding tokens."""
    return _added(tokenizer.backend)


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """What ``AutoTokenizer`` of `transformers` adds with ``add_special_tokens=True``: it may build the post-processor
    anew from the configuration beside the file. Of a bare file, what that file adds.

    Raises:
        UserError: the post-processor does something else than adding tokens; or `transformers` cannot open a tokenizer
            that has a configuration.
    """
    folder = tokenizer.path.parent
    configured = any((folder / name).exists() for name in ("tokenizer_config.json", "config.json"))
    added = own_special_tokens(tokenizer)
    if configured and tokenizer.path.name == "tokenizer.json":
        from transformers import AutoTokenizer

        try:
            opened: Any = AutoTokenizer.from_pretrained(
                os.fspath(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # of any kind, from any tokenizer's own code
            found = f"{folder}, which transformers cannot open ({next(iter(str(error).splitlines()), '')})"
            raise UserError("--add-special-tokens", found, "a tokenizer whose special tokens it can tell") from None
        added = _added(opened.backend_tokenizer)
    if added is None:
        found = f"{tokenizer.path} with a post-processor that changes the text's own tokens"
        raise UserError("--add-special-tokens", found, "one that adds tokens before and after")
    for number in (*added.before, *added.after):
        if tokenizer.token(number) is None:  # the post-processor has numbers of its own
            found = f"{tokenizer.path} with a post-processor that adds token {number}, which its vocabulary lacks"
            raise UserError("--add-special-tokens", found, "one that adds tokens of the vocabulary")
    return added


def notice(tokenizer: Tokenizer, around: SpecialTokens | None, eod_id: int | None) -> str | None:
    """A line for a build whose documents are not what other tools make of the same texts, or not what was meant.

    Args:
        around: what is put around each text; None where nothing was asked for.
        eod_id: what is appended to each document.
    """
    if around is None:
        own = own_special_tokens(tokenizer)
        does = "which transformers and Megatron's preprocess_data do"
        if own is None:
            return f"the post-processor of {tokenizer.path}, which changes a text's own tokens, is not applied, {does}"
        if not any(own):
            return None
        return f"{_described(own, tokenizer)} is not added, {does}; --add-special-tokens adds it"
    if not any(around):
        return "--add-special-tokens adds nothing: this tokenizer puts no tokens around a text"
    if eod_id is not None and around.after[-1:] == (eod_id,):
        twice = f"each document ends in two of {tokenizer.decode([eod_id])}"
        return f"{twice}: the tokenizer adds one and the build appends one; --no-eod leaves the first"
    return None


def _described(added: SpecialTokens, tokenizer: Tokenizer) -> str:
    sides = ((added.before, "before"), (added.after, "after"))
    return " and ".join(f"{tokenizer.decode(ids)} {side} each text" for ids, side in sides if ids)


def _samples(backend: Any) -> Iterator[str]:
    """Texts of which one should give tokens: a vocabulary of words may have none for the first ones."""
    yield from _SAMPLES
    yield from islice(backend.get_vocab(with_added_tokens=False), _WORDS_TRIED)


def _added(backend: Any) -> SpecialTokens | None:
    backend.no_truncation()
    backend.no_padding()
    for text in _samples(backend):
        try:
            plain = backend.encode(text, add_special_tokens=False).ids
            encoding = backend.encode(text, add_special_tokens=True)
        except Exception:  # a vocabulary of words without a token for others
            continue
        ids, special = encoding.ids, encoding.special_tokens_mask
        if not plain or 0 not in special:
            continue
        start = special.index(0)
        stop = start + len(plain)
        return SpecialTokens(tuple(ids[:start]), tuple(ids[stop:])) if ids[start:stop] == plain else None
    return None
