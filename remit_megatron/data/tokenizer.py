"""A thin wrapper around a ``tokenizers`` file: text to ids without any added token, and an identity."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from remit_megatron.data.tokenizer_files import (
    CONFIG,
    FILE,
    SPECIAL_TOKENS,
    largest_id,
    open_directory,
    open_file,
    vocabulary_file,
)
from remit_megatron.data.tokenizer_identity import digest_of, former_digest
from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.files import HF_SUBFOLDER, parse_json

# Looked for, in this order, where no configuration file names an end-of-text token.
_WELL_KNOWN_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>")


class Tokenizer:
    """Text to token ids and back. No special token is ever added; a special token that is spelled out in the text is
    recognised as such, as everywhere in the ecosystem.

    A directory is read as transformers' AutoTokenizer reads it (`tokenizer_files`). Nothing is cut, padded or drawn at
    random: truncation, padding and dropout that were saved with the tokenizer are switched off. Pickles whole, so that
    other processes need none of its files.

    Args:
        path: the ``tokenizer.json`` file, or what a directory without one has in its place (`vocabulary_file`).
        directory: where the files are that go with it; None for a bare file, which is taken as it is.
        field: what the path is called in error messages.

    Attributes:
        own_vocab_size: largest token id + 1 of ``path`` itself, without what the other files add.

    Raises:
        UserError: a file cannot be read, or is of a kind that is not supported.
    """

    def __init__(self, path: Path, *, directory: Path | None, field: str = "tokenizer"):
        self.path, self.directory = path, directory
        self._field = field
        if directory is None:
            backend = open_file(path, field)
            self._eos = (None, None, False)
            self.own_vocab_size = largest_id(backend) + 1
        else:
            opened = open_directory(directory, field)
            backend, self.own_vocab_size = opened.backend, opened.vocab_size
            self._eos = (opened.eos_token, opened.eos_file, opened.eos_appended)
        # A file saved by a training script may carry its truncation: documents would silently lose their ends.
        backend.no_truncation()
        backend.no_padding()
        model: Any = backend.model
        self._dropout: float | None = getattr(model, "dropout", None)
        if self._dropout is not None:
            model.dropout = None  # or no two builds of a data set would be the same
        self._backend = backend

    def __getstate__(self) -> dict[str, Any]:
        # The library pickles everything but this switch.
        return self.__dict__ | {"_special_tokens_are_split": self._backend.encode_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        split = state.pop("_special_tokens_are_split")
        self.__dict__.update(state)
        self._backend.encode_special_tokens = split

    @property
    def backend(self) -> Any:
        """The library's object, with the post-processor that is not used here. Not to be changed."""
        return self._backend

    @cached_property
    def vocab_size(self) -> int:
        """Largest token id + 1, added tokens included. The model's embedding may be larger."""
        return largest_id(self._backend) + 1

    @cached_property
    def eod_id(self) -> int:
        """Id of the token that ends a document.

        The ``eos_token`` that transformers finds (tokenizer_config.json, special_tokens_map.json), else
        ``eos_token_id`` in generation_config.json or config.json (the first of several), else a well-known name in the
        vocabulary.

        Raises:
            UserError: there is none; names what was looked for.
        """
        token, file, appended = self._eos
        if token is not None and not appended:
            found = self._backend.token_to_id(token)
            if found is not None:  # a name that a file gives a number need not be a token: the library takes no ""
                return found
        if file is not None and token is not None:  # a default of a class of transformers need not be there
            raise UserError(str(file), f"eos_token {token!r}", f"a token of {self.path.name}")
        searched = []
        for name in (CONFIG, SPECIAL_TOKENS, "generation_config.json", "config.json"):
            if self.directory is None or not (self.directory / name).exists():
                continue
            if name.endswith("config.json") and name != CONFIG:
                found = self._eod_from(self.directory / name)
                if found is not None:
                    return found
            searched.append(name)
        for token in _WELL_KNOWN_EOD:
            found = self._backend.token_to_id(token)
            if found is not None:
                return found
        looked = [f"no eos_token in {', '.join(searched)}"] if searched else []
        looked.append(f"none of {', '.join(_WELL_KNOWN_EOD)} in the vocabulary")
        expected = "an end-of-text token (eos_token in tokenizer_config.json), or --no-eod for data without one"
        raise UserError(self._field, f"{self.path} with {' and '.join(looked)}", expected)

    def _eod_from(self, path: Path) -> int | None:
        try:
            content = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(self._field, f"{path}, which cannot be read ({error})", "a JSON object") from None
        if not isinstance(content, dict):
            raise UserError(str(path), type(content).__name__, "a JSON object")
        token = content.get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found = self._backend.token_to_id(token)
            if found is None:
                raise UserError(str(path), f"eos_token {token!r}", f"a token of {self.path.name}")
            return found
        number = content.get("eos_token_id")
        if isinstance(number, list):
            number = number[0] if number else None
        if number is None:
            return None
        known = type(number) is int and 0 <= number < 2**32 and self._backend.id_to_token(number) is not None
        if not known:
            raise UserError(str(path), f"eos_token_id {number!r}", f"the id of a token of {self.path.name}")
        return number

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens added.

        Raises:
            UserError: the tokenizer has no ids for one of them; the first is shown.
        """
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            if len(texts) != 1:
                return [self.encode_batch([text])[0] for text in texts]
            raise UserError(str(self.path), f"no ids for {show(texts[0])}", "a tokenizer that encodes it") from None

    def encode_each(self, texts: Sequence[str]) -> list[list[int] | None]:
        """As :meth:`encode_batch`; None for a text that the tokenizer has no ids for: a vocabulary of words may have no
        token for others."""
        try:
            return list(self.encode_batch(texts))
        except UserError:
            if len(texts) == 1:
                return [None]
            return [self.encode_each([text])[0] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens spelled out."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token(self, number: int) -> str | None:
        """The token with an id, as the vocabulary spells it; None where there is none."""
        return self._backend.id_to_token(number)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides the ids of plain text; see `digest_of`."""
        return digest_of(self._backend, dropout=self._dropout)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`digest`, and those that data and score caches made with this tokenizer had before."""
        found = [self.digest, digest_of(self._backend, dropout=self._dropout, added_words=False)]
        if self.directory is None or self.path.name == FILE:
            found.append(former_digest(self.path))
        return tuple(dict.fromkeys(found))


def _is_panic(error: BaseException) -> bool:
    """Whether the library gave up in a way that is no Exception: a pattern that looks back over 10 million spaces
    goes beyond what its engine of patterns allows itself."""
    return type(error).__name__ == "PanicException"


def load_tokenizer(path: str | os.PathLike, *, field: str = "tokenizer") -> Tokenizer:
    """Opens the tokenizer of a Hugging Face directory or of a checkpoint (its ``hf`` folder), or a bare tokenizer.json.

    A directory may have a SentencePiece model or vocabulary and merges in place of tokenizer.json.

    Args:
        field: what the path is called in error messages.

    Raises:
        UserError: missing or unreadable.
    """
    location = Path(path)
    if location.is_dir():
        for directory in (location, location / HF_SUBFOLDER):
            if (file := vocabulary_file(directory)) is not None:
                return Tokenizer(file, directory=directory, field=field)
        expected = f"a directory with tokenizer.json, or a checkpoint with {HF_SUBFOLDER}/tokenizer.json"
        raise UserError(field, f"{location} without tokenizer.json", expected)
    if not location.is_file():
        expected = "a Hugging Face directory, a checkpoint or a tokenizer.json file"
        raise UserError(field, f"{location}, which does not exist", expected)
    beside = location.parent if location.name == "tokenizer.json" else None
    return Tokenizer(location, directory=beside, field=field)
