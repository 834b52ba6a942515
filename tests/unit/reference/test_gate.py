"""The gate before a cheaper reference: the bound that it measures, its verdicts, and what it keeps."""

from __future__ import annotations

import gc
import math
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remit_megatron.models.forward import ModelForward
from remit_megatron.objectives import token_weights, weight_error_bound
from remit_megatron.objectives.weights import CENTERINGS
from remit_megatron.reference.gate import PrecisionGate, Verdict, verdict_line
from tests.unit.objectives.test_weights import EPSILONS, batches

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
FORWARD = ModelForward(eod_id=0, groups=lambda: SimpleNamespace(tp=ALONE, cp=ALONE))
ERROR = partial(weight_error_bound, epsilon=None, centering="sequence")


@given(batches(), st.integers(0, 2**32), st.sampled_from(EPSILONS), st.sampled_from(CENTERINGS))
@settings(deadline=None, max_examples=150)
def test_no_student_moves_the_weights_further_than_the_bound(batch, seed, epsilon, centering):
    student, reference, mask, documents = batch
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** (4 * torch.rand(1, generator=generator) - 3)
    other = reference + spread * torch.randn(reference.shape, generator=generator)
    options = {"epsilon": epsilon, "centering": centering, "document_ids": documents}
    total, counted = weight_error_bound(reference, other, mask, **options)
    assert total.dtype == torch.float64 and int(counted) == int((mask > 0).sum())
    moved = token_weights(student, reference, mask, **options) - token_weights(student, other, mask, **options)
    assert moved.abs().double().sum() <= total + 1e-6 * max(int(counted), 1)


def test_some_student_moves_them_as_far():
    """A token whose centered difference is c, and a student whose own lies half way: the bound is attained."""
    difference = torch.tensor([[1.0, -1.0, 3.0, -3.0]])
    reference, mask = torch.full((1, 4), 2.0), torch.ones(1, 4)
    student = reference + difference / 2
    total, _ = weight_error_bound(reference, reference + difference, mask, epsilon=None)
    moved = token_weights(student, reference, mask, epsilon=None) - token_weights(
        student, reference + difference, mask, epsilon=None
    )
    assert float(moved.abs().sum()) == pytest.approx(float(total), rel=1e-6)
    assert float(total) == pytest.approx(2 * (2 * math.tanh(0.25) + 2 * math.tanh(0.75)))


def test_what_the_bound_does_not_count():
    reference = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])

    def bound(other: Tensor, **options: Any) -> tuple[float, int]:
        total, counted = weight_error_bound(reference, other, mask, **options)
        return float(total), int(counted)

    assert bound(reference + 5.0) == (0.0, 3), "a constant difference moves nothing"
    assert bound(reference + 5.0, centering="none", epsilon=0.2) == (pytest.approx(3 * 0.4), 3), "the clip is 0.4 wide"
    documents = torch.tensor([[7, 7, 3, 3]])
    shifted = reference + torch.tensor([[5.0, 5.0, -1.0, 9.0]])
    assert bound(shifted, centering="document", document_ids=documents) == (0.0, 3)
    assert bound(shifted, epsilon=None)[0] > 1.0
    assert bound(torch.tensor([[1.0, math.nan, 3.0, 4.0]])) == (math.inf, 2)
    assert bound(torch.tensor([[1.0, 2.0, 3.0, math.nan]])) == (0.0, 3), "masked out"
    reference[0, 1] = math.inf
    assert bound(torch.tensor([[1.0, math.nan, 3.0, 4.0]])) == (0.0, 2), "neither scores it"
    with pytest.raises(ValueError, match="centering: found 'batch'"):
        weight_error_bound(reference, reference, mask, centering="batch")


class Source:
    """A reference whose scores are its tokens times a number."""

    def __init__(self, factor: float):
        self.factor, self.calls = factor, 0

    def score(self, schedule: Any, buffers: list[list[dict[str, Any]]], **settings: Any) -> list[Tensor]:
        assert settings == {"seq_length": 4}
        self.calls += 1
        return [item["tokens"].float() * self.factor for item in buffers[-1]]


def step() -> list[list[dict[str, Tensor]]]:
    tokens = torch.tensor([[1, 2, 3, 4], [4, 4, 2, 1]])
    item = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(2, 4)}
    return [[item, {**item, "tokens": tokens + 1}]]


