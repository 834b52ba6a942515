"""Token ids that a model has no row for, found before TRL is started: there they are an error of a lookup."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from remit_megatron.posttrain.examples import Example, as_text, for_template
from remit_megatron.runtime.errors import UserError, show


def check_ids(examples: Sequence[Example], tokenizer: Any, *, model: Path, stage: str, template: bool) -> None:
    """Refuses lines, and a padding or end-of-text token, with ids that the model has no row for. Only where the
    tokenizer has more entries than the model rows are the lines read for it.

    Args:
        tokenizer: transformers'.
        model: directory with config.json.
        stage: of the examples.
        template: whether they go through the tokenizer's template.

    Raises:
        UserError: naming line or token, with the id.
    """
    config = json.loads((model / "config.json").read_text())
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(rows, int) or max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    expected = f"below {rows}, the rows of the model's embedding"
    for name in ("pad_token", "eos_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number >= rows:
            raise UserError(f"{name} in {model}", f"{show(getattr(tokenizer, name))} with id {number}", expected)
    for example in examples:
        for text in _texts(example, tokenizer, stage=stage, template=template):
            largest = max(tokenizer(text, add_special_tokens=False)["input_ids"], default=0)
            if largest >= rows:
                raise UserError(example.place, f"ids up to {largest}", expected)


def _texts(example: Example, tokenizer: Any, *, stage: str, template: bool) -> Iterator[str]:
    if not template:
        yield from as_text(example, stage).values()
        return
    fields = for_template(example, stage)
    before = fields.get("prompt", [])
    for name, value in fields.items():
        if isinstance(value, str):
            yield value
        else:
            messages = value if name in ("prompt", "messages") else [*before, *value]
            yield tokenizer.apply_chat_template(messages, tokenize=False)
