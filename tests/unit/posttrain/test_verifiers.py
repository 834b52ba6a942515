"""Verifiers against the libraries that they stand for, and what they say of lines that are wrong."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.posttrain.examples import Example
from remit_megatron.posttrain.rewards import VerifiedReward
from remit_megatron.posttrain.verifiers import VERIFIERS, find_verifier
from remit_megatron.runtime.errors import UserError

GOLD = [
    "42",
    "1,234",
    r"\frac{1}{2}",
    r"2\sqrt{3}+1",
    "x^2+3x",
    "(3, \\frac{\\pi}{2})",
    r"\{1,2\}",
    "50%",
    r"\text{Monday}",
    "-5",
    r"6 - 5i",
    r"We have $x = 3$, so the sum is $\boxed{7}$.",
]
COMPLETIONS = [
    "42",
    r"The answer is \boxed{42}.",
    "so 1234 it is",
    r"\boxed{0.5}",
    "The final answer is $\\frac{2}{4}$.",
    r"Therefore $1 + 2\sqrt{3}$",
    r"$\boxed{x(x+3)}$",
    r"\boxed{\left(3, \pi/2\right)}",
    r"\boxed{\{2, 1\}}",
    r"\boxed{50\%}",
    r"It is \boxed{\text{Monday}}",
    "the result: -5",
    r"\boxed{7}",
    "2",
    "",
    "I do not know",
    r"\boxed{",
]


def test_math_is_math_verify() -> None:
    """Every completion against every answer, as math-verify compares them when the answer is marked as LaTeX."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    latex = LatexExtractionConfig(normalization_config=NormalizationConfig(units=True), boxed_match_priority=0)
    found = {text: parse(text, extraction_config=[latex, ExprExtractionConfig()]) for text in COMPLETIONS}
    right = 0
    for gold in GOLD:
        parsed = parse(gold if "boxed" in gold else f"${gold}$")
        for text in COMPLETIONS:
            expected = float(verify(parsed, found[text]))
            assert VERIFIERS["math"](text, gold) == expected, (text, gold)
            right += expected
    assert right >= 12  # each answer is there at least once, 42 and others several times


def test_math_does_not_take_a_number_for_an_expression() -> None:
    """What math-verify alone reads of an unmarked 2√3+1 is the 2."""
    assert VERIFIERS["math"]("2", r"2\sqrt{3}+1") == 0.0
    assert VERIFIERS["math"](r"\boxed{1+2\sqrt{3}}", r"2\sqrt{3}+1") == 1.0


def test_math_gives_up_in_time() -> None:
    began = time.monotonic()
    assert VERIFIERS["math"](r"\boxed{9^{9^{9}}}", "42") == 0.0
    assert time.monotonic() - began < 30


