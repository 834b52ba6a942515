"""Generation on a CPU: the answers are those of transformers' own loop under plain lm-eval, one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from remit_megatron.evaluation.cpu_lm import CpuLM
from remit_megatron.evaluation.greedy import can_decode, decode

SHOTS = "\n\n".join(f"Q: what is {i} + {i}?\nA: {2 * i}" for i in range(12))
ALIKE = [f"{SHOTS}\n\nQ: what is {i} + {7 ** (i % 5)}?\nA:" for i in range(11)]
APART = ["she runs", "it is 4", "which one", "a b c d e f g", "x", "on and on and on"]


def load(kind: type[HFLM], model: Any, batch: int) -> Any:
    return kind.create_from_arg_obj({"pretrained": str(model)}, {"batch_size": str(batch), "device": "cpu"})


def requests(prompts: list[str], **settings: Any) -> list[Instance]:
    settings = {"until": ["Q:"], "do_sample": False, "max_gen_toks": 24, **settings}
    return [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def plain(models):
    return load(HFLM, models["first"], 1)


@pytest.mark.parametrize("prompts", [ALIKE, APART, [*ALIKE[:3], *APART]], ids=["alike", "apart", "both"])
@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_those_of_one_prompt_at_a_time(prompts, batch, plain, models, monkeypatch):
    """Also with stop strings and an end token that end rows at different places."""
    ours = load(CpuLM, models["first"], batch)
    free = plain.generate_until(requests(prompts), disable_tqdm=True)
    stop = free[0][4:6]
    end = plain.tok_encode(free[-1])[5]
    for model in (plain, ours):
        monkeypatch.setattr(model.model.generation_config, "eos_token_id", [end, 0])
    asked = requests(prompts, until=["Q:", stop])
    expected = plain.generate_until(asked, disable_tqdm=True)
    assert len({len(plain.tok_encode(answer)) for answer in expected}) > 1 and expected != free
    monkeypatch.setattr(HFLM, "_model_generate", None)  # the loop is ours
    assert ours.generate_until(asked, disable_tqdm=True) == expected


def test_a_shared_beginning_changes_no_choice(models):
    """In float64 the order of sums does not matter: each token is the choice of a forward pass over the whole text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models["first"], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(3, model.config.vocab_size, (40,), generator=generator).tolist()
    prompts = [
        shared + torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist() for n in (1, 9, 4)
    ]
    known = None
    for _ in range(2):  # the second time the beginning is known
        answers, known = decode(model, prompts, tokens=12, ends=set(), stops=[lambda _: False] * 3, known=known)
        assert len(known.tokens) == 40
        for prompt, answer in zip(prompts, answers, strict=True):
            with torch.no_grad():
                choice = model(torch.tensor([prompt + answer])).logits[0].argmax(-1)
            assert choice[len(prompt) - 1 : -1].tolist() == answer


def test_a_batch_is_what_fits_into_memory(models, monkeypatch):
    import psutil

    ours = load(CpuLM, models["first"], 1)
    ours.find_batch = True
    sizes = []
    monkeypatch.setattr(HFLM, "generate_until", lambda self, *_, **__: sizes.append(self.batch_size))
    for free in (1 << 40, 1 << 22, 0):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: type("", (), {"available": free})())
        ours.generate_until(requests(ALIKE))
    assert sizes[0] == 32 and 1 < sizes[1] < 32 and sizes[2] == 1


def test_what_it_does_not_do_is_left_to_transformers(models):
    model = transformers.AutoModelForCausalLM.from_pretrained(models["first"])
    assert can_decode(model) is None
    model.generation_config.repetition_penalty = 1.2
    assert "repetition_penalty" in (can_decode(model) or "")
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, sliding_window=8,
    )  # fmt: skip
    assert "layers" in (can_decode(transformers.MistralForCausalLM(config)) or "")
    ours, plain = (load(kind, models["first"], 2) for kind in (CpuLM, HFLM))
    for one in (ours, plain):
        one.model.generation_config.no_repeat_ngram_size = 1
    asked = requests(ALIKE[:2])
    assert ours.generate_until(asked, disable_tqdm=True) == plain.generate_until(asked, disable_tqdm=True)
