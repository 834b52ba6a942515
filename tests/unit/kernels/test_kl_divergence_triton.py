"""The Triton kernels of the divergence on the CPU, in Triton's interpreter, against float64 and the torch operations.

As in test_token_loss_triton.py, all cases run in one process of their own, which leaves its results in a file.
"""

import sys

import pytest
import torch

from remit_megatron.kernels import kl_divergence
from remit_megatron.kernels.kl_divergence import distillation_loss
from remit_megatron.kernels.vocab_shard import VocabShard
from tests.unit.kernels.interpreter import run_interpreted

EPS = {"float32": torch.finfo(torch.float32).eps, "bfloat16": torch.finfo(torch.bfloat16).eps}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETTINGS = [(1.0, 0.0), (2.0, 0.0), (2.0, 0.3), (1.0, 0.5), (0.5, 1.0)]  # temperature, share of next-token prediction
SIZES = [(16, 16), (53, 50), (64, 43), (64, 5), (7, 7)]  # width, vocabulary; blocks are 16 columns wide
KINDS = ["normal", "huge", "shifted", "low first block"]
CASES = [("float32", size, "normal", SETTINGS[2]) for size in SIZES]
CASES += [(dtype, (53, 50), "normal", setting) for dtype in DTYPES for setting in SETTINGS if setting != SETTINGS[2]]
CASES += [("bfloat16", (53, 50), "normal", SETTINGS[2])]
CASES += [("float32", (53, 50), kind, setting) for kind in KINDS[1:] for setting in SETTINGS[:3]]
SHARDS = [(0, 23), (23, 1), (24, 29), (53, 16)]  # start, columns in memory; ids from 60 on are padding
TOKENS, HIDDEN = 9, 6


def inputs(dtype: str, size: tuple[int, int], kind: str) -> dict[str, torch.Tensor]:
    """What does not count, and padding, holds NaN."""
    width, vocab_size = size
    generator = torch.Generator().manual_seed(width + vocab_size)
    x = torch.randn(TOKENS, width, generator=generator) * 3
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(width, HIDDEN, generator=generator)
    if kind == "huge":
        x, weight = x * 1e4, weight * 1e4
    elif kind == "shifted":  # the same distribution far away: differences of maxima must not cost digits
        x = x + 1e4
    elif kind == "low first block":
        x[:, :16], weight[:16] = -1e30, 0.0
        weight[:16, 0], hidden[:, 0] = -1e30, 1.0
    labels = torch.randint(min(16, vocab_size - 1), vocab_size, (TOKENS,), generator=generator)
    mask = (torch.arange(TOKENS) % 4 != 1).float()
    incoming = torch.randn(TOKENS, generator=generator)
    incoming[0] = 0.0
    x[mask == 0], x[:, vocab_size:], weight[vocab_size:] = torch.nan, torch.nan, torch.nan
    incoming[mask == 0], labels[mask == 0] = torch.nan, 1 << 40
    numbers = {"x": x.to(DTYPES[dtype]), "hidden": hidden.to(DTYPES[dtype]), "weight": weight.to(DTYPES[dtype])}
    return numbers | {"labels": labels, "mask": mask, "incoming": incoming}


def run(dtype: str, size: tuple[int, int], kind: str, setting: tuple[float, float]) -> dict[str, torch.Tensor]:
    whole = inputs(dtype, size, kind)
    leaf = whole["x"].requires_grad_()
    logits = leaf * 1
    loss, nll = distillation_loss(
        logits,
        whole["labels"],
        whole["hidden"],
        whole["weight"],
        temperature=setting[0],
        ntp_weight=setting[1],
        vocab_size=size[1],
        loss_mask=whole["mask"],
        chunk_tokens=4,
        impl="triton",
    )
    version = logits._version
    (gradient,) = torch.autograd.grad(loss, logits, whole["incoming"])
    in_place = torch.tensor(gradient.data_ptr() == logits.data_ptr() and logits._version > version)
    return {"loss": loss.detach(), "nll": nll, "gradient": gradient.detach(), "in_place": in_place}


