"""linear_token_loss in one process, with the real objectives, against float64 over the whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remit_megatron.kernels import linear_token_loss, reference_token_loss, token_loss
from remit_megatron.objectives import REGISTRY, ChunkedObjective, build_objective

SEQUENCES, LENGTH, HIDDEN, WIDTH, VOCAB = 5, 12, 24, 50, 47
OBJECTIVES = {
    "remit": ("remit", {}),
    "remit without clip": ("remit", {"epsilon": None}),
    "remit by document": ("remit", {"centering": "document"}),
    "ntp": ("ntp", {}),
    "rho1": ("rho1", {"scope": "sequence", "keep": 0.6}),
    "rho1 global": ("rho1", {"scope": "global_batch"}),
}


def problem(dtype: torch.dtype = torch.float32, sequences: int = SEQUENCES, length: int = LENGTH) -> dict[str, Tensor]:
    """A sequence all masked, one whose first token is masked, one with a single token; one score is missing."""
    generator = torch.Generator().manual_seed(11)
    mask = (torch.rand(sequences, length, generator=generator) > 0.2).float()
    mask[0] = 0
    if sequences > 2 and length > 5:
        mask[1, 0] = 0
        mask[2] = 0
        mask[2, 5] = 1
    labels = torch.randint(VOCAB, (sequences, length), generator=generator)
    labels[mask == 0] = 1 << 40  # never looked at
    reference = torch.rand(sequences, length, generator=generator) * 6
    reference[-1, -1] = torch.nan
    return {
        "hidden": torch.randn(sequences, length, HIDDEN, generator=generator).to(dtype),
        "weight": (torch.randn(WIDTH, HIDDEN, generator=generator) / 3).to(dtype),
        "labels": labels,
        "mask": mask,
        "reference_loss": reference,
        "document_ids": (torch.rand(sequences, length, generator=generator) > 0.7).cumsum(1),
        "order": torch.arange(sequences * length).view(sequences, length),
        "selected": (torch.rand(sequences, length, generator=generator) > 0.5) & (mask > 0) & reference.isfinite(),
    }


def signals(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole[name] for name in ("reference_loss", "document_ids", "order", "selected")}


def truth(whole: dict[str, Tensor], objective, scale: float) -> dict[str, Tensor]:
    """Loss, gradients and result of the whole microbatch; float64 from the hidden states on."""
    hidden, weight = whole["hidden"].double().requires_grad_(), whole["weight"].double().requires_grad_()
    losses = reference_token_loss(hidden @ weight.t(), whole["labels"], vocab_size=VOCAB, loss_mask=whole["mask"])
    result = objective(losses, whole["mask"], **signals(whole))
    (result.loss_sum * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": weight.grad, "result": result}


def through_logits(whole: dict[str, Tensor], objective, scale: float) -> dict[str, Tensor]:
    """The same in the dtype of the model, with the whole logits and `token_loss`."""
    hidden, weight = (whole[name].clone().requires_grad_() for name in ("hidden", "weight"))
    losses = token_loss(hidden @ weight.t(), whole["labels"], vocab_size=VOCAB, loss_mask=whole["mask"])
    (objective(losses, whole["mask"], **signals(whole)).loss_sum * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": weight.grad}


def run(whole: dict[str, Tensor], objective, scale: float, **settings) -> dict[str, Tensor]:
    hidden, weight = (whole[name].clone().requires_grad_() for name in ("hidden", "weight"))
    weighting = ChunkedObjective(objective, whole["mask"], **signals(whole))
    loss_sum, losses = linear_token_loss(
        hidden, weight, whole["labels"], weighting, vocab_size=VOCAB, loss_mask=whole["mask"], **settings
    )
    assert not losses.requires_grad and loss_sum.shape == () and loss_sum.dtype == losses.dtype == torch.float32
    (loss_sum * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"losses": losses, "hidden": hidden.grad, "weight": weight.grad, "result": weighting.result(loss_sum)}


def assert_at_most(found: Tensor, expected: Tensor, plain: Tensor, roundings: float, dtype: torch.dtype) -> None:
    """The error, as a whole, is at most that of the computation through logits and some roundings of the largest."""
    error, plain_error = (found.double() - expected).abs().max(), (plain.double() - expected).abs().max()
    assert error <= plain_error + roundings * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_sequences", [1, 2, 100, None])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_of_float64(name, chunk_sequences, dtype):
    whole, scale = problem(dtype), -1.75
    objective = build_objective(OBJECTIVES[name][0], **OBJECTIVES[name][1])
    expected, plain = truth(whole, objective, scale), through_logits(whole, objective, scale)
    found = run(whole, objective, scale, chunk_sequences=chunk_sequences)
    # A product of another height may round a logit to a neighbor; so both errors have their roundings.
    assert_at_most(found["losses"], expected["losses"], plain["losses"], 2, dtype)
    for which in ("hidden", "weight"):
        assert found[which].dtype == dtype
        assert_at_most(found[which], expected[which], plain[which], 4, dtype)
    assert not found["losses"][whole["mask"] == 0].any() and not found["hidden"][whole["mask"] == 0].any()
    assert not found["weight"][VOCAB:].any() and found["weight"][:VOCAB].any()
    result, true = found["result"], expected["result"]
    assert result.counted == true.counted and result.counted > 10
    assert result.statistics.keys() == true.statistics.keys()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(result.loss_sum.double(), true.loss_sum.double(), rtol=tolerance, atol=0)
    if dtype == torch.float32:
        for key, value in true.statistics.items():
            torch.testing.assert_close(result.statistics[key], value, rtol=1e-4, atol=1e-5)


def test_float32_is_the_computation_through_logits_to_the_last_digits():
    whole, objective = problem(), build_objective("remit")
    found, plain = run(whole, objective, 3.0, chunk_sequences=2), through_logits(whole, objective, 3.0)
    for name in ("losses", "hidden", "weight"):
        torch.testing.assert_close(found[name], plain[name], rtol=2e-5, atol=2e-6)


def test_weights_see_the_whole_sequence_and_no_other():
    """The mean of a chunk in place of that of a sequence would change every weight."""
    whole, objective = problem(), build_objective("remit")
    whole["reference_loss"] += torch.arange(SEQUENCES)[:, None] * 2.0  # means far apart
    together = run(whole, objective, 1.0, chunk_sequences=SEQUENCES)
    for chunk_sequences in (1, 2, 3):
        apart = run(whole, objective, 1.0, chunk_sequences=chunk_sequences)
        torch.testing.assert_close(apart["hidden"], together["hidden"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(apart["weight"], together["weight"], rtol=1e-5, atol=1e-6)


def test_each_token_has_its_own_weight():
    """The first of them zero: a loss that scales every row by the first token's weight gives zeros."""
    whole = problem()
    weights = torch.rand(SEQUENCES, LENGTH) * 4 - 1
    weights[:, 0] = 0.0
    hidden, weight = whole["hidden"].requires_grad_(), whole["weight"].requires_grad_()
    settings = {"vocab_size": VOCAB, "loss_mask": whole["mask"]}
    seen = []

    def weighting(losses: Tensor, sequences: slice) -> Tensor:
        seen.append((sequences, tuple(losses.shape)))
        return (losses * weights[sequences]).sum()

    loss_sum, losses = linear_token_loss(hidden, weight, whole["labels"], weighting, chunk_sequences=2, **settings)
    found = torch.autograd.grad(loss_sum, (hidden, weight))
    assert seen == [(slice(0, 2), (2, LENGTH)), (slice(2, 4), (2, LENGTH)), (slice(4, 5), (1, LENGTH))]
    assert not found[0][:, 0].any() and found[0][1].any()
    plain = token_loss(hidden @ weight.t(), whole["labels"], **settings)
    expected = torch.autograd.grad((plain * weights).sum(), (hidden, weight))
    torch.testing.assert_close(losses, plain.detach(), rtol=1e-6, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 12), (3, 2)])
def test_short_sequences(shape):
    whole, objective = problem(sequences=shape[0], length=shape[1]), build_objective("remit")
    whole["mask"][:] = 1
    whole["labels"] %= VOCAB
    whole["reference_loss"].nan_to_num_(1.0)
    found, expected = run(whole, objective, 1.0, chunk_sequences=1), truth(whole, objective, 1.0)
    for name in ("losses", "hidden", "weight"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-5)


def test_a_microbatch_without_counted_tokens():
    whole = problem()
    whole["mask"][:] = 0
    found = run(whole, build_objective("remit"), 1.0)
    assert found["result"].loss_sum == 0 and found["result"].counted == 0
    assert not any(found[name].any() for name in ("losses", "hidden", "weight"))


def test_leading_axes_and_strides():
    """[s, b, h] as Megatron has it, transposed; a single sequence [s, h]; more axes."""
    whole = problem()
    labels = whole["labels"].where(whole["mask"] > 0, -100)
    sums = []
    for hidden, target in (
        (whole["hidden"].transpose(0, 1).contiguous().transpose(0, 1), labels),
        (whole["hidden"].view(1, SEQUENCES, LENGTH, HIDDEN), labels.view(1, SEQUENCES, LENGTH)),
    ):
        leaf = hidden.clone(memory_format=torch.preserve_format).requires_grad_()
        loss_sum, losses = linear_token_loss(
            leaf, whole["weight"], target, lambda losses, _: losses.sum(), vocab_size=VOCAB, chunk_sequences=2
        )
        (gradient,) = torch.autograd.grad(loss_sum, leaf)
        assert gradient.shape == hidden.shape and losses.shape == target.shape
        sums.append((loss_sum.item(), gradient.reshape(-1)))
    assert sums[0][0] == sums[1][0] and torch.equal(sums[0][1], sums[1][1])
    one, losses = linear_token_loss(
        whole["hidden"][3], whole["weight"], labels[3], lambda losses, _: losses.sum(), vocab_size=VOCAB
    )
    assert losses.shape == (LENGTH,) and one == losses.sum()


