"""The compiled kernels of `kd`'s divergence at real shapes: right beside float64, within their memory, repeatable."""

import pytest
import torch

from remit_megatron.kernels import kl_divergence
from remit_megatron.kernels.kl_divergence import distillation_loss
from remit_megatron.kernels.vocab_shard import VocabShard
from remit_megatron.runtime.parallel import exact_float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

MIB = 1 << 20
HIDDEN = 256
DTYPES = [torch.float32, torch.bfloat16]
SETTINGS = [(1.0, 0.0), (2.0, 0.3), (0.5, 1.0)]  # temperature, share of next-token prediction
SHAPES = [(64, 100352, 100278), (61, 49152, 49152), (33, 50257, 50257), (7, 13, 11)]  # tokens, width, vocabulary


@pytest.fixture(autouse=True)
def _exact():
    exact_float32()


def problem(tokens: int, width: int, vocab_size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What does not count, and padding, holds NaN; the second token has weight 0."""
    generator = torch.Generator("cuda").manual_seed(width)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda").normal_(0, scale, generator=generator)

    whole = {
        "x": normal(tokens, width, scale=3.0),
        "hidden": normal(tokens, HIDDEN, scale=1.0),
        "weight": normal(width, HIDDEN, scale=3.0 / HIDDEN**0.5),
        "labels": torch.randint(vocab_size, (tokens,), generator=generator, device="cuda"),
        "mask": torch.ones(tokens, device="cuda"),
        "incoming": torch.rand(tokens, generator=generator, device="cuda") * 3 - 1,
    }
    whole["mask"][::5], whole["x"][::5], whole["labels"][::5] = 0, torch.nan, -1
    whole["x"][:, vocab_size:], whole["weight"][vocab_size:] = torch.nan, torch.nan
    whole["incoming"][1] = 0.0
    return whole


def run(
    whole: dict[str, torch.Tensor], vocab_size: int, setting: tuple[float, float], impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = whole["x"].clone().requires_grad_() * 1
    loss, nll = distillation_loss(
        logits,
        whole["labels"],
        whole["hidden"],
        whole["weight"],
        temperature=setting[0],
        ntp_weight=setting[1],
        vocab_size=vocab_size,
        loss_mask=whole["mask"],
        impl=impl,  # type: ignore[arg-type]
    )
    (gradient,) = torch.autograd.grad(loss, logits, whole["incoming"])
    assert gradient.data_ptr() == logits.data_ptr()
    return loss.detach(), nll, gradient.detach()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_loss_and_gradient_are_the_definitions(shape, dtype, setting, impl):
    tokens, width, vocab_size = shape
    c, r = setting
    whole = problem(tokens, width, vocab_size, dtype)
    found, found_nll, found_gradient = run(whole, vocab_size, setting, impl)
    counted = whole["mask"] > 0
    assert not found[~counted].any() and not found_gradient[~counted].any() and not found_gradient[:, vocab_size:].any()
    assert not found_gradient[1].any(), "weight 0"
    labels, incoming = whole["labels"][counted], whole["incoming"][counted].double()
    y = (whole["hidden"] @ whole["weight"].t())[counted, :vocab_size].double()  # rounded, as a model's logits
    x = whole["x"][counted, :vocab_size].double().requires_grad_()
    log_p, log_q = torch.log_softmax(y / c, -1), torch.log_softmax(x / c, -1)
    nll = torch.nn.functional.cross_entropy(x, labels, reduction="none")
    loss = (1 - r) * c * c * (log_p.exp() * (log_p - log_q)).sum(-1) + r * nll
    (gradient,) = torch.autograd.grad(loss, x, incoming)
    torch.testing.assert_close(found_nll[counted].double(), nll.detach(), rtol=4e-6, atol=4e-6)
    # A product of another height may round single logits of the reference to a neighbor.
    neighbor = float(y.abs().max()) * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
    torch.testing.assert_close(found[counted].double(), loss.detach(), rtol=1e-5, atol=1e-5 + neighbor * c)
    close = gradient.abs() * (torch.finfo(dtype).eps + 1e-5) + 1e-6
    close += incoming.abs().unsqueeze(1) * (1 - r) * c * log_p.exp() * (neighbor / c) * 2
    assert ((found_gradient[counted, :vocab_size].double() - gradient).abs() <= close).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_shards_add_up_to_the_whole(temperature):
    """Statistics of four shards of the vocabulary, one all padding, are those of the torch operations."""
    whole = problem(64, 100352, 75000, torch.float32)
    whole["x"], whole["weight"] = whole["x"].nan_to_num(), whole["weight"].nan_to_num()
    counted, labels = whole["mask"] > 0, whole["labels"].clamp(min=0)
    for start in range(0, 100352, 25088):
        shard = VocabShard(start=start, columns=max(0, min(25088, 75000 - start)), vocab_size=75000)
        x, weight = (whole["x"][:, start : start + 25088].contiguous(), whole["weight"][start : start + 25088])
        ours, plain = (
            kl_divergence._shard_statistics(
                x,
                kl_divergence._Problem(labels, counted, whole["hidden"], weight, shard, temperature, 0.3, 64, compiled),
            )[:, counted]
            for compiled in (True, False)
        )
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


def test_memory_beyond_the_logits():
    """A block of the reference's logits, 64 MiB, and little more."""
    tokens, width = 8192, 100352
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    logits = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda", requires_grad=True) * 1
    hidden = torch.ones(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(width, HIDDEN, dtype=torch.bfloat16, device="cuda")
    labels, incoming = torch.zeros(tokens, dtype=torch.int64, device="cuda"), torch.rand(tokens, device="cuda")
    (hidden[:8] @ weight.t()).sum().item()  # the library's own workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _ = distillation_loss(logits, labels, hidden, weight)
    torch.autograd.grad(loss, logits, incoming)
    assert torch.cuda.max_memory_allocated() - before <= 80 * MIB


def test_repeated_runs_give_the_same_bits():
    whole = problem(128, 100352, 100278, torch.bfloat16)
    for first, second in zip(*(run(whole, 100278, (2.0, 0.3), "triton") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_models_that_agree_have_no_divergence_and_next_to_no_gradient():
    generator = torch.Generator("cuda").manual_seed(5)
    hidden = torch.randn(64, HIDDEN, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(50176, HIDDEN, generator=generator, device="cuda").bfloat16()
    logits = (hidden @ weight.t()).requires_grad_()
    labels = torch.zeros(64, dtype=torch.long, device="cuda")
    loss, _ = distillation_loss(logits, labels, hidden, weight, chunk_tokens=64, temperature=2.0, impl="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert not loss.any()
    # The compiler may round the two probabilities of a column in different places.
    probability = (logits.detach().float() / 2.0).softmax(-1)
    assert (gradient.float().abs() <= 1e-6 * probability + 1e-30).all()
