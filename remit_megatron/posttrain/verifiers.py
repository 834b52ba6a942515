"""Verifiable rewards: what says whether a completion is right.

A verifier is a function ``(completion: str, answer: str, **args) -> float`` in [0, 1]. ``args`` are the line's
``verifier_args``. What is wrong with a line's answer or arguments is a ValueError that says so, from the verifier or,
before a run begins, from its check in ``CHECKS``; a completion that nobody can read is 0.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from remit_megatron.posttrain.ifeval_old import check_ifeval_old, ifeval_old
from remit_megatron.runtime.errors import UserError, did_you_mean, show
from remit_megatron.runtime.extras import is_installed, missing

Verifier = Callable[..., float]

_LAST_DIGITS = re.compile(r"\d+(?=\D*$)")
_GSM8K_MARK = "####"
_NUMBER = re.compile(r"-?\$?\s*(\d[\d,]*(\.\d+)?|\.\d+)\s*%?\.?$")
# LaTeX that math-verify finds by itself; other text is an expression as a whole.
_MARKED_LATEX = re.compile(r"\\boxed|\\fbox|\$|\\\(|\\\[|\\begin\{(equation|align|math)")
# Seconds for reading an expression, and for comparing two: math-verify's own defaults.
_PARSING_SECONDS, _COMPARING_SECONDS = 5, 5


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


def gsm8k(completion: str, answer: str) -> float:
    """1 where the number that the completion ends in is the answer, by math-verify.

    Args:
        completion: the number is behind ``####`` where that is there, else in the last ``\\boxed{}``, else the one that
            math-verify finds.
        answer: a number, or a solution of the data set with its number behind ``####``.
    """
    return _same(completion.rpartition(_GSM8K_MARK)[2], _parsed(_gsm8k_answer(answer)))


def math(completion: str, answer: str) -> float:
    """1 where the completion's final expression equals the answer, by math-verify.

    Args:
        completion: text with the expression in ``\\boxed{}``, in LaTeX, or as a plain number.
        answer: LaTeX, a number, or a whole solution with its result in ``\\boxed{}``.
    """
    return _same(completion, _math_answer(answer))


def ifeval(
    completion: str,
    answer: str,
    *,
    instruction_id_list: Sequence[str] | None = None,
    kwargs: Sequence[Mapping[str, Any] | None] | None = None,
    mode: str = "strict",
    partial: bool = False,
) -> float:
    """Whether a completion follows the instructions of IFEval, by the code of lm-eval's task.

    Args:
        answer: where there are no ``verifier_args``, a JSON object with them; not read otherwise.
        instruction_id_list: as in IFEval's data, ``keywords:existence``.
        kwargs: for each instruction, its arguments; None and empty values are left out, as lm-eval does.
        mode: ``strict``, or ``loose``, which also tries the completion without its first and last line and asterisks.
        partial: the share of the instructions that are followed in place of 1 for all and 0 otherwise.
    """
    identifiers, arguments = _instructions(answer, instruction_id_list, kwargs)
    utils = _ifeval_utils()
    if mode not in ("strict", "loose"):
        raise ValueError(f"mode {mode!r}; expected strict or loose")
    test = utils.test_instruction_following_strict if mode == "strict" else utils.test_instruction_following_loose
    example = utils.InputExample(key=0, instruction_id_list=identifiers, prompt="", kwargs=arguments)
    followed = test(example, completion).follow_instruction_list
    return sum(followed) / len(followed) if partial else float(all(followed))


def reasoning_gym(
    completion: str,
    answer: str,
    *,
    dataset: str,
    entry: Mapping[str, Any] | None = None,
    tag: str = "answer",
) -> float:
    """The score of a reasoning-gym data set, which is the scorer of its tasks.

    Args:
        answer: the entry's answer, where ``entry`` has none.
        dataset: its name, ``basic_arithmetic``.
        entry: of the data set: question, answer, metadata. Many scorers need the metadata.
        tag: the last ``<tag>…</tag>`` of the completion is what is scored; without one, the completion as a whole.
    """
    from reasoning_gym.utils import extract_answer

    found = extract_answer(completion, tag_name=tag)
    scored = completion.strip() if found is None else found
    whole = {"question": "", "metadata": {}, "answer": answer, **(entry or {})}
    return float(_scorer(dataset)(scored, whole))


VERIFIERS: dict[str, Verifier] = {
    "exact_match": exact_match,
    "gsm8k": gsm8k,
    "ifeval": ifeval,
    "ifeval_old": ifeval_old,
    "math": math,
    "number_at_end": number_at_end,
    "reasoning_gym": reasoning_gym,
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


def verifier_source(name: str) -> str | None:
    """The file that a verifier of yours is written in; None for one of ``VERIFIERS``, and where there is no file.

    The module itself is not imported, the packages that it is in are.
    """
    place, colon, _ = name.rpartition(":")
    if not colon or name in VERIFIERS:
        return None
    if place.endswith(".py"):
        return place
    try:
        found = importlib.util.find_spec(place)
    except Exception:  # whatever a package of somebody else raises
        return None
    return found.origin if found is not None and found.has_location else None


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


# What is looked at before a run begins: (answer, **args) of a line, ValueError where they are none.


def _check_number_at_end(answer: str) -> None:
    if not re.fullmatch(r"\s*\d+\s*", answer):
        raise ValueError(f"answer {answer!r}; expected digits")


def _check_gsm8k(answer: str) -> None:
    _gsm8k_answer(answer)


def _check_math(answer: str) -> None:
    if not answer.strip():
        raise ValueError("an empty answer; expected an expression")
    if not is_installed("math_verify"):
        raise ValueError("; expected ".join(missing("math_verify")))


def _check_ifeval(
    answer: str,
    *,
    instruction_id_list: Sequence[str] | None = None,
    kwargs: Sequence[Mapping[str, Any] | None] | None = None,
    **_: Any,
) -> None:
    identifiers, arguments = _instructions(answer, instruction_id_list, kwargs)
    _ifeval_utils()
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    for identifier, given in zip(identifiers, arguments, strict=True):
        if identifier not in INSTRUCTION_DICT:
            near = did_you_mean(identifier, list(INSTRUCTION_DICT))
            raise ValueError(f"instruction {identifier!r}; expected one of IFEval's{near}")
        instruction = INSTRUCTION_DICT[identifier](identifier)
        known = set(instruction.get_instruction_args_keys())
        filled = {name for name, value in given.items() if value}
        # What is left out, lm-eval draws at random.
        missing = known - filled
        if missing:
            raise ValueError(f"{identifier} without {', '.join(sorted(missing))}; expected all of its arguments")
        if filled - known:
            raise ValueError(f"{', '.join(sorted(filled - known))} for {identifier}; expected {sorted(known)}")
        if identifier in _NEEDS_PUNKT and not _has_punkt():
            raise ValueError(
                f"{identifier} without NLTK's punkt_tab, which counts sentences and words; expected it where NLTK "
                "looks (python -m nltk.downloader punkt_tab, or NLTK_DATA)"
            )


def _check_reasoning_gym(answer: str, *, dataset: str | None = None, **_: Any) -> None:
    if dataset is None:
        raise ValueError("no dataset in verifier_args; expected the name of one of reasoning-gym")
    _scorer(dataset)


CHECKS: dict[str, Callable[..., None]] = {
    "gsm8k": _check_gsm8k,
    "ifeval": _check_ifeval,
    "ifeval_old": check_ifeval_old,
    "math": _check_math,
    "number_at_end": _check_number_at_end,
    "reasoning_gym": _check_reasoning_gym,
}


# Numbers and expressions.


def _gsm8k_answer(answer: str) -> str:
    number = answer.rpartition(_GSM8K_MARK)[2].strip()
    if not _NUMBER.fullmatch(number):
        raise ValueError(f"answer {show(answer)}; expected a number, or one behind ####")
    return number.replace("$", "").replace(",", "").rstrip(".").replace(" ", "")


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=_seconds(_PARSING_SECONDS))


@functools.lru_cache(maxsize=4096)
def _math_answer(answer: str) -> list[Any]:
    # Without marks around it, math-verify would look for a number in it: of 2\\sqrt{3} it takes the 2.
    found = _parsed(answer if _MARKED_LATEX.search(answer) else f"${answer}$")
    if not found:
        raise ValueError(f"answer {show(answer)}; expected an expression that math-verify reads")
    return found


def _same(completion: str, gold: list[Any]) -> float:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    if not completion.strip():
        return 0.0
    latex = LatexExtractionConfig(normalization_config=NormalizationConfig(units=True), boxed_match_priority=0)
    found = parse(
        completion,
        extraction_config=[latex, ExprExtractionConfig()],
        parsing_timeout=_seconds(_PARSING_SECONDS),
    )
    return float(bool(found) and verify(gold, found, timeout_seconds=_seconds(_COMPARING_SECONDS)))


def _seconds(limit: int) -> Any:
    """math-verify's limits are alarms, which only the main thread can set; elsewhere there is none."""
    return limit if threading.current_thread() is threading.main_thread() else None


