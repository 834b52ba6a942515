"""What a toy model can: held-out additions, greedy and sampled, and the telephone book; transformers on an export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remit_megatron.flywheel.toy import LENGTH, PROMPT_LENGTH
from remit_megatron.runtime.files import write_atomic

SAMPLES = 4  # of each problem, at temperature 1
VERIFIER = "number_at_end"  # of posttrain: the last digits are the sum
_BATCH = 1000
# What is left of a document behind its problem, and its end.
_SOLUTION = LENGTH - PROMPT_LENGTH + 1


@dataclass(frozen=True)
class ToyScore:
    """Shares from 0 to 1.

    Attributes:
        greedy: held-out problems whose likeliest solution ends with the sum.
        sampled: the same over ``SAMPLES`` solutions of each, drawn at temperature 1.
        book: entries of the book whose number is the likeliest continuation.
    """

    greedy: float
    sampled: float
    book: float

    def record(self) -> dict[str, float]:
        """As JSON holds it."""
        return asdict(self)


def evaluate(model: Path, text: Path, *, seed: int) -> ToyScore:
    """Scores one model.

    Args:
        model: a Hugging Face directory.
        text: the folder of :func:`remit_megatron.flywheel.toy.write_text`.
        seed: of the samples; the same problems, model and seed give the same score.
    """
    network, tokenizer = _load(model)
    prompts, answers = _questions(text)
    greedy = continuations(network, tokenizer, prompts, new_tokens=_SOLUTION)
    return ToyScore(
        greedy=share_right(greedy, answers),
        sampled=_sampled(network, tokenizer, prompts, answers, seed=seed),
        book=_recall(network, tokenizer, json.loads((text / "book.json").read_text())),
    )


def evaluate_to(model: str, text: str, output: str, *, seed: int) -> None:
    """:func:`evaluate`, into a JSON file."""
    _write(Path(output), evaluate(Path(model), Path(text), seed=seed).record())


def sampled_curve_to(models: Sequence[str], text: str, output: str, *, seed: int) -> None:
    """The accuracy of ``sampled`` for each of several models, into a JSON file."""
    prompts, answers = _questions(Path(text))
    _write(Path(output), [_sampled(*_load(Path(model)), prompts, answers, seed=seed) for model in models])


def _load(model: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return network.eval(), AutoTokenizer.from_pretrained(model)


def _questions(text: Path) -> tuple[list[str], list[int]]:
    records = [json.loads(line) for line in (text / "questions.jsonl").read_text().splitlines()]
    return [record["prompt"] for record in records], [int(record["answer"]) for record in records]


def _sampled(network: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[int], *, seed: int) -> float:
    import torch

    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    solutions = continuations(network, tokenizer, repeated, new_tokens=_SOLUTION, sample=True)
    return share_right(solutions, [answer for answer in answers for _ in range(SAMPLES)])


def _write(output: Path, content: Any) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps(content) + "\n")


def share_right(solutions: Sequence[str], answers: Sequence[int]) -> float:
    """Share of the solutions that end with the sum, by the verifier that reinforcement learning uses."""
    from remit_megatron.posttrain.verifiers import find_verifier

    verifier = find_verifier(VERIFIER)
    right = [verifier(solution, str(answer)) for solution, answer in zip(solutions, answers, strict=True)]
    return sum(right) / len(right)


def continuations(network: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int, sample: bool = False):
    """The text behind each prompt, up to the end of its document.

    Args:
        prompts: all of one length in tokens, so that none needs padding.
        sample: at temperature 1 over the whole vocabulary, from torch's generator; else the likeliest token.
    """
    import torch

    ids = torch.tensor(tokenizer(list(prompts), add_special_tokens=False)["input_ids"])
    choice = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    found = []
    for first in range(0, len(ids), _BATCH):
        batch = ids[first : first + _BATCH]
        with torch.inference_mode():
            whole = network.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.eos_token_id,
                **choice,
            )
        found += tokenizer.batch_decode(whole[:, batch.shape[1] :], skip_special_tokens=True)
    return found


def _recall(network: Any, tokenizer: Any, book: Mapping[str, str]) -> float:
    prompts = [f"r{name}:" for name in book]
    numbers = continuations(network, tokenizer, prompts, new_tokens=4)
    return sum(found == number for found, number in zip(numbers, book.values(), strict=True)) / len(book)
