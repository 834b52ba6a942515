"""rho1 and kd against definitions written out in float64 and plain Python."""

from __future__ import annotations

import math
from argparse import Namespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from remit_megatron.kernels import distillation_loss, token_loss
from remit_megatron.objectives import REGISTRY, ScoredTokens, build_objective, settings_of
from remit_megatron.objectives.kd import Distillation
from remit_megatron.objectives.rho1 import SCOPES, Rho1
from remit_megatron.objectives.selection import select_global, selection_keys
from remit_megatron.runtime.errors import UserError

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def microbatches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Uneven masks: a sequence all masked, one with the first token masked, one with a single token; ties; a score that
    is missing."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for number in range(count):
        student = (torch.rand(5, 20, generator=generator) * 4).requires_grad_()
        reference = torch.rand(5, 20, generator=generator) * 4
        mask = (torch.rand(5, 20, generator=generator) > 0.3).float()
        mask[0] = 0
        mask[1, 0] = 0
        mask[2] = 0
        mask[2, 11] = 1
        with torch.no_grad():
            student[3] = torch.randint(3, (20,), generator=generator)  # many equal differences
            reference[3] = 0
            student[0, 2] = torch.nan
        mask[4, 5] = 1
        reference[4, 5] = torch.nan
        order = torch.arange(100).view(5, 20) + 100 * number
        made.append({"student": student, "reference": reference, "mask": mask, "order": order})
    return made


