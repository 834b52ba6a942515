"""The compiled Triton kernels at real shapes, and the weights, on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from remit_megatron.kernels import reference_token_loss, token_logprob, token_loss
from remit_megatron.objectives.weights import CENTERINGS, token_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

EPS32 = torch.finfo(torch.float32).eps
MIB = 1 << 20


def problem(
    tokens: int, width: int, vocab_size: int, dtype: torch.dtype, *, masked: bool = True
) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(width)
    logits = torch.empty(tokens, width, dtype=dtype, device="cuda").normal_(0, 3, generator=generator)
    labels = torch.randint(vocab_size, (tokens,), generator=generator, device="cuda")
    mask = torch.ones(tokens, device="cuda")
    if masked:
        mask[::5] = 0
        logits[::5] = torch.nan
        labels[::5] = -1
    weights = torch.rand(tokens, generator=generator, device="cuda") * 3 - 1
    weights[1] = 0.0
    logits[:, vocab_size:] = torch.nan
    return {"logits": logits, "labels": labels, "mask": mask, "weights": weights}


def run(whole: dict[str, torch.Tensor], vocab_size: int, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    logits = whole["logits"].clone().requires_grad_() * 1
    loss = token_loss(logits, whole["labels"], vocab_size=vocab_size, loss_mask=whole["mask"], impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits, whole["weights"])
    assert gradient.data_ptr() == logits.data_ptr()
    return loss.detach(), gradient.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, width, vocab_size",
    [
        (64, 100352, 100352),
        (64, 100352, 100278),
        (64, 50176, 50102),
        (61, 49152, 49152),
        (33, 50257, 50257),
        (7, 13, 11),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_error_is_at_most_that_of_plain_low_precision(tokens, width, vocab_size, dtype, impl):
    whole = problem(tokens, width, vocab_size, dtype)
    counted = whole["mask"] != 0
    loss, gradient = run(whole, vocab_size, impl)
    assert not loss[~counted].any() and not gradient[~counted].any() and not gradient[:, vocab_size:].any()
    assert not gradient[1].any(), "weight 0"
    loss, gradient = loss[counted], gradient[counted, :vocab_size]
    labels, weights = whole["labels"][counted], whole["weights"][counted]
    exact = whole["logits"][counted, :vocab_size].double().requires_grad_()
    true_loss = reference_token_loss(exact, labels)
    (true_gradient,) = torch.autograd.grad(true_loss, exact, weights.double())
    leaf = whole["logits"][counted, :vocab_size].clone().requires_grad_()
    plain_loss = torch.nn.functional.cross_entropy(leaf.float(), labels, reduction="none")
    (plain_gradient,) = torch.autograd.grad(plain_loss, leaf, weights)
    # Margins in roundings, as on the CPU: sums of 100,000 terms in another order take a few more.
    margin = 16 * EPS32 * true_loss.abs().clamp(min=1)
    assert ((loss - true_loss).abs() <= (plain_loss - true_loss).abs() + margin).all()
    info = torch.finfo(dtype)
    margin = (info.eps + 200 * EPS32) * true_gradient.abs() + info.smallest_normal * info.eps
    margin[torch.arange(len(labels)), labels] += 16 * EPS32 * weights.abs()
    # A GPU flushes float32 numbers below the normal range to zero; plain autograd may keep them.
    margin += torch.finfo(torch.float32).smallest_normal
    assert ((gradient - true_gradient).abs() <= (plain_gradient - true_gradient).abs() + margin).all()


def test_offsets_beyond_32_bits():
    tokens, width = 20500, 105000  # 2.15e9 logits
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    logits = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    labels = torch.full((tokens,), width - 1, device="cuda")
    logits[-1, -1] = 4.0
    logits.requires_grad_()
    loss = token_loss(logits, labels, impl="triton")
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    expected = torch.full((tokens,), float(torch.tensor(width).double().log()), device="cuda")
    expected[-1] = (torch.tensor(width - 1.0).double() + torch.tensor(4.0).double().exp()).log() - 4
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[-1, -1].float(), -(1 - torch.exp(-expected[-1])), rtol=1e-2, atol=0)
    assert not torch.isnan(gradient[-1]).any()


def test_memory_beyond_the_logits():
    tokens, vocab = 8192, 100352
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free GPU memory")
    logits = torch.zeros(tokens, vocab, dtype=torch.bfloat16, device="cuda", requires_grad=True) * 1
    labels, weights = torch.zeros(tokens, dtype=torch.int64, device="cuda"), torch.rand(tokens, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(token_loss(logits, labels), logits, weights)
    assert torch.cuda.max_memory_allocated() - before <= 64 * MIB


def test_repeated_runs_give_the_same_bits():
    whole = problem(128, 100352, 100278, torch.bfloat16)
    first, second = (run(whole, 100278, "triton") for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("chunk_tokens", [None, 100])
def test_logprob_is_that_of_the_logits(chunk_tokens):
    generator = torch.Generator("cuda").manual_seed(5)
    hidden = torch.randn(300, 512, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(50176, 512, generator=generator, device="cuda") / 16).bfloat16()
    labels = torch.randint(50102, (300,), generator=generator, device="cuda")
    mask = (torch.arange(300, device="cuda") % 7 != 0).float()
    settings = {"vocab_size": 50102, "loss_mask": mask}
    found = token_logprob(hidden, weight, labels, chunk_tokens=chunk_tokens, **settings)
    logits = hidden @ weight.t()
    assert not found[mask == 0].any()
    # A product of another height may round single logits to a neighbor.
    margin = float(logits.abs().max()) * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found, -token_loss(logits, labels, **settings), rtol=1e-5, atol=margin)


def test_a_bad_label_stops_the_process():
    """In a process of its own: a device-side assertion leaves the device unusable for the process that ran into it."""
    code = (
        "import torch; from remit_megatron.kernels import token_loss\n"
        "token_loss(torch.zeros(4, 64, device='cuda'), torch.tensor([0, 63, 60, 1], device='cuda'), vocab_size=62)\n"
        "torch.cuda.synchronize()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0 and "found a token id out of range; expected 0 to 61" in done.stdout + done.stderr
    subprocess.run(
        [sys.executable, "-c", code.replace("63", "61")], env=environment, capture_output=True, timeout=300, check=True
    )


@pytest.mark.parametrize("centering", CENTERINGS)
def test_weights_are_those_of_the_cpu_and_repeat(centering):
    generator = torch.Generator().manual_seed(8)
    student, reference = (torch.rand(4, 4096, generator=generator) * 12 for _ in range(2))
    mask = (torch.rand(4, 4096, generator=generator) > 0.1).float()
    documents = (torch.rand(4, 4096, generator=generator) > 0.99).cumsum(1)
    inputs = (student, reference, mask)
    expected = token_weights(*inputs, centering=centering, document_ids=documents)
    on_gpu = [t.cuda() for t in inputs]
    found = [token_weights(*on_gpu, centering=centering, document_ids=documents.cuda()) for _ in range(2)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].cpu(), expected, rtol=0, atol=3 * EPS32)
