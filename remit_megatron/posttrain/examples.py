"""Examples of a stage from JSON lines, and how they become what TRL takes.

A line of the stage holds:

    sft    {"messages": [{"role": …, "content": …}, …]}  or  {"prompt": …, "completion": …}  or  {"text": …}
    dpo    {"prompt": …, "chosen": …, "rejected": …}
    rlvr   {"prompt": …, "answer": …, "verifier": NAME, "verifier_args": {…}}     the last two may be left out

A prompt, completion, chosen or rejected is a string or a list of messages. Other fields of a line are passed over.
Through a chat template (see :mod:`remit_megatron.posttrain.chat`) a string prompt is what a user says, and the others
are what the assistant answers; without one, a list of messages is the text of its contents, one behind the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remit_megatron.data.inputs import expand_inputs
from remit_megatron.data.readers import iter_records
from remit_megatron.runtime.errors import UserError, show

_ROLES = ("system", "user", "assistant", "tool")
_FIELDS = {
    "sft": ("messages", "prompt", "completion", "text"),
    "dpo": ("prompt", "chosen", "rejected"),
    "rlvr": ("prompt", "answer", "verifier", "verifier_args"),
}
_FORMS = {
    "sft": 'a line with "messages", with "prompt" and "completion", or with "text"',
    "dpo": 'a line with "prompt", "chosen" and "rejected"',
    "rlvr": 'a line with "prompt" and "answer"',
}

_JSON_LINES = "JSON lines (.jsonl, .jsonl.gz, .jsonl.zst); remit posttrain lines makes them of published Parquet"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """One line.

    Attributes:
        place: ``FILE:NUMBER``, for messages.
        fields: the fields of the stage that the line has, checked; messages are lists of role and content.
    """

    place: str
    fields: dict[str, Any]

    @property
    def has_messages(self) -> bool:
        """Whether any field is a list of messages."""
        return any(isinstance(value, list) for value in self.fields.values())


def read_examples(inputs: Sequence[str], *, stage: str, field: str) -> list[Example]:
    """All examples of ``inputs``, in order.

    Args:
        inputs: files, patterns or folders, as `remit data build` takes them.
        field: what named them, for messages.

    Raises:
        UserError: a file that is not there or cannot be read; a bad line, named by file and number; no line at all.
    """
    try:
        files = expand_inputs(inputs)
        for file in files:
            if file.endswith((".parquet", ".arrow")):
                raise UserError(field, file, _JSON_LINES)
        examples = [
            Example(f"{file}:{number}", check_fields(f"{file}:{number}", fields, stage))
            for file, number, fields in iter_records(files, fields=_FIELDS[stage])
        ]
    except UserError as error:
        if error.field != "--input":
            raise
        raise UserError(field, error.found, error.expected) from None
    if not examples:
        raise UserError(field, f"no line in {', '.join(inputs)}", _FORMS[stage])
    if stage == "sft":
        kinds = {_kind(example): example for example in examples}
        if len(kinds) > 1:
            (one, first), (other, second) = list(kinds.items())[:2]
            raise UserError(field, f"{one} at {first.place} and {other} at {second.place}", "one form of lines")
    return examples


def digest_of(examples: Sequence[Example]) -> str:
    """Hex SHA-256 of what the examples say, wherever their files are."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.fields, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def for_template(example: Example, stage: str) -> dict[str, Any]:
    """The fields that TRL puts through the chat template: messages everywhere."""
    fields = example.fields
    if stage == "sft" and "text" in fields:
        return {"text": fields["text"]}
    if stage == "sft" and "messages" in fields:
        return {"messages": fields["messages"]}
    answers = {"sft": ("completion",), "dpo": ("chosen", "rejected"), "rlvr": ()}[stage]
    return {
        "prompt": _as_messages(fields["prompt"], "user"),
        **{name: _as_messages(fields[name], "assistant") for name in answers},
    }


def as_text(example: Example, stage: str) -> dict[str, str]:
    """The fields that TRL takes as they stand: strings everywhere."""
    fields = example.fields
    if stage == "sft" and "messages" in fields:
        return {"text": _contents(fields["messages"])}
    names = {"sft": ("text", "prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "rlvr": ("prompt",)}
    return {name: _contents(fields[name]) for name in names[stage] if name in fields}


def _as_messages(value: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _contents(value: str | Messages) -> str:
    return value if isinstance(value, str) else "".join(message["content"] for message in value)


def _kind(example: Example) -> str:
    return next(name for name in ("messages", "completion", "text") if name in example.fields)


def check_fields(place: str, fields: dict[str, Any], stage: str) -> dict[str, Any]:
    """The fields of a line of a stage, checked; those that are null are left out.

    Raises:
        UserError: they are no line; names ``place``.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    if stage == "sft":
        forms = [form for form in (("messages",), ("prompt", "completion"), ("text",)) if set(form) <= fields.keys()]
        if len(forms) != 1 or set(forms[0]) != fields.keys():
            raise UserError(place, f"fields {', '.join(fields) or 'none'}", _FORMS[stage])
        if "messages" in fields:
            return {"messages": _messages(place, "messages", fields["messages"])}
        if "text" in fields:
            return {"text": _text(place, "text", fields["text"])}
    wanted = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "rlvr": ("prompt",)}[stage]
    for name in (*wanted, *(("answer",) if stage == "rlvr" else ())):
        if name not in fields:
            raise UserError(place, f"no {name} among {', '.join(fields) or 'no fields'}", _FORMS[stage])
    checked: dict[str, Any] = {}
    for name in wanted:
        value = fields[name]
        checked[name] = _messages(place, name, value) if isinstance(value, list) else _text(place, name, value)
    return checked | (_task(place, fields) if stage == "rlvr" else {})


def _task(place: str, fields: dict[str, Any]) -> dict[str, Any]:
    answer = fields["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(place, f"answer {show(answer)}", "a string or a number")
    task: dict[str, Any] = {"answer": str(answer)}
    if "verifier" in fields:
        if not isinstance(fields["verifier"], str):
            raise UserError(place, f"verifier {show(fields['verifier'])}", "the name of a verifier")
        task["verifier"] = fields["verifier"]
    if "verifier_args" in fields:
        if not isinstance(fields["verifier_args"], dict):
            raise UserError(place, f"verifier_args {show(fields['verifier_args'])}", "names and values of arguments")
        task["verifier_args"] = fields["verifier_args"]
    return task


def _text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        found = "an empty string" if value == "" else show(value)
        raise UserError(place, f"{name} {found}", "a string that is not empty, or a list of messages")
    return value


def _messages(place: str, name: str, value: Any) -> Messages:
    expected = 'messages as [{"role": "user", "content": "…"}, …]'
    if not isinstance(value, list) or not value:
        raise UserError(place, f"{name} {show(value)}", expected)
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(place, f"{show(message)} in {name}", expected)
        if message["role"] not in _ROLES:
            raise UserError(place, f"role {show(message['role'])} in {name}", f"one of {', '.join(_ROLES)}")
        if not isinstance(message["content"], str):
            raise UserError(place, f"content {show(message['content'])} in {name}", "a string")
        more = message.keys() - {"role", "content"}
        if more:  # tool calls and the like change what a template renders
            raise UserError(place, f"{', '.join(sorted(more))} in a message of {name}", "role and content")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages
