"""The toy's scores against a loop that knows no batches, caches or generation functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from remit_megatron.flywheel import toy, toy_evaluation


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """``model``, which has learnt five held-out problems and a third of a book by heart, and ``text``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    root = tmp_path_factory.mktemp("toy")
    text = toy.ToyText(seed=2, documents=5, heldout=12, problems=5, entries=9)
    toy.write_text(root / "text", text)
    toy.write_tokenizer(root / "model")
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    solutions = [json.loads(line)["text"] for line in (root / "text/heldout.jsonl").read_text().splitlines()][:5]
    entries = [f"r{name}:{number}," for name, number in list(toy.telephone_book(text).items())[:3]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = torch.zeros(())
        for documents in (solutions, entries):
            ids = torch.tensor([[*tokenizer(document)["input_ids"], 0] for document in documents])
            loss = loss + model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(root / "model")
    return root


def naive(model, tokenizer, prompt: str, length: int) -> str:
    """The likeliest continuation, the whole text through the model for each of its characters."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(length):
        with torch.no_grad():
            chosen = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if chosen == tokenizer.eos_token_id:
            break
        ids.append(chosen)
    return tokenizer.decode(ids)[len(prompt) :]


def test_against_a_naive_loop(place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    questions = [json.loads(line) for line in (place / "text/questions.jsonl").read_text().splitlines()]
    solutions = [naive(model, tokenizer, question["prompt"], 31) for question in questions]
    right = [
        solution[-5:-1].isdigit() and int(solution[-5:-1]) == int(question["answer"])
        for solution, question in zip(solutions, questions, strict=True)
    ]
    book = json.loads((place / "text/book.json").read_text())
    recalled = [naive(model, tokenizer, f"r{name}:", 4) == number for name, number in book.items()]
    assert 0 < sum(right) < len(right) and 0 < sum(recalled) < len(recalled)  # else the test could not fail

    score = toy_evaluation.evaluate(place / "model", place / "text", seed=3)
    assert score.greedy == sum(right) / len(right)
    assert score.book == sum(recalled) / len(recalled)
    prompts = [question["prompt"] for question in questions]
    assert toy_evaluation.continuations(model, tokenizer, prompts, new_tokens=31) == solutions


def test_samples_follow_the_models_distribution(place: Path) -> None:
    """First characters drawn at temperature 1 over the whole vocabulary, by a chi-squared test against its softmax."""
    from scipy import stats
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    prompt = "38"  # of a length that the model has not learnt from, so that no character is certain
    torch.manual_seed(4)
    drawn = toy_evaluation.continuations(model, tokenizer, [prompt] * 4000, new_tokens=1, sample=True)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    expected = torch.softmax(logits.double(), dim=0)
    tokens = ["", *toy.CHARACTERS]
    counts = torch.tensor([drawn.count(token) for token in tokens], dtype=torch.float64)
    assert counts.sum() == 4000
    frequent = expected * 4000 > 5
    observed = torch.cat((counts[frequent], counts[~frequent].sum()[None]))
    wanted = torch.cat((expected[frequent], expected[~frequent].sum()[None])) * 4000
    kept = wanted > 0
    assert frequent.sum() > 2
    assert stats.chisquare(observed[kept], wanted[kept] * observed[kept].sum() / wanted[kept].sum()).pvalue > 1e-4


def test_the_seed_decides_the_samples(place: Path) -> None:
    first, again = (toy_evaluation.evaluate(place / "model", place / "text", seed=3) for _ in range(2))
    assert first == again
    toy_evaluation.sampled_curve_to([str(place / "model")] * 2, str(place / "text"), str(place / "curve.json"), seed=3)
    assert json.loads((place / "curve.json").read_text()) == [first.sampled] * 2