def test_tied_weight():
    """The weight is the embedding too: its two gradients add up."""
    whole, objective = problem(), build_objective("remit")
    tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH))
    settings = {"vocab_size": VOCAB, "loss_mask": whole["mask"]}

    def gradient(linear: bool) -> Tensor:
        weight = whole["weight"].clone().requires_grad_()
        hidden = torch.tanh(weight[tokens] * 2)
        if linear:
            weighting = ChunkedObjective(objective, whole["mask"], **signals(whole))
            loss, _ = linear_token_loss(hidden, weight, whole["labels"], weighting, chunk_sequences=2, **settings)
        else:
            losses = token_loss(hidden @ weight.t(), whole["labels"], **settings)
            loss = objective(losses, whole["mask"], **signals(whole)).loss_sum
        loss.backward()
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_only_the_gradients_that_are_wanted(which):
    whole, objective = problem(), build_objective("remit")
    expected = run(whole, objective, 1.0)[which]
    inputs = {name: whole[name].clone().requires_grad_(name == which) for name in ("hidden", "weight")}
    weighting = ChunkedObjective(objective, whole["mask"], **signals(whole))
    settings = {"vocab_size": VOCAB, "loss_mask": whole["mask"]}
    loss, _ = linear_token_loss(inputs["hidden"], inputs["weight"], whole["labels"], weighting, **settings)
    (gradient,) = torch.autograd.grad(loss, inputs[which])
    assert torch.equal(gradient, expected)


def test_without_gradients():
    whole, objective = problem(), build_objective("remit")
    expected = run(whole, objective, 1.0, chunk_sequences=2)
    settings = {"vocab_size": VOCAB, "loss_mask": whole["mask"], "chunk_sequences": 2}
    hidden = whole["hidden"].requires_grad_()
    weighting = ChunkedObjective(objective, whole["mask"], **signals(whole))
    with torch.no_grad():
        loss_sum, losses = linear_token_loss(hidden, whole["weight"], whole["labels"], weighting, **settings)
    assert not loss_sum.requires_grad and loss_sum == expected["result"].loss_sum.detach()
    assert torch.equal(losses, expected["losses"])


