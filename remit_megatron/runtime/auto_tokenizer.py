"""The tokenizer that transformers' ``AutoTokenizer`` makes of a directory, as an object of the ``tokenizers`` library.

Whoever reads a directory's texts takes this one, so that a token is the same in training, scores and analysis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from remit_megatron.runtime.errors import UserError

_PROBE = "Zoë's 12,345 words\tand  two\r\n\n  lines: 東京 \U0001f600 x₂ </s><s> <|endoftext|>[UNK] ▁a ñ \u00a0#"


def by_transformers(directory: Path, field: str) -> tuple[tokenizers.Tokenizer, str | None]:
    """Backend and end-of-text token of ``AutoTokenizer``, without a network and without code from the directory.

    Args:
        directory: with the tokenizer's files.
        field: how messages name it.

    Raises:
        UserError: transformers does not load it, or not with the tokenizers library.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        ids = loaded(_PROBE, add_special_tokens=False)["input_ids"]
    except Exception as error:  # whatever its classes make of these files
        reason = " ".join(str(error).split())[:200]
        found = f"{directory}, which AutoTokenizer does not load ({type(error).__name__}: {reason})"
        raise UserError(field, found, "a tokenizer that transformers loads, without code of its own") from None
    finally:
        logging.set_verbosity(verbosity)
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        found = f"{directory}, which transformers loads as {type(loaded).__name__}"
        raise UserError(field, found, "a tokenizer of the tokenizers library")
    backend.encode_special_tokens = bool(loaded.split_special_tokens)
    random = getattr(backend.model, "dropout", None)
    if not random and ids != backend.encode(_PROBE, add_special_tokens=False).ids:
        found = f"{directory}, whose {type(loaded).__name__} changes texts before the tokenizers library sees them"
        raise UserError(field, found, "a tokenizer that is all in that library")
    return backend, loaded.eos_token
