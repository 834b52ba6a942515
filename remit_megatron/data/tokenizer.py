"""A thin wrapper around a ``tokenizers`` file: text to ids without any added token, and an identity."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import HF_SUBFOLDER

# Looked for, in this order, where no configuration file names an end-of-text token.
_WELL_KNOWN_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>")
# What changes the ids of plain text inside a BPE or Unigram model besides vocabulary and merges. Files of different
# versions write the neutral value as null, "" or false, or leave it out.
_MODEL_SWITCHES = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "unk_id")


class Tokenizer:
    """Text to token ids and back. No special token is ever added; a special token that is spelled out in the text is
    recognised as such, as everywhere in the ecosystem.

    Args:
        path: the ``tokenizer.json`` file.
        directory: where the configuration files are that name the end-of-text token; None for a bare file.
        field: what the path is called in error messages.
    """

    def __init__(self, path: Path, *, directory: Path | None, field: str = "tokenizer"):
        self.path = path
        self._directory, self._field = directory, field
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            expected = "a tokenizer.json of the tokenizers library"
            raise UserError(field, f"{path}, which cannot be read ({error})", expected) from None
        # A file saved by a training script may carry its truncation: documents would silently lose their ends.
        self._backend.no_truncation()
        self._backend.no_padding()

    @cached_property
    def vocab_size(self) -> int:
        """Largest token id + 1, added tokens included. The model's embedding may be larger."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def eod_id(self) -> int:
        """Id of the token that ends a document.

        From ``eos_token`` in tokenizer_config.json, else ``eos_token_id`` in generation_config.json or config.json
        (the first of several), else a well-known name in the vocabulary of a bare file.

        Raises:
            UserError: there is none; names what was looked for.
        """
        searched = []
        for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
            if self._directory is None or not (self._directory / name).exists():
                continue
            found = self._eod_from(self._directory / name)
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
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(self._field, f"{path}, which cannot be read ({error})", "a JSON object") from None
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
        if not isinstance(number, int) or self._backend.id_to_token(number) is None:
            raise UserError(str(path), f"eos_token_id {number!r}", f"the id of a token of {self.path.name}")
        return number

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens added."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """What the tokenizer's post-processor would put before a text (a begin token, usually), which `encode_batch`
        leaves out."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a", add_special_tokens=True).ids
        starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
        return tuple(whole[: starts[0]]) if starts else ()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens spelled out."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides the ids of plain text: model (type, vocabulary, merges and
        switches), normalizer and pre-tokenizer.

        Added tokens, post-processor, decoder and formatting are left out: the base and the instruction-tuned releases
        of one family differ in exactly those (chat markers, templates, bos handling) and still give plain text the
        same ids, which is all that comparing their scores token by token asks for.
        """
        content = json.loads(self.path.read_text(encoding="utf-8"))
        model = content["model"]
        identity = {
            "type": model.get("type", "BPE"),
            "vocab": model.get("vocab"),
            "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []],
            "switches": {name: model[name] for name in _MODEL_SWITCHES if _is_set(model.get(name))},
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
        }
        canonical = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != ""


def load_tokenizer(path: str | os.PathLike, *, field: str = "tokenizer") -> Tokenizer:
    """Opens the tokenizer of a Hugging Face directory or of a checkpoint (its ``hf`` folder), or a bare tokenizer.json.

    Args:
        field: what the path is called in error messages.

    Raises:
        UserError: missing or unreadable.
    """
    location = Path(path)
    if location.is_dir():
        for directory in (location, location / HF_SUBFOLDER):
            if (directory / "tokenizer.json").is_file():
                return Tokenizer(directory / "tokenizer.json", directory=directory, field=field)
        expected = f"a directory with tokenizer.json, or a checkpoint with {HF_SUBFOLDER}/tokenizer.json"
        raise UserError(field, f"{location} without tokenizer.json", expected)
    if not location.is_file():
        expected = "a Hugging Face directory, a checkpoint or a tokenizer.json file"
        raise UserError(field, f"{location}, which does not exist", expected)
    beside = location.parent if location.name == "tokenizer.json" else None
    return Tokenizer(location, directory=beside, field=field)
