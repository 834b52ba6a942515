"""The toy text: what its solutions say, how many are right, what is kept apart."""

from __future__ import annotations

import json
import random
import re

import pytest

from remit_megatron.flywheel import toy

TEXT = toy.ToyText(seed=5, documents=4000, heldout=200, problems=1000)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return toy.corpus(TEXT)


def additions(documents: list[str]) -> list[str]:
    return [document for document in documents if not document.startswith("r")]


def test_the_example_of_the_docstring() -> None:
    """A due carry is written or not by chance; everything else of a solution is arithmetic."""
    rng = random.Random(0)
    found = {toy.worked_addition(157, 664, forgotten=0.5, rng=rng) for _ in range(200)}
    assert found == {
        "157+664:7+4=11,5+6+1=12,1+6+1=08,0821;",
        "157+664:7+4=11,5+6+1=12,1+6+0=07,0721;",
        "157+664:7+4=11,5+6+0=11,1+6+1=08,0811;",
        "157+664:7+4=11,5+6+0=11,1+6+0=07,0711;",
    }


def test_solutions_agree_with_what_they_wrote(documents: list[str]) -> None:
    """Every column adds up, a carry of 1 was due, and the answer is made of the columns."""
    pattern = re.compile(
        r"(\d)(\d)(\d)\+(\d)(\d)(\d):(\d)\+(\d)=(\d\d),(\d)\+(\d)\+(\d)=(\d\d),(\d)\+(\d)\+(\d)=(\d\d),(\d{4});"
    )
    solutions = additions(documents)
    for document in solutions:
        match = pattern.fullmatch(document)
        assert match is not None and len(document) == toy.LENGTH, document
        a3, a2, a1, b3, b2, b1, *rest = match.groups()
        x1, y1, s1, x2, y2, c2, s2, x3, y3, c3, s3, answer = rest
        assert (x1, y1, x2, y2, x3, y3) == (a1, b1, a2, b2, a3, b3)
        assert int(s1) == int(a1) + int(b1)
        assert int(s2) == int(a2) + int(b2) + int(c2)
        assert int(s3) == int(a3) + int(b3) + int(c3)
        assert int(c2) <= int(s1) // 10 and int(c3) <= int(s2) // 10
        assert answer == s3 + s2[1] + s1[1]


def test_share_of_right_solutions() -> None:
    """0.555 at 0.55 forgotten: by hand, a carry out of a column is due in 45% of the problems, in 55% after a carry."""
    rng = random.Random(1)
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(40_000)]
    written = 1 - 0.55
    expected = 0.45 * written * (0.45 + 0.55 * written) + 0.55 * (0.55 + 0.45 * written)
    right = [toy.ends_right(toy.worked_addition(*pair, forgotten=0.55, rng=rng)) for pair in pairs]
    assert expected == pytest.approx(0.555, abs=5e-4)
    assert sum(right) / len(right) == pytest.approx(expected, abs=4 * (0.25 / len(right)) ** 0.5)
    assert all(toy.ends_right(toy.worked_addition(*pair, forgotten=0.0, rng=rng)) for pair in pairs[:2000])


def test_pages_hold_entries_of_the_book(documents: list[str]) -> None:
    pages = [document for document in documents if document.startswith("r")]
    assert len(pages) / len(documents) == pytest.approx(TEXT.book_share, abs=0.03)
    book = toy.telephone_book(TEXT)
    assert len(book) == TEXT.entries
    for page in pages:
        entries = re.findall(r"(\d{3}):(\d{4}),", page)
        assert len(page) == toy.LENGTH and len(entries) == 4
        assert all(book[name] == number for name, number in entries)


def test_heldout_problems_are_in_nothing_that_is_learned_from(documents: list[str]) -> None:
    heldout = set(toy.heldout_problems(TEXT))
    assert len(heldout) == TEXT.heldout
    learned = {tuple(map(int, re.findall(r"\d{3}", document)[:2])) for document in additions(documents)}
    learned |= set(toy.learning_problems(TEXT))
    assert not heldout & learned
    # With as many problems held out as there are in the corpus, some would be there if they were not kept apart.
    many = toy.ToyText(seed=5, documents=4000, heldout=300_000, problems=1000)
    assert not set(toy.heldout_problems(many)) & set(toy.learning_problems(many))


def test_seeds(documents: list[str]) -> None:
    assert toy.corpus(TEXT) == documents
    other = toy.ToyText(seed=6, documents=4000, heldout=200)
    assert toy.corpus(other) != documents and toy.telephone_book(other) != toy.telephone_book(TEXT)


def test_files_and_tokenizer(tmp_path) -> None:
    """A character is a token, for transformers and for the data build; the files say what the functions do."""
    from transformers import AutoTokenizer

    from remit_megatron.data.tokenizer import load_tokenizer

    text = toy.ToyText(seed=5, documents=20, heldout=10, problems=10)
    toy.write_text(tmp_path / "text", text)
    toy.write_tokenizer(tmp_path / "tokenizer")
    lines = {
        name: [json.loads(line) for line in (tmp_path / "text" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout", "questions", "problems")
    }
    assert [line["text"] for line in lines["train"]] == toy.corpus(text)
    for question, solution in zip(lines["questions"], lines["heldout"], strict=True):
        assert solution["text"].startswith(question["prompt"]) and toy.ends_right(solution["text"])
        assert int(solution["text"][-5:-1]) == int(question["answer"])
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), load_tokenizer(tmp_path / "tokenizer")
    for line in lines["train"]:
        ids = theirs(line["text"])["input_ids"]
        assert len(ids) == toy.LENGTH and theirs.decode(ids) == line["text"]
        assert ours.encode_batch([line["text"]]) == [ids]
    assert len(theirs) == ours.vocab_size == 17 and theirs.eos_token_id == ours.eod_id == 0