def test_math_off_the_main_thread() -> None:
    """There math-verify's alarms would raise."""
    results: list[Any] = []

    def work() -> None:
        results.append(VERIFIERS["math"](r"\boxed{\frac{2}{4}}", "0.5"))
        results.append(VERIFIERS["gsm8k"]("#### 7", "7"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [1.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("She has 3 + 4 = 7 left.\n#### 7", "#### 7", 1.0),
        ("#### 1,250", "She earns 1250.\n#### 1,250", 1.0),
        ("The answer is 18.", "18", 1.0),
        ("That makes $18.00 in all", "18", 1.0),
        (r"Thus \boxed{18}", "18", 1.0),
        ("12 eggs, 18 in all. #### 17", "18", 0.0),
        ("eighteen", "18", 0.0),
        ("", "18", 0.0),
        ("1.5", "1.5", 1.0),
        ("#### -3", "-3", 1.0),
    ],
)
def test_gsm8k(completion: str, answer: str, expected: float) -> None:
    assert VERIFIERS["gsm8k"](completion, answer) == expected


def test_gsm8k_on_its_own_solutions(shared_data: Any) -> None:
    rows = [json.loads(line) for line in (shared_data / "gsm8k_train.jsonl").read_text().splitlines()[:150]]
    assert [VERIFIERS["gsm8k"](row["answer"], row["answer"]) for row in rows] == [1.0] * len(rows)
    numbers = [int(row["answer"].rpartition("####")[2].replace(",", "")) for row in rows]
    assert not any(VERIFIERS["gsm8k"](row["answer"], str(n + 1)) for row, n in zip(rows, numbers, strict=True))


IFEVAL_ROWS = [
    (["punctuation:no_comma"], [{}]),
    (
        ["keywords:existence", "length_constraints:number_words"],
        [{"keywords": ["sun"]}, {"num_words": 4, "relation": "at least"}],
    ),
    (["change_case:english_lowercase"], [{}]),
    (["startend:quotation"], [None]),
    (["detectable_format:number_bullet_lists"], [{"num_bullets": 2}]),
    (["combination:repeat_prompt"], [{"prompt_to_repeat": "say it"}]),
    (["keywords:forbidden_words", "startend:end_checker"], [{"forbidden_words": ["rain"]}, {"end_phrase": "done."}]),
    (["language:response_language"], [{"language": "de"}]),
]
IFEVAL_TEXTS = [
    "The sun is shining, and we are done.",
    "the sun shines here today",
    '"The sun"',
    "* one\n* two",
    "say it: the sun and the moon",
    "Guten Tag, heute scheint die Sonne und wir gehen spazieren.",
    "**Rain**\nthe sun is up\nbye",
    "",
]


@pytest.mark.parametrize("mode", ["strict", "loose"])
def test_ifeval_is_lm_evals(mode: str) -> None:
    verifier = VERIFIERS["ifeval"]
    verifier("a", "", instruction_id_list=["punctuation:no_comma"])  # imports it without a look into the network
    from lm_eval.tasks.ifeval.utils import process_results

    followed = 0
    for identifiers, arguments in IFEVAL_ROWS:
        given = [dict(argument or {}) for argument in arguments]
        document = {"key": 0, "instruction_id_list": identifiers, "prompt": "", "kwargs": given}
        for text in IFEVAL_TEXTS:
            expected = process_results(document, [text])
            found = verifier(text, "", instruction_id_list=identifiers, kwargs=arguments, mode=mode)
            assert found == float(expected[f"prompt_level_{mode}_acc"]), (identifiers, text)
            share = verifier(text, "", instruction_id_list=identifiers, kwargs=arguments, mode=mode, partial=True)
            each = expected[f"inst_level_{mode}_acc"]
            assert share == sum(each) / len(each)
            followed += found
    assert 10 < followed < len(IFEVAL_ROWS) * len(IFEVAL_TEXTS) - 10


def test_ifeval_from_an_answer_in_json() -> None:
    answer = json.dumps({"instruction_id": ["punctuation:no_comma"], "kwargs": [None]})
    assert [VERIFIERS["ifeval"](text, answer) for text in ("yes", "yes, and no")] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["basic_arithmetic", "chain_sum", "countdown", "letter_counting", "spell_backward"])
def test_reasoning_gym_is_its_scorer(name: str) -> None:
    import reasoning_gym as library

    data = library.create_dataset(name, size=6, seed=3)
    for index, entry in enumerate(data):
        stored = json.loads(json.dumps(entry, default=str))  # as it comes back from a line
        for text in (entry["answer"], data[(index + 1) % 6]["answer"], "nothing", f" {entry['answer']} "):
            for completion in (text, f"I think.\n<answer>{text}</answer> So."):
                expected = data.score_answer(text.strip(), entry)
                found = VERIFIERS["reasoning_gym"](completion, entry["answer"], dataset=name, entry=stored)
                assert found == pytest.approx(expected), (name, completion)