def expected_kept(batches: list[dict[str, torch.Tensor]], keep: float, scope: str) -> list[set[tuple[int, int]]]:
    """Sorts in plain Python: groups of (excess, position), the largest first, and of equal ones the earliest."""
    groups: dict[object, list] = {}
    for number, batch in enumerate(batches):
        for row in range(5):
            for column in range(20):
                reference = batch["reference"][row, column].item()
                if batch["mask"][row, column] > 0 and math.isfinite(reference):
                    key = {"sequence": (number, row), "micro_batch": number, "global_batch": 0}[scope]
                    excess = (batch["student"][row, column].detach() - batch["reference"][row, column]).item()
                    groups.setdefault(key, []).append((-excess, number, row, column))
    kept: list[set[tuple[int, int]]] = [set() for _ in batches]
    for group in groups.values():
        count = max(1, math.floor(keep * len(group) + 0.5))
        for _, number, row, column in sorted(group)[:count]:
            kept[number].add((row, column))
    return kept


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.01, 1.0])
def test_rho1_is_its_definition(scope, keep):
    batches = microbatches()
    objective = Rho1(keep=keep, scope=scope)
    selected: list = [None] * len(batches)
    if objective.needs_global_batch:
        tokens = [ScoredTokens(b["student"].detach(), b["reference"], b["mask"], b["order"]) for b in batches]
        selected = objective.select(tokens)
    for batch, chosen, kept in zip(batches, selected, expected_kept(batches, keep, scope), strict=True):
        result = objective(
            batch["student"], batch["mask"], reference_loss=batch["reference"], order=batch["order"], selected=chosen
        )
        where = tuple(torch.tensor(sorted(kept)).t()) if kept else (torch.tensor([], dtype=torch.long),) * 2
        losses = batch["student"].detach().double()[where]
        deltas = losses - batch["reference"].double()[where]
        assert int(result.counted) == len(kept)
        torch.testing.assert_close(result.loss_sum.double(), losses.sum(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.statistics["delta"].double(), deltas.sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            result.statistics["delta_squared"].double(), deltas.square().sum(), rtol=1e-5, atol=1e-5
        )
        assert int(result.statistics["dropped_tokens"]) == 1
        (gradient,) = torch.autograd.grad(result.loss_sum, batch["student"])
        expected = torch.zeros_like(gradient)
        expected[where] = 1
        assert torch.equal(gradient, expected), "one where kept, exactly zero elsewhere, a NaN there or not"


def test_the_ties_of_the_test_are_at_the_threshold():
    batches = microbatches(1)
    mask, values = batches[0]["mask"][3] > 0, batches[0]["student"][3].detach()
    count = math.floor(0.8 * int(mask.sum()) + 0.5)
    threshold = values[mask].sort(descending=True).values[count - 1]
    assert (values[mask] >= threshold).sum() > count > (values[mask] > threshold).sum()


@pytest.mark.parametrize("scope", SCOPES)
def test_one_counted_token_and_none(scope):
    objective = Rho1(keep=0.2, scope=scope)
    for counted in (1, 0):
        loss, mask = torch.full((1, 4), 2.5, requires_grad=True), torch.zeros(1, 4)
        mask[0, 2] = counted
        zeros, order = torch.zeros(1, 4), torch.arange(4).view(1, 4)
        tokens = ScoredTokens(loss.detach(), zeros, mask, order)
        selected = objective.select([tokens])[0] if objective.needs_global_batch else None
        result = objective(loss, mask, reference_loss=zeros, order=order, selected=selected)
        assert int(result.counted) == counted and result.loss_sum.item() == 2.5 * counted


def test_keys_order_as_numbers_do():
    values = torch.tensor([-torch.inf, -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1.5, 3e38, torch.inf, -torch.nan])
    order = torch.arange(len(values))
    keys = selection_keys(values, order, torch.ones(len(values), dtype=torch.bool)).tolist()
    assert min(keys) >= 0
    # -0 and 0 are one value, of which the earlier wins; NaN ranks with inf, and that one came earlier.
    assert sorted(range(len(keys)), key=keys.__getitem__) == [0, 1, 2, 3, 5, 4, 6, 7, 8, 10, 9]
    assert selection_keys(values, order, torch.zeros(len(values), dtype=torch.bool)).tolist() == [-1] * len(values)


def test_a_threshold_in_every_digit():
    """Keys that first differ in the highest, a middle and the lowest 16 bits."""
    for values, order in (
        (torch.linspace(-8, 8, 97), torch.arange(97)),
        (torch.full((97,), 1.0) + torch.arange(97) * 2**-23, torch.arange(97)),
        (torch.ones(97), torch.arange(97) * 22_000_000),
    ):
        keys = selection_keys(values, order, torch.ones(97, dtype=torch.bool))
        (kept,) = select_global([keys], 0.37)
        threshold = keys.sort(descending=True).values[35]  # 0.37 * 97 = 35.89
        assert torch.equal(kept, keys >= threshold) and int(kept.sum()) == 36


# Distillation.


def definition(x, y, labels, counted, vocab_size, temperature, ntp_weight):
    """float64, differentiable: logits [T, V] to the loss and the negative log-likelihood [T]."""
    x, y = (t.double()[:, :vocab_size].masked_fill(~counted[:, None], 0.0) for t in (x, y))
    p = torch.softmax(y / temperature, -1)
    kl = (p * (torch.log_softmax(y / temperature, -1) - torch.log_softmax(x / temperature, -1))).sum(-1)
    nll = -torch.log_softmax(x, -1)[torch.arange(len(x)), labels.where(counted, 0)]
    loss = (1 - ntp_weight) * temperature**2 * kl + ntp_weight * nll
    return loss * counted, nll * counted


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize(("temperature", "ntp_weight"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.3), (1.0, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_distillation_is_its_definition(dtype, temperature, ntp_weight, chunk_tokens):
    generator = torch.Generator().manual_seed(3)
    tokens, width, vocab_size, size = 17, 29, 26, 8
    x = (torch.randn(tokens, width, generator=generator) * 3).to(dtype)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype)
    weight = torch.randn(width, size, generator=generator).to(dtype)
    labels = torch.randint(vocab_size, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) > 0.3).float()
    mask[0], labels[4] = 0, -100
    incoming = torch.randn(tokens, generator=generator)
    x[mask == 0], x[:, vocab_size:] = torch.nan, torch.nan
    weight[vocab_size:] = torch.nan
    incoming[mask == 0] = torch.nan
    counted = (mask > 0) & (labels != -100)
    y = hidden @ weight.t()  # rounded to the dtype, as a model's logits are

    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    memory = logits.data_ptr()
    loss, nll = distillation_loss(
        logits,
        labels,
        hidden,
        weight,
        temperature=temperature,
        ntp_weight=ntp_weight,
        vocab_size=vocab_size,
        loss_mask=mask,
        chunk_tokens=chunk_tokens,
    )
    assert loss.dtype == nll.dtype == torch.float32 and not nll.requires_grad
    (gradient,) = torch.autograd.grad(loss, logits, incoming)
    assert gradient.data_ptr() == memory and gradient.dtype == dtype, "written over the logits"

    true_x = x.double().requires_grad_()
    true_loss, true_nll = definition(true_x, y, labels, counted, vocab_size, temperature, ntp_weight)
    (true_gradient,) = torch.autograd.grad(true_loss, true_x, incoming.double().where(counted, 0.0))
    torch.testing.assert_close(loss.double(), true_loss.detach(), rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(nll.double(), true_nll.detach(), rtol=2e-6, atol=2e-6)
    assert not gradient[~counted].any() and not gradient[:, vocab_size:].any()
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=EPS[dtype] + 1e-5, atol=4e-6)


def test_models_that_agree_have_no_divergence_and_no_gradient():
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(6, 9, generator=generator), torch.randn(40, 9, generator=generator) * 1000
    logits = (hidden @ weight.t()).requires_grad_()
    loss, _ = distillation_loss(logits, torch.zeros(6, dtype=torch.long), hidden, weight, chunk_tokens=6)
    loss.sum().backward()
    assert logits.grad is not None and not loss.any() and not logits.grad.any()


def test_logits_of_minus_infinity():
    """A column that both models rule out changes nothing."""
    hidden, weight = torch.randn(3, 4), torch.randn(6, 4)
    x, labels = torch.randn(3, 6), torch.tensor([0, 1, 2])
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    expected = distillation_loss(x[:, :5].contiguous(), labels, hidden, weight[:5], temperature=2.0)
    x[:, 5], weight[5], weight[5, 0] = -torch.inf, 0.0, -torch.inf
    found = distillation_loss(x, labels, hidden, weight, temperature=2.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_ntp_weight_one_is_the_token_loss():
    generator = torch.Generator().manual_seed(6)
    x, labels = torch.randn(8, 30, generator=generator), torch.randint(30, (8,), generator=generator)
    hidden, weight = torch.randn(8, 4, generator=generator), torch.randn(30, 4, generator=generator)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, nll = distillation_loss(one, labels, hidden, weight, ntp_weight=1.0)
    expected = token_loss(other, labels)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-6)
    assert one.grad is not None and other.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6)


