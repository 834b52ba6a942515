"""The constraints of Tulu 3's instruction data: what open-instruct verifies as ``ifeval_old``.

A line's answer is a JSON object that names a function and its arguments, null where it has none of them:
``{"func_name": "verify_paragraph_count", "N": 3, "quantifier": null, ...}``. Names, arguments and verdicts are those of
open-instruct's ``if_functions.py``, which differ from IFEval's in places (a bullet may begin with ``-``, words with
capital letters have no digits). Written anew; tests/golden/ifeval_old.json has its verdicts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remit_megatron.runtime.errors import did_you_mean, show

_QUANTIFIERS = ("at least", "around", "at most")
_SENTENCE_END = re.compile(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?|!)\s")


def ifeval_old(completion: str, answer: str, *, func_name: str | None = None, **arguments: Any) -> float:
    """1 where a completion keeps the constraint of its line.

    Args:
        completion: what stands before ``</think>``, and ``<answer>`` tags, are left out.
        answer: a JSON object with ``func_name`` and arguments, read where there are no ``verifier_args``.
        func_name: a name of ``CONSTRAINTS``.
        arguments: those of the constraint; null ones are left out.
    """
    constraint, given = _constraint(answer, func_name, arguments)
    text = completion.replace("<|assistant|>", "").strip().split("</think>")[-1]
    return float(constraint.holds(text.replace("<answer>", "").replace("</answer>", "").strip(), **given))


def check_ifeval_old(answer: str, *, func_name: str | None = None, **arguments: Any) -> None:
    """Raises:
    ValueError: a line whose constraint is none, or lacks an argument.
    """
    constraint, _ = _constraint(answer, func_name, arguments)
    if constraint.holds is _is_in_language:
        _langdetect()


@dataclass(frozen=True)
class Constraint:
    """What a constraint takes and asks.

    Attributes:
        holds: whether a text, then arguments by name, keeps it.
        arguments: name -> kind, a key of ``_KINDS``.
    """

    holds: Callable[..., bool]
    arguments: Mapping[str, str]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) and word for word in value) and bool(value)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (_is_count, "a whole number"),
    "place": (lambda value: _is_count(value) and value > 0, "a whole number, at least 1"),
    "text": (lambda value: isinstance(value, str) and value != "", "a text"),
    "letter": (lambda value: isinstance(value, str) and len(value) == 1, "one character"),
    "quantifier": (lambda value: value in _QUANTIFIERS, f"one of {', '.join(_QUANTIFIERS)}"),
    "words": (_is_words, "a list of texts"),
    "options": (lambda value: _is_words(value) or (isinstance(value, str) and value != ""), "a list of texts"),
}


def _constraint(answer: str, func_name: str | None, arguments: Mapping[str, Any]) -> tuple[Constraint, dict[str, Any]]:
    if func_name is None:
        try:
            content = json.loads(answer)
            func_name, arguments = content["func_name"], {k: v for k, v in content.items() if k != "func_name"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"answer {show(answer)}; expected a JSON object with func_name, or it in verifier_args"
            ) from None
    if not isinstance(func_name, str) or func_name not in CONSTRAINTS:
        near = did_you_mean(str(func_name), list(CONSTRAINTS))
        raise ValueError(f"func_name {show(func_name)}; expected one of open-instruct's{near}")
    constraint = CONSTRAINTS[func_name]
    given = {name: value for name, value in arguments.items() if value is not None}
    if set(given) != set(constraint.arguments):
        found, expected = (", ".join(sorted(names)) or "none" for names in (given, constraint.arguments))
        raise ValueError(f"{func_name} with arguments {found}; expected {expected}")
    for name, kind in constraint.arguments.items():
        right, expected = _KINDS[kind]
        if not right(given[name]):
            raise ValueError(f"{name} {show(given[name])} of {func_name}; expected {expected}")
    if func_name == "validate_paragraphs" and given["i"] > given["N"]:
        raise ValueError(f"paragraph i {given['i']} of N {given['N']} of {func_name}; expected one of them")
    return constraint, given


def _about(count: int, wanted: int, quantifier: str, tolerance: int) -> bool:
    if quantifier == "around":
        return abs(count - wanted) <= tolerance
    return count >= wanted if quantifier == "at least" else count <= wanted


def _tenth(count: int) -> int:
    """A tenth, rounded to even, and at least 1."""
    return max(round(count * 0.1), 1)


# Words and letters.


def _has_keywords(text: str, keyword_list: Sequence[str]) -> bool:
    return all(word.lower() in text.lower() for word in keyword_list)


def _has_word(text: str, word: str, N: int) -> bool:
    return re.findall(r"\b\w+\b", text.lower()).count(word.lower()) == N


def _lacks(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(word.lower() in text.lower() for word in forbidden_words)


def _has_letter(text: str, letter: str, N: int) -> bool:
    return text.count(letter) == N


def _has_capital_words(text: str, N: int, quantifier: str) -> bool:
    return _about(len(re.findall(r"\b[A-Z]+\b", text)), N, quantifier, _tenth(N))


def _is_in_language(text: str, language: str) -> bool:
    langdetect = _langdetect()
    langdetect.DetectorFactory.seed = 0  # else the verdict on a short text is drawn
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:  # nothing in it that is of a language
        return False


def _langdetect() -> Any:
    try:
        import langdetect
    except ImportError:
        raise ValueError("no langdetect; expected lm-eval's ifeval extra (pip install lm-eval[ifeval])") from None
    return langdetect


# Lengths.


def _has_words(text: str, N: int, quantifier: str) -> bool:
    return _about(len(text.split()), N, quantifier, _tenth(N))


def _has_sentences(text: str, N: int, quantifier: str) -> bool:
    return _about(len(_SENTENCE_END.split(text)), N, quantifier, 1)


def _has_divided_paragraphs(text: str, N: int) -> bool:
    parts = "\n".join(line.strip() for line in text.splitlines()).split("* * *")
    return len(parts) == N and all(part.strip() for part in parts)


def _has_paragraphs(text: str, N: int, first_word: str, i: int) -> bool:
    parts = text.split("\n\n")
    return len(parts) == N and parts[i - 1].strip().startswith(first_word)


# Form.


def _has_postscript(text: str, postscript_marker: str) -> bool:
    place = text.find(postscript_marker)
    return place >= 0 and len(text[place:].strip()) > len(postscript_marker)


def _has_placeholders(text: str, N: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= N


def _has_bullets(text: str, N: int) -> bool:
    return sum(line.strip().startswith(("*", "-")) for line in text.split("\n")) == N


def _has_title(text: str) -> bool:
    return re.search(r"<<.*?>>", text) is not None


def _has_choice(text: str, options: Sequence[str] | str) -> bool:
    # Of a string open-instruct takes the characters, of which any answer has one.
    texts = [part.strip() for part in options.split(",")] if isinstance(options, str) else options
    return any(option in text for option in texts if option)


def _has_highlights(text: str, N: int) -> bool:
    return len(re.findall(r"\*.*?\*", text)) >= N


def _has_sections(text: str, N: int, section_splitter: str) -> bool:
    parts = text.split(section_splitter)
    return len(parts) - (parts[0] == "") == N


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _are_two(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and parts[0] != parts[1]


def _is_quoted(text: str) -> bool:
    return text.startswith('"') and text.endswith('"')


CONSTRAINTS: dict[str, Constraint] = {
    "verify_keywords": Constraint(_has_keywords, {"keyword_list": "words"}),
    "verify_keyword_frequency": Constraint(_has_word, {"word": "text", "N": "count"}),
    "validate_forbidden_words": Constraint(_lacks, {"forbidden_words": "words"}),
    "verify_letter_frequency": Constraint(_has_letter, {"letter": "letter", "N": "count"}),
    "validate_frequency_capital_words": Constraint(_has_capital_words, {"N": "count", "quantifier": "quantifier"}),
    "validate_response_language": Constraint(_is_in_language, {"language": "text"}),
    "validate_word_constraint": Constraint(_has_words, {"N": "count", "quantifier": "quantifier"}),
    "verify_sentence_constraint": Constraint(_has_sentences, {"N": "count", "quantifier": "quantifier"}),
    "verify_paragraph_count": Constraint(_has_divided_paragraphs, {"N": "count"}),
    "validate_paragraphs": Constraint(_has_paragraphs, {"N": "count", "first_word": "text", "i": "place"}),
    "verify_postscript": Constraint(_has_postscript, {"postscript_marker": "text"}),
    "validate_placeholders": Constraint(_has_placeholders, {"N": "count"}),
    "verify_bullet_points": Constraint(_has_bullets, {"N": "count"}),
    "validate_title": Constraint(_has_title, {}),
    "validate_choice": Constraint(_has_choice, {"options": "options"}),
    "validate_highlighted_sections": Constraint(_has_highlights, {"N": "count"}),
    "validate_sections": Constraint(_has_sections, {"N": "count", "section_splitter": "text"}),
    "validate_json_format": Constraint(_is_json, {}),
    "validate_repeat_prompt": Constraint(
        lambda text, original_prompt: text.startswith(original_prompt), {"original_prompt": "text"}
    ),
    "validate_two_responses": Constraint(_are_two, {}),
    "validate_uppercase": Constraint(lambda text: text == text.upper(), {}),
    "validate_lowercase": Constraint(lambda text: text == text.lower(), {}),
    "validate_end": Constraint(lambda text, end_phrase: text.endswith(end_phrase), {"end_phrase": "text"}),
    "validate_quotation": Constraint(_is_quoted, {}),
    "validate_no_commas": Constraint(lambda text: "," not in text, {}),
}
