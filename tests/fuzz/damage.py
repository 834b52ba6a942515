"""What the fuzzers share: how long they run, damage to bytes, alterations of JSON, and what counts as handled.

A run in CI is short and always the same. ``REMIT_FUZZ=20000`` tries that many examples of each property, new ones every
time, and prints the smallest that fails.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from remit_megatron.cli import _USER_ERRNOS
from remit_megatron.runtime.errors import UserError

LONG = int(os.environ.get("REMIT_FUZZ", "0"))
REFUSED = object()


def examples(short: int) -> settings:
    """Settings of a property that tries ``short`` examples in CI."""
    return settings(
        max_examples=LONG or short,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=bool(LONG),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


def handled(action: Callable[[], Any], *others: type[Exception]) -> Any:
    """What ``action`` returns, or REFUSED where it raises a UserError (or one of ``others``) that says something.
    Anything else that it raises is a fault and goes through."""
    try:
        return action()
    except UserError as error:
        assert error.field and error.expected, repr(error)
        return REFUSED
    except OSError as error:  # the command line says these with the file's name: a name that is too long, say
        if isinstance(error, others):
            return REFUSED
        if error.errno not in _USER_ERRNOS or not error.filename:
            raise
        return REFUSED
    except others:
        return REFUSED


@st.composite
def damaged(draw: Any, original: bytes, *, edits: int = 3) -> bytes:
    """``original`` with bytes changed, cut off, taken out, repeated or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, edits))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(("change", "bit", "cut", "remove", "repeat", "insert", "extreme", "deep")))
        if kind == "change":
            data[place : place + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "bit" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place:]
        elif kind == "remove":
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = data[place : place + length]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=length))
        elif kind == "deep":  # deeper than any parser's stack, where the file is a text of brackets
            data[place:place] = draw(st.sampled_from((b"[" * 9000, b'{"a":' * 9000, b"{a: " * 2000)))
        elif kind == "extreme":
            word = draw(st.sampled_from((b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0" * 7 + b"\x80")))
            data[place : place + 8] = word
    return bytes(data)


def _deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(50):
        value = [value]
    return value


# What stands in a JSON file by a slip, or because some other program wrote it.
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**30)),
    st.sampled_from((0.0, -1.0, 0.5, 1.0, 1e308, float("inf"), float("-inf"), float("nan"))),
    st.sampled_from(("", "0", "1", "x", "null", "\x00", "é", "../x", "/", "a" * 300)),
    st.sampled_from(([], [None], [0, 1], {}, {"a": 1}, [[]], {"": None}, _deep())),
)


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside: list[tuple[Any, ...]] = [path]
    if isinstance(content, dict):
        for name, value in content.items():
            inside += _places(value, (*path, name))
    elif isinstance(content, list):
        for index, value in enumerate(content[:8]):
            inside += _places(value, (*path, index))
    return inside


@st.composite
def altered(draw: Any, original: Any, *, edits: int = 2) -> Any:
    """``original`` (of JSON or YAML) with values replaced, removed, moved or added."""
    content = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, edits))):
        place = draw(st.sampled_from(_places(content)))
        if not place:
            if draw(st.integers(0, 9)) == 0:  # the whole thing; rarely, for nothing is left to alter
                return copy.deepcopy(draw(odd_values))
            continue
        parent = content
        for step in place[:-1]:
            parent = parent[step]
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "wrap", "rename")))
        if kind == "replace":
            parent[place[-1]] = copy.deepcopy(draw(odd_values))
        elif kind == "remove":
            del parent[place[-1]]
        elif kind == "wrap":
            parent[place[-1]] = [parent[place[-1]]]
        elif isinstance(parent, dict):
            parent[str(place[-1]) + draw(st.sampled_from(("x", " ", "_")))] = parent.pop(place[-1])
    return content