def run_equal() -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(6, 9, generator=generator), torch.randn(40, 9, generator=generator) * 1000
    logits = (hidden @ weight.t()).requires_grad_()
    labels = torch.zeros(6, dtype=torch.long)
    loss, _ = distillation_loss(logits, labels, hidden, weight, chunk_tokens=6, temperature=2.0, impl="triton")
    loss.sum().backward()
    return loss.detach(), logits.grad


def shard_problem(start: int, width: int, temperature: float, *, compiled: bool) -> tuple[torch.Tensor, object]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(7, 69, generator=generator) * 3
    hidden, weight = torch.randn(7, HIDDEN, generator=generator), torch.randn(69, HIDDEN, generator=generator)
    labels = torch.tensor([0, 22, 23, 24, 59, 40, 30])
    counted = torch.tensor([True, True, True, True, True, False, True])
    shard = VocabShard(start=start, columns=max(0, min(width, 60 - start)), vocab_size=60)
    own = weight[start : start + width].contiguous()
    problem = kl_divergence._Problem(labels, counted, hidden, own, shard, temperature, 0.3, 3, compiled)
    return x[:, start : start + width].contiguous(), problem


def run_shards(temperature: float, *, compiled: bool) -> list[torch.Tensor]:
    problems = (shard_problem(*shard, temperature, compiled=compiled) for shard in SHARDS)
    return [kl_divergence._shard_statistics(x, problem) for x, problem in problems]


def work(file: str) -> None:
    from remit_megatron.kernels import kl_divergence_triton

    kl_divergence_triton._FORWARD_BLOCK = kl_divergence_triton._BACKWARD_BLOCK = 16
    results: dict = {str(case): run(*case) for case in CASES}
    results |= {f"shards {c}": run_shards(c, compiled=True) for c in (1.0, 2.0)}
    torch.save(results | {"equal": run_equal()}, file)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    return run_interpreted(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_are_the_definitions(results, case):
    dtype, (_, vocab_size), kind, (c, r) = case
    whole, found = inputs(*case[:3]), results[str(case)]
    counted = whole["mask"] > 0
    y = (whole["hidden"] @ whole["weight"].t())[:, :vocab_size].double()  # rounded to the dtype, as a model's logits
    y = y.masked_fill(~counted[:, None], 0.0)
    x = whole["x"][:, :vocab_size].double().masked_fill(~counted[:, None], 0.0).requires_grad_()
    log_p, log_q = torch.log_softmax(y / c, -1), torch.log_softmax(x / c, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    nll = torch.nn.functional.cross_entropy(x, whole["labels"].where(counted, 0), reduction="none")
    loss = ((1 - r) * c * c * kl + r * nll) * counted
    (gradient,) = torch.autograd.grad(loss, x, whole["incoming"].double().where(counted, 0.0))
    assert found["in_place"], "written over the logits, and said to autograd"
    margin = 1e-7 * whole["x"][counted][:, :vocab_size].abs().max().item() if kind in ("huge", "shifted") else 0.0
    torch.testing.assert_close(found["loss"].double(), loss.detach(), rtol=4e-6, atol=4e-6 + 8 * margin)
    torch.testing.assert_close(found["nll"].double(), (nll * counted).detach(), rtol=2e-6, atol=2e-6 + margin)
    assert not found["gradient"][~counted].any() and not found["gradient"][:, vocab_size:].any()
    found_gradient = found["gradient"][:, :vocab_size].double()
    torch.testing.assert_close(found_gradient, gradient, rtol=EPS[dtype] + 1e-5, atol=4e-6 + margin)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_statistics_of_shards_are_those_of_the_torch_operations(results, temperature):
    expected = run_shards(temperature, compiled=False)
    for one, other in zip(results[f"shards {temperature}"], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_models_that_agree_have_no_divergence_and_no_gradient(results):
    loss, gradient = results["equal"]
    assert not loss.any() and not gradient.any()


if __name__ == "__main__":
    work(sys.argv[1])
