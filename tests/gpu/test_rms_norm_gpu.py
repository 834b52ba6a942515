"""The kernels of the norms of queries and keys on a GPU: right beside float64, rounded as transformers, and repeatable.

What the interpreter cannot show: the compiled kernels, at their own sizes.
"""

import pytest
import torch
from torch import Tensor

from remit_megatron.kernels import rms_norm, rms_norms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(8192, 16, 16, 128), (4099, 8, 8, 128), (257, 40, 40, 128), (300, 40, 8, 128), (61, 3, 3, 7)]


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[list[Tensor]]:
    """Queries and keys as views of one product, weights and incoming gradients; none for the first token."""
    tokens, queries, keys, channels = shape
    generator = torch.Generator("cuda").manual_seed(tokens)

    def normal(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="cuda").normal_(generator=generator)

    product = normal(tokens, keys, queries // keys + 2, channels)
    vectors = [product[:, :, :-2].flatten(1, 2).detach(), product[:, :, -2].detach()]
    weights = [normal(count * channels) for count in (queries, keys)]
    incoming = [normal(tokens, count, channels) for count in (queries, keys)]
    for gradient in incoming:
        gradient[0] = 0.0
    return [vectors, weights, incoming]


def run(whole: list[list[Tensor]]) -> list[Tensor]:
    vectors, weights, incoming = whole
    leaves = [tensor.detach().requires_grad_() for tensor in (*vectors, *weights)]
    sizes = [(len(weight), EPS) for weight in weights]
    outputs = rms_norms(leaves[:2], leaves[2:], sizes=sizes, impl="triton")
    return [tensor.detach() for tensor in (*outputs, *torch.autograd.grad(outputs, leaves, incoming))]


def plain(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients by transformers' operations, in float32 or, for a float64 vector, in that."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    wide = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    output = (weight * scaled).to(x.dtype).view(x.shape)
    return (output.detach(), *torch.autograd.grad(output, (x, weight), gradient))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_that_of_transformers(shape, dtype):
    whole = problem(shape, dtype)
    found = run(whole)
    for number, (x, weight, incoming) in enumerate(zip(*whole, strict=True)):
        exact = plain(x.double(), weight.double(), incoming.double())
        for ours, truth, other in zip(found[number::2], exact, plain(x, weight, incoming), strict=True):
            margin = 32 * torch.finfo(torch.float32).eps * truth.abs().max() + torch.finfo(dtype).eps * truth.abs()
            assert ((ours.double() - truth).abs() <= (other.double() - truth).abs() + margin).all()
        assert not found[number + 2][0].any(), "nothing comes back to the first token"
        differ = found[number] != plain(x, weight, incoming)[0]
        assert dtype == torch.float32 or differ.float().mean() <= 0.02, "rounded in another order"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_launches_of_several_ranks_give_what_one_gives(monkeypatch, dtype):
    whole = problem(SHAPES[1], dtype)
    one = run(whole)
    monkeypatch.setattr(rms_norm, "_reduction", lambda group: lambda sums: None)
    for first, second in zip(one, run(whole), strict=True):
        torch.testing.assert_close(first, second, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * float(first.abs().max()))


def test_repeated_runs_give_the_same_bits():
    whole = problem(SHAPES[0], torch.bfloat16)
    for first, second in zip(run(whole), run(whole), strict=True):
        assert torch.equal(first, second)
