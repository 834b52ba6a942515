"""token_weights and weighted_loss against Eq. 3-6 written here in plain Python float64, and their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remit_megatron.objectives.weights import CENTERINGS, token_weights, weight_error_bound, weighted_loss

EPSILONS = (0.2, 0.0, 0.05, 1.0, None)
ROUNDING = 3 * torch.finfo(torch.float32).eps  # of a weight, which is at most 2
NOT_FINITE = (math.nan, math.inf, -math.inf)


def definition(student, reference, mask, epsilon, centering, documents=None):
    """[b][s] weights (0 where not counted) and the names of Eq. 3-6, one token at a time."""
    weights, deltas, clipped = [], [], []
    for row in range(len(student)):
        counted = [m > 0 and math.isfinite(r) for m, r in zip(mask[row], reference[row], strict=True)]
        delta = [s - r if c else 0.0 for s, r, c in zip(student[row], reference[row], counted, strict=True)]
        for t, use in enumerate(counted):
            if not use:
                weights.append(0.0)
                continue
            group = [
                d
                for u, (d, c) in enumerate(zip(delta, counted, strict=True))
                if c
                and (centering == "sequence" or (centering == "document" and documents[row][u] == documents[row][t]))
            ]
            mean = math.fsum(group) / len(group) if centering != "none" else 0.0
            z = delta[t] - mean
            unclipped = 2 / (1 + math.exp(-z)) if z > -700 else 0.0
            weight = unclipped if epsilon is None else min(max(unclipped, 1 - epsilon), 1 + epsilon)
            weights.append(weight)
            deltas.append(delta[t])
            clipped.append((weight > unclipped) - (weight < unclipped))
    return torch.tensor(weights, dtype=torch.float64).view(len(student), -1), deltas, clipped


finite_loss = st.floats(0, 30, width=32)
any_loss = st.one_of(finite_loss, finite_loss, finite_loss, st.sampled_from((*NOT_FINITE, 1e4, 1e30)))


@st.composite
def batches(draw, reference_values=finite_loss, max_length=9):
    """student, reference [b, s], mask [b, s] and document ids [b, s] (any integers, documents in one piece each)."""
    b, s = draw(st.integers(1, 3)), draw(st.integers(1, max_length))

    def matrix(values):
        return [[draw(values) for _ in range(s)] for _ in range(b)]

    mask = matrix(st.sampled_from((0.0, 1.0, 1.0, 0.5)))
    ids = draw(st.lists(st.integers(-5, 1 << 40), min_size=s, max_size=s, unique=True))
    documents = []
    for ended in matrix(st.booleans()):
        number, row = 0, []
        for end in ended:
            row.append(ids[number])
            number += end
        documents.append(row)
    student, reference = matrix(finite_loss), matrix(reference_values)
    return torch.tensor(student), torch.tensor(reference), torch.tensor(mask), torch.tensor(documents)


@given(batches(any_loss), st.sampled_from(EPSILONS), st.sampled_from(CENTERINGS))
@settings(deadline=None, max_examples=150)
def test_weights_loss_and_statistics_are_those_of_the_equations(batch, epsilon, centering):
    student, reference, mask, documents = batch
    expected, deltas, clipped = definition(
        student.tolist(), reference.tolist(), mask.tolist(), epsilon, centering, documents.tolist()
    )
    counted = (mask > 0) & reference.isfinite()
    options = {"epsilon": epsilon, "centering": centering, "document_ids": documents}
    weights = token_weights(student, reference, mask, **options)
    assert weights.dtype == torch.float32 and not weights.requires_grad and not weights[~counted].any()
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=ROUNDING)

    student.requires_grad_()
    result = weighted_loss(student, reference, mask, **options)
    assert result.counted.dtype == torch.int64 and int(result.counted) == len(deltas)
    true_sum = (expected * student.detach().double()).sum()
    torch.testing.assert_close(result.loss_sum.double(), true_sum, rtol=1e-6, atol=1e-5)
    (gradient,) = torch.autograd.grad(result.loss_sum, student)
    assert torch.equal(gradient, weights), "the gradient of the sum is the weight: it does not flow through w"

    excess = [w - 1 for w in weights[counted].double().tolist()]
    sums = {
        "weight_excess": excess,
        "weight_excess_squared": [e * e for e in excess],
        "delta": deltas,
        "delta_squared": [d * d for d in deltas],
        "student_loss": student[counted].tolist(),
        "dropped_tokens": ((mask > 0) & ~reference.isfinite()).flatten().double().tolist(),
    }
    for name, values in sums.items():
        found = result.statistics[name]
        assert found.shape == () and found.dtype == torch.float32 and not found.requires_grad
        true = torch.tensor(
            math.fsum(values), dtype=torch.float32
        )  # the sum itself may be beyond float32: both infinite
        margin = 1e-6 * math.fsum(abs(v) for v in values)
        torch.testing.assert_close(found, true, rtol=1e-6, atol=margin if math.isfinite(margin) else 0.0)
    # A weight within rounding of the bound may fall on either side of it.
    near = sum(
        abs(abs(w - 1) - (2.0 if epsilon is None else epsilon)) < 2 * ROUNDING for w in weights[counted].tolist()
    )
    for name, side in (("weight_clipped_low", 1), ("weight_clipped_high", -1)):
        count = clipped.count(side)
        assert count - near <= int(result.statistics[name]) <= count + near
    assert set(result.statistics) == {*sums, "weight_clipped_low", "weight_clipped_high"}


@given(batches(any_loss), st.sampled_from(EPSILONS), st.sampled_from(CENTERINGS))
@settings(deadline=None, max_examples=60)
def test_bounds(batch, epsilon, centering):
    student, reference, mask, documents = batch
    weights = token_weights(student, reference, mask, epsilon=epsilon, centering=centering, document_ids=documents)
    counted = (mask > 0) & reference.isfinite()
    low, high = (0.0, 2.0) if epsilon is None else (1 - epsilon, 1 + epsilon)
    assert (weights[counted] >= torch.tensor(low)).all() and (weights[counted] <= torch.tensor(high)).all()
    assert not weights[~counted].any()


@given(batches(), st.sampled_from(EPSILONS), st.sampled_from(CENTERINGS))
@settings(deadline=None, max_examples=60)
def test_models_that_agree_give_weights_of_exactly_one(batch, epsilon, centering):
    student, _, mask, documents = batch
    weights = token_weights(student, student, mask, epsilon=epsilon, centering=centering, document_ids=documents)
    assert torch.equal(weights, (mask > 0).float())


@given(batches(), st.sampled_from(("sequence", "document")), st.floats(-50, 50, width=32))
@settings(deadline=None, max_examples=60)
def test_a_constant_shift_of_the_reference_changes_nothing(batch, centering, shift):
    student, reference, mask, documents = batch
    options = {"epsilon": None, "centering": centering, "document_ids": documents}
    # In float64, so that the shift itself is not rounded.
    shifted = token_weights(student, reference.double() + shift, mask, **options)
    torch.testing.assert_close(shifted, token_weights(student, reference, mask, **options), rtol=0, atol=ROUNDING)
    if shift:
        agreeing = token_weights(student, student.double() + shift, mask, **options)
        torch.testing.assert_close(agreeing, (mask > 0).float(), rtol=0, atol=ROUNDING)


@given(batches(any_loss), st.sampled_from(EPSILONS))
@settings(deadline=None, max_examples=60)
def test_packed_documents_weigh_as_alone(batch, epsilon):
    student, reference, mask, documents = batch
    packed = token_weights(student, reference, mask, epsilon=epsilon, centering="document", document_ids=documents)
    for row in range(student.shape[0]):
        for document in documents[row].unique():
            own = documents[row] == document
            alone = (t[row, own].unsqueeze(0) for t in (student, reference, mask))
            unpacked = token_weights(*alone, epsilon=epsilon, centering="sequence")
            torch.testing.assert_close(packed[row, own], unpacked[0], rtol=0, atol=ROUNDING)


@given(batches(any_loss), st.sampled_from(CENTERINGS))
@settings(deadline=None, max_examples=60)
def test_epsilon_zero_is_next_token_prediction_exactly(batch, centering):
    student, reference, mask, documents = batch
    counted = (mask > 0) & reference.isfinite()
    result = weighted_loss(student, reference, mask, epsilon=0, centering=centering, document_ids=documents)
    weights = token_weights(student, reference, mask, epsilon=0, centering=centering, document_ids=documents)
    assert torch.equal(weights, counted.float())
    assert torch.equal(result.loss_sum, torch.where(counted, student, 0.0).sum())
    assert not result.statistics["weight_excess"].any() and not result.statistics["weight_excess_squared"].any()


@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("bad", NOT_FINITE)
def test_what_is_not_counted_reaches_nothing(centering, bad):
    student = torch.tensor([[1.0, bad, 3.0, bad], [bad, bad, bad, bad], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    reference = torch.tensor([[2.0, 1.0, 1.0, bad], [bad, 1.0, bad, 1.0], [bad, bad, bad, bad]])
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    documents = torch.zeros(3, 4, dtype=torch.int64)
    result = weighted_loss(student, reference, mask, centering=centering, document_ids=documents)
    (gradient,) = torch.autograd.grad(result.loss_sum, student)
    expected = torch.tensor([[0.8, 0, 1.2, 0], [0] * 4, [0] * 4])  # delta -1 and 2: the clip holds on both sides
    assert torch.equal(gradient, expected)
    assert int(result.counted) == 2 and float(result.statistics["dropped_tokens"]) == 4
    assert float(result.statistics["weight_clipped_low"]) == float(result.statistics["weight_clipped_high"]) == 1
    assert torch.isfinite(result.loss_sum) and all(torch.isfinite(v) for v in result.statistics.values())


def test_one_token_sequences_weigh_one():
    student, reference = torch.tensor([[3.7], [0.1]]), torch.tensor([[9.9], [1e4]])
    assert torch.equal(token_weights(student, reference, torch.ones(2, 1)), torch.ones(2, 1))
    assert torch.equal(token_weights(student, reference, torch.ones(2, 1), epsilon=None), torch.ones(2, 1))
    assert torch.equal(token_weights(student, reference, torch.ones(2, 1), centering="none"), torch.full((2, 1), 0.8))


def test_low_precision_losses_are_taken_as_they_are():
    student, reference = torch.rand(2, 9).bfloat16() * 8, torch.rand(2, 9).half() * 8
    mask = torch.ones(2, 9, dtype=torch.bool)
    assert torch.equal(token_weights(student, reference, mask), token_weights(student.float(), reference.float(), mask))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"centering": "token"}, r"centering: found 'token'; expected one of sequence, document, none"),
        ({"centering": "document"}, r"document_ids: found None"),
        ({"centering": "document", "document_ids": torch.zeros(2, 2)}, r"document_ids: found shape \(2, 2\)"),
        ({"epsilon": 1.5}, r"epsilon: found 1.5; expected a number from 0 to 1"),
        ({"epsilon": -0.1}, r"epsilon: found -0.1"),
        ({"reference_loss": torch.zeros(2, 4)}, r"reference_loss: found shape \(2, 4\); expected \(2, 3\)"),
        ({"loss_mask": torch.zeros(3)}, r"loss_mask: found shape \(3,\); expected \(2, 3\)"),
        ({"student_loss": torch.zeros(3)}, r"student_loss: found shape \(3,\); expected \[b, s\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {name: torch.zeros(2, 3) for name in ("student_loss", "reference_loss", "loss_mask")} | change
    with pytest.raises(ValueError, match=message):
        token_weights(**arguments)


def test_boundaries_that_are_given_are_meant():
    """``centering`` left out with ``document_ids`` is "document"; a name that is given wins."""
    generator = torch.Generator().manual_seed(5)
    student, reference = torch.rand(2, 7, generator=generator), torch.rand(2, 7, generator=generator)
    mask, documents = torch.ones(2, 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [4, 4, 2, 2, 2, 2, 2]])
    inputs = (student, reference, mask)
    by_document = token_weights(*inputs, centering="document", document_ids=documents)
    by_sequence = token_weights(*inputs, centering="sequence")
    assert not torch.allclose(by_document, by_sequence)
    assert torch.equal(token_weights(*inputs, document_ids=documents), by_document)
    assert torch.equal(token_weights(*inputs, centering="sequence", document_ids=documents), by_sequence)
    assert torch.equal(token_weights(*inputs), by_sequence)
    assert torch.equal(
        weighted_loss(*inputs, document_ids=documents).loss_sum,
        weighted_loss(*inputs, centering="document", document_ids=documents).loss_sum,
    )
    # Another reference whose loss is higher by a constant within each document moves no weight of document centering.
    shifted = reference + documents.float()
    assert float(weight_error_bound(reference, shifted, mask, document_ids=documents)[0]) < 1e-5
    assert float(weight_error_bound(reference, shifted, mask)[0]) > 0.1