# IFEval.

_NEEDS_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


def _instructions(
    answer: str, identifiers: Sequence[str] | None, arguments: Sequence[Mapping[str, Any] | None] | None
) -> tuple[list[str], list[dict[str, Any]]]:
    if identifiers is None:
        try:
            content = json.loads(answer)
            identifiers = content["instruction_id_list" if "instruction_id_list" in content else "instruction_id"]
            arguments = content.get("kwargs")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                "no instruction_id_list in verifier_args, nor in an answer that is JSON; expected IFEval's fields"
            ) from None
    if not isinstance(identifiers, list | tuple) or not identifiers or not all(isinstance(i, str) for i in identifiers):
        raise ValueError(f"instruction_id_list {show(identifiers)}; expected names of instructions")
    if arguments is None:
        arguments = [{}] * len(identifiers)
    right = isinstance(arguments, list | tuple) and all(isinstance(given, dict | None) for given in arguments)
    if not right or len(arguments) != len(identifiers):
        raise ValueError(f"kwargs {show(arguments)}; expected a mapping for each of {len(identifiers)} instructions")
    return list(identifiers), [dict(given or {}) for given in arguments]


@functools.cache
def _ifeval_utils() -> Any:
    """lm-eval's task code, without the look into the network on its import, and languages detected without a lot."""
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise ValueError(
            f"no {error.name}; expected lm-eval with its ifeval extra (pip install lm-eval[ifeval])"
        ) from None
    download = nltk.download
    nltk.download = lambda *args, **kwargs: False
    try:
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise ValueError(
            f"no {error.name}; expected lm-eval with its ifeval extra (pip install lm-eval[ifeval])"
        ) from None
    finally:
        nltk.download = download
    langdetect.DetectorFactory.seed = 0
    return utils


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


# reasoning-gym.


@functools.cache
def _scorer(dataset: str) -> Callable[..., float]:
    import reasoning_gym  # registers its data sets
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        near = did_you_mean(str(dataset), list(DATASETS))
        raise ValueError(f"dataset {dataset!r}; expected the name of one of reasoning-gym's{near}")
    return reasoning_gym.get_score_answer_fn(dataset)
