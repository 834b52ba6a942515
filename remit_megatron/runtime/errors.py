"""What the program says when its input is wrong, and the exit codes that others rely on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_BAD_INPUT = 2  # one clear line, nothing lost; starting again unchanged gives the same
EXIT_DO_NOT_RESTART = 70  # failed for a reason that a restart does not mend
EXIT_START_ME_AGAIN = 75  # stopped on purpose before the end; start again to go on


class UserError(Exception):
    """Input that somebody can correct: printed as one line, without a traceback, exit code 2.

    Args:
        field: what is wrong, by the name its owner knows: a configuration key, an option, a file (with line).
        found: the value that was there.
        expected: the value, or the condition, that would be right. Ends without a full stop.
    """

    def __init__(self, field: str, found: object, expected: str):
        self.field = field
        self.found = found
        self.expected = expected
        super().__init__(field, found, expected)  # the arguments themselves, so that the exception pickles

    def __str__(self) -> str:
        return f"{self.field}: found {self.found}; expected {self.expected}"


class StartAgain(Exception):
    """The run stops before its end and goes on when it is started again: one line, exit code 75.

    All ranks raise it together, with one text: a rank that left alone would leave the others in a collective.
    """


class DoNotRestart(Exception):
    """The run has failed for a reason that a restart does not mend: one line, exit code 70.

    All ranks raise it together, with one text, and rank 0 says it: a rank that left alone would leave the others in a
    collective.

    Args:
        text: what was found, and what would mend it.
        alone: raised by one rank only, which then says it itself.
    """

    def __init__(self, text: str, *, alone: bool = False):
        self.alone = alone
        super().__init__(text)


def show(value: object, limit: int = 80) -> str:
    """A value as it stands in a one-line message: strings quoted, long ones cut, ``nothing`` for None."""
    if value is None:
        return "nothing"
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def show_error(error: BaseException, *, empty: str = "", limit: int = 300) -> str:
    """What a library raised, as it stands in a one-line message: its kind, and ``limit`` characters of its words, or
    ``empty`` where it has none."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit] or empty}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """``; did you mean X?`` with the nearest of ``known``, or an empty string where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