def test_weight_gradient_in_the_dtype_of_the_weight():
    """Rounded once more with each chunk, so a little worse than float32 at most, and no wide buffer."""
    whole, objective = problem(torch.bfloat16), build_objective("remit")
    expected = truth(whole, objective, 1.0)["weight"]
    narrow = run(whole, objective, 1.0, chunk_sequences=1, weight_grad_dtype=torch.bfloat16)["weight"]
    margin = (SEQUENCES + 4) * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert narrow.dtype == torch.bfloat16 and (narrow.double() - expected).abs().max() <= margin


def test_backward_twice_and_double_backward_are_refused():
    whole = problem()
    hidden, weight = whole["hidden"].requires_grad_(), whole["weight"]
    labels = whole["labels"].where(whole["mask"] > 0, -100)
    loss, _ = linear_token_loss(hidden, weight, labels, lambda losses, _: losses.sum(), vocab_size=VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    loss, _ = linear_token_loss(hidden, weight, labels, lambda losses, _: losses.sum(), vocab_size=VOCAB)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(3, 4, 8).half(), "weight": torch.zeros(9, 8).half()}, r"found torch.float16"),
        ({"weight": torch.zeros(9, 8).bfloat16()}, r"found torch.float32, torch.bfloat16"),
        ({"weight": torch.zeros(9, 7)}, r"shapes \(3, 4, 8\), \(9, 7\)"),
        ({"labels": torch.zeros(4, 3, dtype=torch.int64)}, r"labels: found shape \(4, 3\); expected \(3, 4\)"),
        ({"labels": torch.full((3, 4), 9)}, r"labels: found 9 at flat position 0; expected 0 to 8"),
        ({"chunk_sequences": 0}, r"chunk_sequences: found 0; expected at least 1"),
        ({"weight_grad_dtype": torch.bfloat16}, r"weight_grad_dtype: found torch.bfloat16"),
        ({"weighting": lambda losses, _: losses}, r"weighting: found shape \(3, 4\); expected a tensor of shape \(\)"),
        ({"weighting": lambda losses, _: 0.0}, r"weighting: found float"),
        ({"impl": "cuda"}, r"impl: found 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4, 8),
        "weight": torch.zeros(9, 8),
        "labels": torch.zeros(3, 4, dtype=torch.int64),
        "weighting": lambda losses, _: losses.sum(),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_token_loss(**arguments)


@pytest.mark.parametrize("name, settings", [("kd", {}), ("rho1", {"scope": "micro_batch"})])
def test_objectives_that_need_more_than_sequences_are_refused(name, settings):
    with pytest.raises(ValueError, match=r"expected one that takes each sequence alone"):
        ChunkedObjective(build_objective(name, **settings), torch.ones(2, 3))


def test_every_objective_says_whether_it_goes_by_sequence():
    assert {name: kind().by_sequence for name, kind in REGISTRY.items()} == {
        "kd": False,
        "ntp": True,
        "remit": True,
        "rho1": True,
    }


class Storages(TorchDispatchMode):
    """Bytes of the storages that operations make, by their size; those in ``known`` aside."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.known, self.sizes = {t.untyped_storage().data_ptr() for t in known}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.sizes.add(tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_of_logits_exists(dtype):
    """Beside it the gradients that are returned, and what the loss needs; nothing in float32 of a chunk's size."""
    sequences, length, vocab, size = 16, 64, 16384, 8
    hidden = torch.randn(sequences, length, size).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (sequences, length))
    with Storages(hidden, weight) as seen:
        loss, _ = linear_token_loss(hidden, weight, labels, lambda losses, _: losses.sum(), chunk_sequences=4)
        loss.backward()
    chunk = 4 * length * vocab * hidden.element_size()
    largest = sorted(seen.sizes)
    assert largest[-1] == chunk and sequences == 16, "a quarter of the microbatch's"
    assert all(size <= 4 << 20 for size in largest[:-1]), "the loss's own buffer at most"
