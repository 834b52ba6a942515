"""What a stage takes from another one: ``${stage:NAME}`` in any text of a flywheel's configuration.

    ${stage:sft}                   the stage sft of the same round and objective
    ${stage:remit/sft}             of the objective remit
    ${stage:round1/sft}            of the first round
    ${stage:previous/remit/rlvr}   of the round before; in round 1 what `round0` names
    ${stage:rlvr@step-40}          its checkpoint after step 40

Everything else is a path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from remit_megatron.runtime.errors import UserError

PREVIOUS = "previous"
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_WRITTEN = re.compile(r"\$\{stage:([^}]*)\}")
_FORM = re.compile(
    rf"(?:(?P<round>round\d+|{PREVIOUS})/)?(?:(?P<objective>[A-Za-z][A-Za-z0-9_]*)/)?(?P<name>[A-Za-z][A-Za-z0-9_]*)"
    r"(?:@step-(?P<step>\d+))?"
)
_EXPECTED = "${stage:NAME}, before the name roundN/ or previous/ and OBJECTIVE/, after it @step-N, where they are meant"


@dataclass(frozen=True)
class Reference:
    """One ``${stage:…}``.

    Attributes:
        text: as it is written.
        round: number, ``previous``, or None for the round of whoever says it.
        objective: None for the one of whoever says it.
        step: of an intermediate checkpoint; None for the last.
    """

    text: str
    name: str
    round: int | str | None = None
    objective: str | None = None
    step: int | None = None


def parse(written: str, *, field: str) -> Reference:
    """The reference inside of ``${stage:…}``.

    Raises:
        UserError: another form.
    """
    match = _FORM.fullmatch(written)
    text = f"${{stage:{written}}}"
    if match is None:
        raise UserError(field, text, _EXPECTED)
    round_ = match["round"]
    number = int(round_.removeprefix("round")) if round_ and round_ != PREVIOUS else round_
    return Reference(text, match["name"], number, match["objective"], int(match["step"]) if match["step"] else None)


def references(value: Any, *, field: str) -> Iterator[tuple[str, Reference]]:
    """Every reference in a value and what is inside of it, with the name of the field that has it."""
    if isinstance(value, str):
        for match in _WRITTEN.finditer(value):
            yield field, parse(match[1], field=field)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from references(item, field=f"{field}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from references(item, field=f"{field}[{number}]")


def only(value: Any, *, field: str) -> Reference | None:
    """The reference that a text is as a whole; None for a path.

    Raises:
        UserError: a reference with something around it, where a whole result is meant.
    """
    if not isinstance(value, str):
        return None
    match = _WRITTEN.fullmatch(value)
    if match is not None:
        return parse(match[1], field=field)
    if _WRITTEN.search(value):
        raise UserError(field, value, "a path, or ${stage:NAME} and nothing around it")
    return None


def filled(value: Any, fill: Callable[[Reference], str], *, field: str) -> Any:
    """The value with the place of each reference's result in its text."""
    if isinstance(value, str):
        return _WRITTEN.sub(lambda match: fill(parse(match[1], field=field)), value)
    if isinstance(value, dict):
        return {key: filled(item, fill, field=f"{field}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, fill, field=f"{field}[{number}]") for number, item in enumerate(value)]
    return value
