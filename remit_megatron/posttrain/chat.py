"""The tokenizer of a model, and the chat template that turns messages into its text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remit_megatron.posttrain.configuration import NO_TEMPLATE
from remit_megatron.posttrain.examples import Example, for_template
from remit_megatron.runtime.errors import UserError, show_error
from remit_megatron.runtime.settings_files import first_line, read_text


def load_tokenizer(model: Path, chat_template: str | None) -> Any:
    """The tokenizer of a Hugging Face directory, with the template that the configuration names.

    Args:
        chat_template: None is the tokenizer's own, ``none`` takes it away, else a Jinja file.

    Raises:
        UserError: no tokenizer, no end of text in it, or no such file.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    except Exception as error:  # the libraries raise what they like
        raise UserError("model", f"{model} ({first_line(error)})", "a directory with a tokenizer") from None
    if tokenizer.eos_token is None:
        raise UserError("model", f"{model}, whose tokenizer has no eos_token", "one that says where a text ends")
    if chat_template == NO_TEMPLATE:
        tokenizer.chat_template = None
    elif chat_template is not None:
        try:
            tokenizer.chat_template = read_text(Path(chat_template))
        except UserError as error:
            expected = f"{error.expected}, none for no template, or null for the tokenizer's own"
            raise UserError("chat_template", f"{chat_template} ({error.found})", expected) from None
    return tokenizer


def require_template(
    tokenizer: Any, examples: Sequence[Example], *, stage: str, model: Path, chat_template: str | None
) -> None:
    """Messages need a template, or the word that they are plain text; one that cannot render them is found here.

    Raises:
        UserError: there is no template, or it fails on the first example.
    """
    if chat_template == NO_TEMPLATE:
        return
    if tokenizer.chat_template is None:
        first = next((example for example in examples if example.has_messages), None)
        if first is not None:
            found = f"no template in {model}, with messages at {first.place}"
            raise UserError(
                "chat_template", found, "a Jinja file, or none to take the contents of messages as plain text"
            )
        return
    first = next((example for example in examples if "text" not in example.fields), None)
    if first is None:
        return
    fields = for_template(first, stage)
    prompt = fields.get("prompt", [])
    answer = fields.get("messages") or fields.get("completion") or fields.get("chosen")
    try:
        if prompt:
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        if answer:
            tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    except Exception as error:  # a template raises what it likes: jinja2's errors, and those of its expressions
        raise template_error(error, chat_template, f"at {first.place}") from None


def template_error(error: Exception, chat_template: str | None, where: str) -> UserError:
    """What to say of a template that does not render."""
    found = f"{chat_template or 'the template of the model'} ({show_error(error)})"
    return UserError("chat_template", found, f"a template that renders the messages {where}")
