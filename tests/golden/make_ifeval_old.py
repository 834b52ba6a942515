"""Writes ifeval_old.json: make_ifeval_old.py CHECKOUT COMMIT.

The verdicts of open-instruct's own functions (allenai/open-instruct, open_instruct/if_functions.py, and the part of its
``ifeval_old`` verifier that cuts a completion down to its answer) on texts and constraints of ours.
"""

from __future__ import annotations

import ast
import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import langdetect

TEXTS = [
    "",
    "Yes",
    "My answer is yes.",
    "no commas here",
    "One, two, three.",
    '"A quoted answer."',
    '"Half quoted',
    "ALL CAPITALS, 12 WORDS",
    "all small letters 3",
    '{"a": [1, 2]}',
    "{'a': 1}",
    "NaN",
    "<<A title>>\n\nThe text under it.",
    "<< broken over\nlines >>",
    "First part\n* * *\nSecond part",
    "First part\n* * *\n   \n* * *\nThird",
    "One * * *\nTwo\n * * * \nThree",
    "Hello, hello. A 9AM call AND another 9AM one.",
    "I AM IN. ALL IS OK! GO ON? NO. YES. SO BE IT. WE DO. AT 1. A B. C.",
    "* * *\nonly one behind a divider",
    "One\n\nTwo here\n\nThree",
    "One\n\n\n\nTwo",
    "* first\n* second\n- third",
    " * first\n\t- second\nplain * star",
    "A *highlighted* word and **two** more*",
    "*one* and *two* and *three*",
    "Dear [name], at [address] and [ ] []",
    "[broken\nplace]",
    "SECTION 1\nhere SECTION 2 there",
    "SECTION SECTION",
    "Some text.\nP.S. and one more",
    "Some text. P.S.",
    "P.P.S. see P.S. above",
    "one ****** two",
    "same ****** same",
    "a ****** b ****** c",
    "Dr. Who came. He saw e.g. stars! Did he win? Yes.",
    "Wait... what?! No",
    "hello world, Hello WORLD; hello-world hello_world",
    "The cat's cat sat. Cat, cats; CAT!",
    "NASA and the FBI met in B2 at 9AM",
    "Repeat this: do it. And here it is.",
    "Thinking about it.</think>The answer is no",
    "<think>hm, so</think>\n<answer>My answer is yes.</answer>",
    "<|assistant|> Any other questions?",
    "Any other questions? ",
    "Dies ist ein ganz gewöhnlicher deutscher Satz über das Wetter von gestern und morgen.",
    "Ceci est une phrase française tout à fait ordinaire, écrite pour être reconnue.",
    "This is a perfectly ordinary English sentence about the weather and the people.",
]
N = (0, 1, 2, 3, 10)
QUANTIFIERS = ("at least", "around", "at most")
PIECES = (
    *(
        "one",
        "Two",
        "THREE",
        "cat",
        "cat",
        "e.g.",
        "Mr.",
        "end.",
        "why?",
        "no!",
        "a,",
        "[x]",
        "*",
        "-",
        "* * *",
        "******",
    ),
    *("*b*", "**", "<<t>>", "\n", "\n\n", "\n", "SECTION", "P.S.", "B2", '"', "</think>", "<answer>", "yes", "{}", "I"),
)


def constraints() -> list[dict[str, Any]]:
    """Every function, with arguments that hold for some of the texts and for others not."""
    made: list[dict[str, Any]] = []
    for name in ("validate_title", "validate_json_format", "validate_two_responses", "validate_uppercase"):
        made.append({"func_name": name})
    for name in ("validate_lowercase", "validate_quotation", "validate_no_commas"):
        made.append({"func_name": name})
    for name in ("verify_paragraph_count", "validate_placeholders", "verify_bullet_points"):
        made += [{"func_name": name, "N": n} for n in N[:4]]
    made += [{"func_name": "validate_highlighted_sections", "N": n} for n in N[:4]]
    for name in ("validate_word_constraint", "verify_sentence_constraint", "validate_frequency_capital_words"):
        made += [{"func_name": name, "N": n, "quantifier": quantifier} for n in N for quantifier in QUANTIFIERS]
    for words in (["cat"], ["HELLO", "world"], ["yes", "answer"], ["e.g."]):
        made.append({"func_name": "verify_keywords", "keyword_list": words})
        made.append({"func_name": "validate_forbidden_words", "forbidden_words": words})
        made.append({"func_name": "validate_choice", "options": words})
    for word in ("cat", "Hello", "9AM"):
        made += [{"func_name": "verify_keyword_frequency", "word": word, "N": n} for n in N[:4]]
    made += [{"func_name": "verify_letter_frequency", "letter": letter, "N": n} for letter in "eA*" for n in N[:4]]
    for n, first, i in ((1, "One", 1), (2, "Two", 2), (3, "Two", 2), (3, "Three", 3), (2, "The", 2)):
        made.append({"func_name": "validate_paragraphs", "N": n, "first_word": first, "i": i})
    made += [{"func_name": "verify_postscript", "postscript_marker": text} for text in ("P.S.", "P.P.S", " P.S.")]
    made += [
        {"func_name": "validate_sections", "N": n, "section_splitter": text}
        for n in N[:4]
        for text in ("SECTION", "SECTION ")
    ]
    made += [
        {"func_name": "validate_repeat_prompt", "original_prompt": text} for text in ("Repeat this: do it.", "One")
    ]
    made += [{"func_name": "validate_end", "end_phrase": text} for text in ("Any other questions?", "yes.", "Yes")]
    made += [{"func_name": "validate_response_language", "language": language} for language in ("en", "de", "fr")]
    return made


def texts() -> list[str]:
    """Those above, and others thrown together."""
    generator = random.Random(0)
    more = [generator.choice(("", " ")).join(generator.choices(PIECES, k=generator.randint(2, 14))) for _ in range(80)]
    return TEXTS + more


def main() -> None:
    checkout, commit = Path(sys.argv[1]), sys.argv[2]
    functions = runpy.run_path(str(checkout / "open_instruct/if_functions.py"))["IF_FUNCTIONS_MAP"]
    tree = ast.parse((checkout / "open_instruct/ground_truth_utils.py").read_text())
    (cut,) = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "remove_thinking_section"
    ]
    scope: dict[str, Any] = {}
    exec(compile(ast.Module([cut], []), "ground_truth_utils.py", "exec"), scope)

    def verdict(constraint: dict[str, Any], text: str) -> str:
        langdetect.DetectorFactory.seed = 0
        given = {name: value for name, value in constraint.items() if name != "func_name"}
        try:
            return str(int(bool(functions[constraint["func_name"]](scope["remove_thinking_section"](text), **given))))
        except langdetect.LangDetectException:
            return "x"  # raised: nothing of a language in it

    all_texts = texts()
    cases = [
        {"constraint": constraint, "verdicts": "".join(verdict(constraint, text) for text in all_texts)}
        for constraint in constraints()
    ]
    content = {"source": "allenai/open-instruct if_functions.py", "commit": commit, "texts": all_texts, "cases": cases}
    (Path(__file__).parent / "ifeval_old.json").write_text(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    main()