@pytest.mark.parametrize(
    ("name", "completion", "answer", "expected"),
    [
        ("exact_match", " yes\n", "yes", 1.0),
        ("exact_match", "Yes", "yes", 0.0),
        ("number_at_end", "157+664:7+4=11,0821;", "821", 1.0),
        ("number_at_end", "821 of 900", "821", 0.0),
        ("number_at_end", "no digits", "821", 0.0),
        ("number_at_end", "a12 b", "12", 1.0),
    ],
)
def test_simple_ones(name: str, completion: str, answer: str, expected: float) -> None:
    assert find_verifier(name)(completion, answer) == expected


def test_exact_match_ignores_case_on_demand() -> None:
    assert VERIFIERS["exact_match"]("YES", "yes", ignore_case=True) == 1.0


# A user's own.


def write_verifier(tmp_path: Path, body: str) -> str:
    (tmp_path / "mine.py").write_text(f"def reward(completion, answer, scale=1.0):\n    {body}\n")
    return f"{tmp_path / 'mine.py'}:reward"


def test_a_function_of_a_file(tmp_path: Path) -> None:
    name = write_verifier(tmp_path, "return scale * (completion == answer)")
    assert find_verifier(name)("a", "a", scale=0.5) == 0.5


def test_a_function_of_a_module() -> None:
    assert find_verifier("remit_megatron.posttrain.verifiers:exact_match") is VERIFIERS["exact_match"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gsm8", "did you mean gsm8k?"),
        ("no_such_module_at_all:f", "No module named"),
        ("nowhere/file.py:f", "no file nowhere/file.py"),
        ("remit_megatron.posttrain.verifiers:nothing", "no function nothing"),
        ("os:getcwd", "a function (completion, answer, **args)"),
    ],
)
def test_unknown_verifiers(name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        find_verifier(name)
    assert says in str(caught.value)


def example(number: int = 7, **fields: Any) -> Example:
    return Example(f"data.jsonl:{number}", {"prompt": "1+1=", "answer": "2", **fields})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise KeyError('oh')", "raised KeyError: 'oh' on the completion 'hello'"),
        ("return 1.5", "1.5 from verifier"),
        ("return float('nan')", "nan from verifier"),
        ("return 'right'", "raised ValueError"),
        ("return None", "raised TypeError"),
    ],
)
def test_a_verifier_that_fails_is_named_with_the_line(tmp_path: Path, body: str, says: str) -> None:
    reward = VerifiedReward([example()], write_verifier(tmp_path, body))
    with pytest.raises(UserError) as caught:
        reward(completions=["hello"], example=[0])
    assert caught.value.field == "data.jsonl:7" and says in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "data.jsonl:7: found no verifier"),
        ({"verifier": "gsm8k", "answer": "two"}, "data.jsonl:7: gsm8k: found answer 'two'"),
        ({"verifier": "number_at_end", "answer": "-2"}, "answer '-2'; expected digits"),
        ({"verifier": "number_at_end", "verifier_args": {"base": 2}}, "unexpected keyword argument 'base'"),
        ({"verifier": "ifeval", "answer": "2"}, "expected IFEval's fields"),
        (
            {"verifier": "ifeval", "verifier_args": {"instruction_id_list": ["punctuation:no_coma"]}},
            "did you mean punctuation:no_comma?",
        ),
        (
            {"verifier": "ifeval", "verifier_args": {"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}},
            "keywords:existence without keywords",
        ),
        ({"verifier": "reasoning_gym"}, "no dataset in verifier_args"),
        ({"verifier": "reasoning_gym", "verifier_args": {"dataset": "chain_sums"}}, "did you mean chain_sum?"),
    ],
)
def test_lines_that_no_verifier_takes(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        VerifiedReward([example(**fields)], None)
    assert says in str(caught.value)


def test_each_line_has_its_own() -> None:
    lines = [
        example(verifier="exact_match"),
        example(verifier="exact_match", verifier_args={"ignore_case": True}, answer="A"),
    ]
    reward = VerifiedReward(lines, "number_at_end")
    assert reward(completions=["2", [{"role": "assistant", "content": "a"}], "a"], example=[0, 1, 0]) == [1.0, 1.0, 0.0]
