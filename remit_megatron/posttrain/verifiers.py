"""Verifiable rewards: what says whether a completion is right.

A verifier is a function ``(completion: str, answer: str, **args) -> float`` in [0, 1]. ``args`` are the line's
``verifier_args``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from remit_megatron.runtime.errors import UserError, did_you_mean, show

Verifier = Callable[..., float]

_LAST_DIGITS = re.compile(r"\d+(?=\D*$)")


def exact_match(completion: str, answer: str, *, ignore_case: bool = False) -> float:
    """1 where the completion is the answer, white space around both left aside."""
    completion, answer = completion.strip(), answer.strip()
    if ignore_case:
        completion, answer = completion.casefold(), answer.casefold()
    return float(completion == answer)


def number_at_end(completion: str, answer: str) -> float:
    """1 where the last run of digits in the completion is the answer as a whole number: ``…=0821;`` is 821."""
    found = _LAST_DIGITS.search(completion)
    return float(found is not None and int(found[0]) == int(answer))


VERIFIERS: dict[str, Verifier] = {
    "exact_match": exact_match,
    "number_at_end": number_at_end,
}


def find_verifier(name: str, *, field: str = "verifier") -> Verifier:
    """The verifier of a name.

    Args:
        name: one of ``VERIFIERS``, or a function of yours as ``package.module:function`` or ``path/file.py:function``.
        field: what named it, for messages.

    Raises:
        UserError: there is none, or it is no function of a completion and an answer.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    place, colon, function = name.rpartition(":")
    if not colon:
        known = list(VERIFIERS)
        expected = f"one of {', '.join(known)}, or your own as package.module:function or path/file.py:function"
        raise UserError(field, show(name), expected + did_you_mean(name, known))
    module = _module(place, field)
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(field, f"no function {function} in {place}", "a function (completion, answer, **args)")
    try:
        inspect.signature(found).bind("completion", "answer")
    except TypeError as error:
        # One whose further arguments are required takes them from the lines.
        if "missing a required" not in str(error):
            raise UserError(field, f"{name} ({error})", "a function (completion, answer, **args)") from None
    except ValueError:
        pass  # written in C, without a signature
    return cast(Verifier, found)


def _module(place: str, field: str) -> Any:
    expected = "a module that can be imported, or a file that ends in .py"
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        if not path.is_file():
            raise UserError(field, f"no file {place}", expected)
        specification = importlib.util.spec_from_file_location(f"remit_verifier_{path.stem}", path)
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:  # whatever the module of somebody else raises
        raise UserError(field, f"{place} ({type(error).__name__}: {error})", expected) from None