def run(gate: PrecisionGate, steps: int) -> list[list[Tensor]]:
    return [gate.score(None, step(), seq_length=4) for _ in range(steps)]  # type: ignore[arg-type]


def test_a_good_candidate_takes_over_after_the_measurement():
    trusted, candidate, verdicts = Source(1.0), Source(1.001), []
    gate = PrecisionGate(
        candidate, trusted, forward=FORWARD, error=ERROR, batches=3, tolerance=0.005, report=verdicts.append
    )
    assert gate.figures() == {"reference_fp8": "measuring", "reference_weight_error": None}
    scores = run(gate, 5)
    tokens = step()[0][0]["tokens"]
    for number, of_step in enumerate(scores):
        assert torch.equal(of_step[0], tokens.float() * (1.0 if number < 3 else 1.001)), number
    assert (trusted.calls, candidate.calls) == (3, 5)
    (verdict,) = verdicts
    # 0.001 x |token - mean of its sequence| / 2, over both sequences of both microbatches.
    expected = 0.001 * (1.5 + 0.5 + 0.5 + 1.5 + 1.25 + 1.25 + 0.75 + 1.75) / 8 / 2
    assert verdict.accepted and verdict.weight_error == pytest.approx(expected, rel=1e-3)
    assert (verdict.tokens, verdict.batches, verdict.tolerance) == (48, 3, 0.005)
    assert gate.figures() == {"reference_fp8": "accepted", "reference_weight_error": verdict.weight_error}


@pytest.mark.parametrize("factor", [1.1, math.nan, math.inf])
def test_a_bad_candidate_is_let_go(factor):
    trusted, candidate, verdicts = Source(1.0), Source(factor), []
    gate = PrecisionGate(candidate, trusted, forward=FORWARD, error=ERROR, batches=2, report=verdicts.append)
    scores = run(gate, 4)
    assert all(torch.equal(of_step[0], step()[0][0]["tokens"].float()) for of_step in scores)
    assert (trusted.calls, candidate.calls) == (4, 2) and not verdicts[0].accepted
    assert gate.figures()["reference_fp8"] == "rejected"


@pytest.mark.parametrize(("factor", "kept"), [(1.0, "candidate"), (2.0, "trusted")])
def test_only_one_stays_in_memory(factor, kept):
    trusted, candidate = Source(1.0), Source(factor)
    alive = {"trusted": weakref.ref(trusted), "candidate": weakref.ref(candidate)}
    gate = PrecisionGate(candidate, trusted, forward=FORWARD, error=ERROR, batches=1)
    del trusted, candidate
    gc.collect()
    assert all(reference() is not None for reference in alive.values())
    run(gate, 1)
    gc.collect()
    assert {name for name, reference in alive.items() if reference() is not None} == {kept}


def test_without_counted_tokens_nothing_is_accepted():
    buffers = step()
    for item in buffers[0]:
        item["loss_mask"] = torch.zeros(2, 4)
    gate = PrecisionGate(Source(1.0), Source(1.0), forward=FORWARD, error=ERROR, batches=1)
    gate.score(None, buffers, seq_length=4)  # type: ignore[arg-type]
    assert gate.verdict == Verdict(False, math.inf, 0, 1, 0.005)


def test_misuse():
    for name, value in (("batches", 0), ("tolerance", -1.0), ("tolerance", math.nan)):
        with pytest.raises(ValueError, match=f"{name}: found {value}"):
            PrecisionGate(Source(1.0), Source(1.0), forward=FORWARD, error=ERROR, **{name: value})  # type: ignore[arg-type]


def test_verdicts_in_words():
    good, bad = Verdict(True, 0.00213, 16384, 4, 0.005), Verdict(False, math.inf, 20, 1, 0.005)
    assert verdict_line(good, "e4m3 (tensorwise)") == (
        "reference: e4m3 (tensorwise) from here on: token weights differ by at most 0.0021 on average "
        "(16,384 tokens of 4 steps; limit 0.005)"
    )
    assert verdict_line(bad, "e4m3 (tensorwise)") == (
        "reference: e4m3 (tensorwise) is not used: token weights might differ by inf on average "
        "(20 tokens of 1 step; limit 0.005)"
    )
