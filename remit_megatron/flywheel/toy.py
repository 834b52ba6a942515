"""The toy text: worked additions in which carries are forgotten, between pages of a telephone book.

    157+664:7+4=11,5+6+1=12,1+6+1=08,0821;      an addition: columns from the right, then the answer of four digits
    r473:7472,460:7831,013:4793,131:3872,;      a page: entries of a fixed book

Both have 38 characters, and a character is a token. A carry that is due is written as 0 with probability ``forgotten``
and the rest of the solution agrees with what was written, so that a solution can end wrong although every column is
right. The held-out problems are in no file that is trained on. The book is what an objective can cost: knowledge that
the reference has no more of than the student.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from remit_megatron.runtime.files import write_atomic

LENGTH = 38
END = "<|endoftext|>"
CHARACTERS = "0123456789+=:,;r"
PROMPT_LENGTH = len("157+664:")
_OPERANDS = 1000
_ENTRIES_A_PAGE = 4


@dataclass(frozen=True)
class ToyText:
    """What is written.

    Attributes:
        seed: of everything that is drawn.
        documents: of the corpus.
        forgotten: probability that a carry that is due is written as 0.
        book_share: share of the corpus that is pages of the book, 0 to 1.
        entries: of the book.
        heldout: problems that are kept out of the corpus and of reinforcement learning.
        problems: for reinforcement learning.
    """

    seed: int = 1234
    documents: int = 40_000
    forgotten: float = 0.55
    book_share: float = 0.3
    entries: int = 150
    heldout: int = 500
    problems: int = 4000


def prompt(first: int, second: int) -> str:
    """The problem as a model sees it, ``157+664:``."""
    return f"{first:03d}+{second:03d}:"


def worked_addition(first: int, second: int, *, forgotten: float, rng: random.Random) -> str:
    """An addition of two numbers of up to three digits, worked column by column; 38 characters.

    Args:
        forgotten: probability that a carry that is due is written as 0; the solution goes on with what is written.
    """
    columns, answer, carry = [], "", 0
    for place in range(3):
        digits = [number // 10**place % 10 for number in (first, second)]
        terms = digits if place == 0 else [*digits, carry]
        total = sum(terms)
        columns.append(f"{'+'.join(map(str, terms))}={total:02d}")
        carry = int(total >= 10 and rng.random() >= forgotten)
        # The last column keeps both of its digits: no carry leaves it.
        answer = (f"{total:02d}" if place == 2 else str(total % 10)) + answer
    return f"{prompt(first, second)}{','.join(columns)},{answer};"


def ends_right(document: str) -> bool:
    """Whether the last four digits of an addition are its sum."""
    problem, _, _ = document.partition(":")
    first, second = map(int, problem.split("+"))
    return int(document[-5:-1]) == first + second


def telephone_book(text: ToyText) -> dict[str, str]:
    """Name of three digits -> number of four."""
    rng = random.Random(f"book {text.seed}")
    return {f"{name:03d}": f"{rng.randrange(10_000):04d}" for name in rng.sample(range(1000), text.entries)}


def page(names: Iterable[str], book: Mapping[str, str]) -> str:
    """A page of four entries; 38 characters."""
    return "r" + "".join(f"{name}:{book[name]}," for name in names) + ";"


def heldout_problems(text: ToyText) -> list[tuple[int, int]]:
    """Different pairs of numbers from 0 to 999."""
    rng = random.Random(f"held-out {text.seed}")
    return [divmod(number, _OPERANDS) for number in rng.sample(range(_OPERANDS**2), text.heldout)]


def corpus(text: ToyText) -> list[str]:
    """Additions and pages in random order; the same problem may come twice, a held-out one never does."""
    rng = random.Random(f"corpus {text.seed}")
    book, heldout = telephone_book(text), set(heldout_problems(text))
    names = sorted(book)
    documents = []
    for _ in range(text.documents):
        if rng.random() < text.book_share:
            documents.append(page(rng.sample(names, _ENTRIES_A_PAGE), book))
        else:
            documents.append(worked_addition(*_other(heldout, rng), forgotten=text.forgotten, rng=rng))
    return documents


def learning_problems(text: ToyText) -> list[tuple[int, int]]:
    """Problems for reinforcement learning, none of them held out."""
    rng = random.Random(f"problems {text.seed}")
    heldout = set(heldout_problems(text))
    return [_other(heldout, rng) for _ in range(text.problems)]


def _other(heldout: Set[tuple[int, int]], rng: random.Random) -> tuple[int, int]:
    while (pair := (rng.randrange(_OPERANDS), rng.randrange(_OPERANDS))) in heldout:
        pass
    return pair


def write_text(directory: Path, text: ToyText) -> None:
    """Writes the files of the chain.

    ``train.jsonl`` the corpus; ``heldout.jsonl`` right solutions of the held-out problems (both ``{"text"}``);
    ``questions.jsonl`` the held-out problems and ``problems.jsonl`` those to learn from (``{"prompt", "answer"}``);
    ``book.json`` the book.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng, heldout = random.Random(0), heldout_problems(text)
    right = [worked_addition(*pair, forgotten=0.0, rng=rng) for pair in heldout]
    _write_lines(directory / "train.jsonl", ({"text": document} for document in corpus(text)))
    _write_lines(directory / "heldout.jsonl", ({"text": document} for document in right))
    for name, pairs in (("questions", heldout), ("problems", learning_problems(text))):
        _write_lines(directory / f"{name}.jsonl", ({"prompt": prompt(*p), "answer": str(sum(p))} for p in pairs))
    write_atomic(directory / "book.json", json.dumps(telephone_book(text), indent=0) + "\n")


def _write_lines(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def write_tokenizer(directory: Path) -> None:
    """A tokenizer with an entry for each character that the text has, and one for the end of a document: 17."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {END: 0} | {character: number for number, character in enumerate(CHARACTERS, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.add_special_tokens([END])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    write_atomic(directory / "tokenizer_config.json", json.dumps(settings) + "\n")
