"""Digests that tell whether two tokenizers give plain text the same ids.

Markers, post-processor, decoder and formatting are left out: the base and the instruction-tuned releases of one family
differ in exactly those (``<|im_start|>`` and its like, templates, bos handling) and still give plain text the same ids,
which is all that comparing their scores token by token asks for. Words that were added to a tokenizer (``add_tokens``),
and runs of spaces, are plain text.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers

# What changes the ids of plain text inside a BPE or Unigram model besides vocabulary and merges. Files of different
# versions write the neutral value as null, "" or false, or leave it out.
_FORMER_SWITCHES = (
    "byte_fallback",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "ignore_merges",
    "unk_id",
)
_NEUTRAL = (None, False, "")


def digest_of(backend: tokenizers.Tokenizer, *, dropout: float | None, added_words: bool = True) -> str:
    """SHA-256 (hex) of everything that decides the ids of plain text, as the library understands it: model (type,
    vocabulary, merges and all switches), normalizer, pre-tokenizer, and added tokens that are no markers.

    However a file spells a tokenizer, and whatever it leaves to defaults, the library writes one spelling.

    Args:
        backend: its vocabulary, normalizer and pre-tokenizer count.
        dropout: the one that was saved with the BPE; it is switched off in ``backend``, and transformers would use it.
        added_words: False leaves added tokens out, as digests were before.
    """
    content = json.loads(backend.to_str())
    # A flag that is off, an affix that is empty: as if it was not there.
    model = {name: value for name, value in content["model"].items() if not _is_neutral(value)}
    if dropout:
        model["dropout"] = dropout
    identity = {
        "model": model,
        "normalizer": _steps(content.get("normalizer"), "normalizers"),
        "pre_tokenizer": _steps(content.get("pre_tokenizer"), "pretokenizers"),
    }
    # Whether a token is special says how it is shown; in which text it is looked for, nothing where both are one.
    flags = ("special",) if identity["normalizer"] else ("special", "normalized")
    words = [
        {name: value for name, value in token.items() if name not in flags}
        for token in content["added_tokens"]
        if not _is_marker(token["content"])
    ]
    if words and added_words:
        identity["added_words"] = words
    return _sha256(identity)


def _is_marker(content: str) -> bool:
    """Whether a token is something that no text has by itself: letters between signs, ``<s>``, ``[INST]``,
    ``|||IP_ADDRESS|||``."""
    ends = content[:1] + content[-1:]
    return not any(end.isalnum() or end.isspace() for end in ends) and any(map(str.isalnum, content))


def _is_neutral(value: Any) -> bool:
    return isinstance(value, bool | str | None) and value in _NEUTRAL


def _steps(component: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list of steps, without what only moves offsets."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [step for member in component[members] for step in _steps(member, members)]
    return [{name: value for name, value in component.items() if name != "trim_offsets"}]


def former_digest(path: Path) -> str:
    """The digest of data and score caches made before `digest_of`: of the file as it is spelled.

    It stays accepted beside the new one, for the tokenizer that it was made with.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    identity = {
        "type": model.get("type", "BPE"),
        "vocab": model.get("vocab"),
        "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []],
        "switches": {name: model[name] for name in _FORMER_SWITCHES if not _is_neutral(model.get(name))},
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
    }
    return _sha256(identity)


def _sha256(identity: dict[str, Any]) -> str:
    canonical = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