def test_distillation_is_backward_once():
    x = torch.randn(2, 5, requires_grad=True)
    arguments = (torch.tensor([0, 1]), torch.randn(2, 3), torch.randn(5, 3))
    loss, _ = distillation_loss(x * 1, *arguments)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(loss.sum(), x, create_graph=True)
    loss, _ = distillation_loss(x * 1, *arguments)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="found a second backward"):
        loss.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 5])}, "labels: found 5 at flat position 1; expected 0 to 4"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels: found shape \(3,\)"),
        ({"reference_hidden": torch.zeros(3, 3)}, r"reference_hidden: found shape \(3, 3\)"),
        ({"reference_weight": torch.zeros(4, 3)}, r"reference_weight: found shape \(4, 3\); expected \(5, 3\)"),
        ({"reference_weight": torch.zeros(5, 3).half()}, "expected the same one of"),
        ({"logits": torch.zeros(2, 5).double()}, "logits: found torch.float64"),
        ({"logits": torch.zeros(5, 2).t()}, "expected a contiguous tensor"),
        ({"temperature": 0.0}, "temperature: found 0.0"),
        ({"ntp_weight": 1.5}, "ntp_weight: found 1.5"),
        ({"chunk_tokens": 0}, "chunk_tokens: found 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "logits": torch.zeros(2, 5),
        "labels": torch.tensor([0, 1]),
        "reference_hidden": torch.zeros(2, 3),
        "reference_weight": torch.zeros(5, 3),
    }
    with pytest.raises(ValueError, match=message):
        distillation_loss(**(arguments | change))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, views left out."""

    def __init__(self):
        super().__init__()
        self.elements, self.known = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_of_the_size_of_the_logits_is_made(masked):
    tokens, width, size = 96, 500, 4
    logits = torch.randn(tokens, width, requires_grad=True) * 1
    hidden, weight, labels = torch.randn(tokens, size), torch.randn(width, size), torch.arange(tokens)
    mask = torch.ones(tokens)
    mask[::3] = float(not masked)
    with LargestTensor() as largest:
        largest.known = {t.untyped_storage().data_ptr() for t in (logits, hidden, weight, labels, mask)}
        loss, _ = distillation_loss(
            logits, labels, hidden, weight, temperature=2.0, ntp_weight=0.1, loss_mask=mask, chunk_tokens=4
        )
        torch.autograd.grad(loss.sum(), logits)
    assert 4 * width <= largest.elements < 8 * width


def test_kd_counts_the_tokens_of_the_mask():
    loss = torch.tensor([[1.0, torch.nan, 3.0]], requires_grad=True)
    result = Distillation()(loss, torch.tensor([[1.0, 0.0, 1.0]]))
    result.loss_sum.backward()
    assert result.loss_sum.item() == 4 and int(result.counted) == 2
    assert loss.grad is not None and loss.grad.tolist() == [[1.0, 0.0, 1.0]]


# The registry.


def test_settings_are_keys_of_the_configuration():
    from dataclasses import fields

    from remit_megatron.run.configuration import ObjectiveConfig

    known = {item.name: item.default for item in fields(ObjectiveConfig)}
    for name in REGISTRY:
        for setting in settings_of(name):
            assert setting in known, f"objective.{setting}"
            assert getattr(build_objective(name), setting) == known[setting], "one default"
    assert settings_of("rho1") == ("keep", "scope") and settings_of("ntp") == ()


def test_dropout_is_refused_beside_a_global_selection():
    from remit_megatron.run.checks import check_dropout
    from remit_megatron.run.configuration import ObjectiveConfig, RunConfig

    config = RunConfig(objective=ObjectiveConfig(name="rho1", scope="global_batch"))
    check_dropout(config, Namespace(hidden_dropout=0.0, attention_dropout=0.0))
    with pytest.raises(
        UserError, match=r"^megatron.attention_dropout: found 0.1; expected 0 with objective.scope glob"
    ):
        check_dropout(config, Namespace(hidden_dropout=0.0, attention_dropout=0.1))


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("rho1", {"keep": 0.0}, "objective.keep: found 0.0; expected a number above 0 and at most 1"),
        ("rho1", {"scope": "batch"}, "objective.scope: found batch; expected one of micro_batch, sequence,"),
        ("kd", {"temperature": 0.0}, "objective.temperature: found 0.0; expected a number above 0"),
        (
            "kd",
            {"temperature": 101.0},
            "objective.temperature: found 101.0; expected a number above 0: 0.01 to 100, where float32",
        ),
        ("kd", {"ntp_weight": -0.1}, "objective.ntp_weight: found -0.1; expected a number from 0 to 1"),
        ("rho", {}, "objective.name: found rho; expected one of kd, ntp, remit, rho1"),
    ],
)
def test_wrong_settings(name, settings, line):
    with pytest.raises(UserError) as caught:
        build_objective(name, **settings)
    assert str(caught.value).startswith(line)
