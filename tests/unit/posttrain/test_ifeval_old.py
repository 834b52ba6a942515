"""The constraints of Tulu 3's data against open-instruct's own functions, whose verdicts are recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.posttrain.examples import Example
from remit_megatron.posttrain.ifeval_old import CONSTRAINTS, ifeval_old
from remit_megatron.posttrain.rewards import VerifiedReward
from remit_megatron.posttrain.verifiers import VERIFIERS
from remit_megatron.runtime.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/ifeval_old.json").read_text())


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_the_verdicts_are_open_instructs(name: str) -> None:
    cases = [case for case in GOLDEN["cases"] if case["constraint"]["func_name"] == name]
    seen = set()
    for case in cases:
        # As the published lines have it: every argument of every function, null where it is none of this one's.
        answer = json.dumps(
            {argument: None for c in CONSTRAINTS.values() for argument in c.arguments} | case["constraint"]
        )
        verdicts = "".join(str(int(ifeval_old(text, answer))) for text in GOLDEN["texts"])
        # x: nothing of a language in the text, which ends open-instruct's verifier; 0 is ours.
        assert verdicts == case["verdicts"].replace("x", "0"), case["constraint"]
        seen |= set(verdicts)
    assert seen == {"0", "1"}


def test_all_of_its_functions_are_there() -> None:
    assert {case["constraint"]["func_name"] for case in GOLDEN["cases"]} == set(CONSTRAINTS) and len(CONSTRAINTS) == 25


def test_arguments_of_the_line() -> None:
    given = {"func_name": "verify_bullet_points", "N": 2}
    assert VERIFIERS["ifeval_old"]("* a\n- b", "", **given) == 1.0
    options = json.dumps({"func_name": "validate_choice", "options": "maybe, for sure"})
    assert [ifeval_old(text, options) for text in ("It is, for sure", "m")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("7", "expected a JSON object with func_name"),
        ("not JSON", "expected a JSON object with func_name"),
        ({"func_name": "verify_paragraf_count", "N": 3}, "did you mean verify_paragraph_count?"),
        ({"func_name": "verify_paragraph_count"}, "with arguments none; expected N"),
        ({"func_name": "validate_title", "N": 3}, "with arguments N; expected none"),
        ({"func_name": "verify_paragraph_count", "N": "3"}, "N '3' of verify_paragraph_count; expected a whole number"),
        ({"func_name": "verify_letter_frequency", "letter": "ab", "N": 3}, "expected one character"),
        ({"func_name": "validate_word_constraint", "N": 3, "quantifier": "over"}, "expected one of at least, around"),
        ({"func_name": "validate_paragraphs", "N": 2, "first_word": "a", "i": 3}, "paragraph i 3 of N 2"),
        ({"func_name": "verify_keywords", "keyword_list": "cat"}, "expected a list of texts"),
    ],
)
def test_constraints_that_are_none(answer: Any, says: str) -> None:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    example = Example("f:7", {"prompt": "p", "answer": text, "verifier": "ifeval_old"})
    with pytest.raises(UserError) as caught:
        VerifiedReward([example], None)
    assert str(caught.value).startswith("f:7: ifeval_old") and says in str(caught.value)
