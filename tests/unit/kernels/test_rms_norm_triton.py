"""The Triton kernels of the norms of queries and keys, in Triton's interpreter, against float64 and transformers; what
is launched.

As in test_token_loss_triton.py, all cases run in one process of their own, which leaves its results in a file.
"""

import sys
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from remit_megatron.kernels import rms_norms
from remit_megatron.kernels.rms_norm import TorchNorms, _RMSNorms, backend_of
from tests.unit.kernels.interpreter import run_interpreted

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """Queries and keys as views of one product [..., groups, queries of a group + 2, d], or in tensors of their own."""

    name: str
    leading: tuple[int, ...]
    queries: int  # heads
    keys: int
    channels: int
    views: bool = True
    kind: str = "normal"


CASES = (
    Case("as a model has them", (7, 3), 4, 4, 16),
    Case("several queries a key", (5, 2), 6, 2, 8),
    Case("several queries a key, copied", (5, 2), 6, 2, 8, views=False),
    Case("odd heads", (5,), 3, 3, 7),
    Case("packed", (37, 1), 2, 2, 5),
    Case("rows of several programs", (41,), 1, 1, 6, views=False),
    Case("one channel", (3,), 1, 1, 1),
    Case("one token", (1, 1), 5, 5, 3),
    Case("nothing", (0, 2), 2, 2, 4),
    Case("huge", (4,), 2, 2, 9, kind="huge"),
    Case("zeros", (4,), 2, 2, 9, kind="zeros"),
)
ALL = [(case, dtype) for case in CASES for dtype in DTYPES]
IDS = [f"{case.name}-{dtype}" for case, dtype in ALL]


def inputs(case: Case, dtype: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Vectors, weights and incoming gradients, of queries and of keys. Weights are of very different sizes, and so are
    channels; no gradient comes back to the first token."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    shape = (*case.leading, case.keys, case.queries // case.keys + 2, case.channels)
    product = torch.randn(shape, generator=generator) * torch.arange(1, case.channels + 1)
    if case.kind == "huge":
        product *= 60000.0 / product.abs().max()
    if case.kind == "zeros":
        product[0] = 0.0
    product = product.to(DTYPES[dtype])
    vectors = (product[..., :-2, :].flatten(-3, -2), product[..., -2, :])
    if not case.views:
        vectors = tuple(x.clone() for x in vectors)
    widths = [x.shape[-2] * x.shape[-1] for x in vectors]
    weights = tuple(
        (torch.randn(w, generator=generator) * torch.linspace(0.1, 30, w)).to(DTYPES[dtype]) for w in widths
    )
    incoming = tuple(torch.randn(x.shape, generator=generator).to(DTYPES[dtype]) for x in vectors)
    for gradient in incoming:
        gradient[:1] = 0.0
    return {"vectors": vectors, "weights": weights, "incoming": incoming}


def sizes_of(weights: tuple[Tensor, ...]) -> tuple[tuple[int, float], ...]:
    return tuple((len(weight), EPS) for weight in weights)


def run(case: Case, dtype: str, *, only: int | None = None) -> tuple[Tensor, ...]:
    """Outputs, and gradients of vectors and weights; of both, or of one of them by itself."""
    whole = {name: pair if only is None else (pair[only],) for name, pair in inputs(case, dtype).items()}
    leaves = [tensor.detach().requires_grad_() for tensor in (*whole["vectors"], *whole["weights"])]
    vectors, weights = leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]
    kept = [leaf.detach().clone() for leaf in leaves]
    outputs = rms_norms(vectors, weights, sizes=sizes_of(tuple(weights)), impl="triton")
    gradients = torch.autograd.grad(outputs, leaves, whole["incoming"])
    assert all(torch.equal(leaf, before) for leaf, before in zip(leaves, kept, strict=True)), "nothing in place"
    return tuple(tensor.detach() for tensor in (*outputs, *gradients))


def run_as_several_ranks(case: Case, dtype: str) -> tuple[Tensor, ...]:
    """The launches of several ranks, whose reductions add nothing here."""
    from remit_megatron.kernels.rms_norm_triton import TritonNorms

    whole, seen = inputs(case, dtype), []
    sizes = sizes_of(whole["weights"])
    rows = TritonNorms.rows(whole["vectors"])
    outputs, squares = TritonNorms.forward(rows, whole["weights"], sizes, seen.append)
    incoming = [gradient.flatten(-2).flatten(0, -2) for gradient in whole["incoming"]]
    of_vectors, of_weights = TritonNorms.backward(incoming, rows, whole["weights"], squares, sizes, seen.append)
    assert [tensor.shape for tensor in seen] == [(2, len(rows[0]))] * (2 if len(rows[0]) else 0)
    shaped = [x.view(v.shape) for x, v in zip((*outputs, *of_vectors), (*whole["vectors"],) * 2, strict=True)]
    return (*shaped, *of_weights)


def work(file: str) -> None:
    results = {name: run(*case) for case, name in zip(ALL, IDS, strict=True)}
    results |= {
        f"ranks-{name}": run_as_several_ranks(*case)
        for case, name in zip(ALL, IDS, strict=True)
        if case[1] != "float16"
    }
    results |= {f"only-{dtype}-{n}": run(CASES[1], dtype, only=n) for dtype in DTYPES for n in (0, 1)}
    torch.save(results, file)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[Tensor, ...]]:
    return run_interpreted(__file__, tmp_path_factory.mktemp("triton"))


def definition(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: output and gradients of x and weight, of one vector."""
    x, weight = (tensor.double().detach().requires_grad_() for tensor in (x, weight))
    flat = x.flatten(-2)
    output = (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS) * weight).view(x.shape)
    return (output.detach(), *torch.autograd.grad(output, (x, weight), gradient.double()))


def transformers_norm(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by transformers' module, in the dtype of x."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    norm = Olmo2RMSNorm(len(weight), eps=EPS).to(weight.dtype)
    norm.weight.data.copy_(weight)
    x = x.detach().clone().requires_grad_()
    output = norm(x.flatten(-2)).view(x.shape)
    return (output.detach(), *torch.autograd.grad(output, (x, norm.weight), gradient))


@pytest.mark.parametrize("case, dtype", ALL, ids=IDS)
def test_outputs_and_gradients_are_the_definitions(results, case, dtype):
    """Not further from float64 than transformers' own, but for some roundings of float32."""
    found, whole = results[f"{case.name}-{dtype}"], inputs(case, dtype)
    for number, (x, weight, incoming) in enumerate(zip(*whole.values(), strict=True)):
        exact, theirs = definition(x, weight, incoming), transformers_norm(x, weight, incoming)
        # A gradient of a vector is what two terms of this size leave of each other.
        terms = (incoming.double() * weight.double().view(x.shape[-2:])).abs()
        terms = terms * torch.rsqrt(x.double().square().mean((-2, -1), keepdim=True) + EPS)
        for ours, truth, other, least in zip(found[number::2], exact, theirs, (0.0, terms, 0.0), strict=True):
            assert ours.dtype == DTYPES[dtype] and ours.shape == truth.shape and ours.is_contiguous()
            if len(x) == 0:
                assert not ours.any(), "no token, no gradient"
                continue
            largest = (truth.abs() + least).flatten(1 if truth.ndim > 1 else 0).amax(-1)
            margin = 16 * torch.finfo(torch.float32).eps * largest.view(-1, *[1] * (truth.ndim - 1))
            # What float32 leaves open can fall to the other side of a rounding.
            margin = margin + (torch.finfo(ours.dtype).eps * truth.abs() if dtype != "float32" else 0.0)
            assert ((ours.double() - truth).abs() <= (other.double() - truth).abs() + margin).all()
        output, of_x, _ = found[number::2]
        assert len(x) == 0 or not of_x[0].any(), "nothing comes back to the first token"
        assert (output != rounded_once(x, weight)).sum() <= 0.02 * output.numel() or dtype == "float32"


def rounded_once(x: Tensor, weight: Tensor) -> Tensor:
    """Transformers' output of the same numbers in float32, rounded to the dtype: what its module gives in 16 bits.
    To bfloat16 Triton's interpreter does not round but cuts; the compiled kernels round (`cvt.rn`)."""
    exact = transformers_norm(x.float(), weight.float(), x.float())[0]
    assert torch.equal(exact.to(x.dtype), transformers_norm(x, weight, x)[0])
    if x.dtype == torch.bfloat16:
        exact = (exact.view(torch.int32) & -65536).view(torch.float32)
    return exact.to(x.dtype)


@pytest.mark.parametrize("case, dtype", [one for one in ALL if one[1] != "float16"])
def test_the_launches_of_several_ranks_give_what_one_gives(results, case, dtype):
    for one, several in zip(results[f"{case.name}-{dtype}"], results[f"ranks-{case.name}-{dtype}"], strict=True):
        assert torch.equal(one, several)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_vector(results, dtype):
    both = results[f"{CASES[1].name}-{dtype}"]
    for number in (0, 1):
        for alone, together in zip(results[f"only-{dtype}-{number}"], both[number::2], strict=True):
            assert torch.equal(alone, together)


class Launches(TorchDispatchMode):
    """Counts what runs on the device: operations but for views and allocations, and Triton's kernels."""

    _FREE = ("aten.empty", "aten.new_empty", "aten.view", "aten._unsafe_view", "aten.slice", "aten.select",
             "aten.unsqueeze", "aten.split", "aten.detach", "aten.expand", "aten.alias", "aten.unbind")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.kernels: list[tuple[str, tuple[int, int]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not str(function).startswith(self._FREE):
            self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Recorder:
    """In place of a kernel."""

    def __init__(self, name: str, launches: Launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, int]):
        return lambda *arguments, **settings: self.launches.kernels.append((self.name, grid))


def launched(backend, monkeypatch, *, several: bool) -> tuple[Launches, Launches]:
    """What forward and backward of one layer's queries and keys launch, in bf16; reductions do not count."""
    from remit_megatron.kernels import rms_norm_triton

    monkeypatch.setattr(
        "remit_megatron.kernels.rms_norm._reduction", lambda group: (lambda x: None) if several else None
    )
    whole = inputs(CASES[0], "bfloat16")
    leaves = [tensor.detach().requires_grad_() for tensor in (*whole["vectors"], *whole["weights"])]
    passes = Launches(), Launches()
    for launches in passes:
        for name in ("_norm_squares_kernel", "_norm_scale_kernel", "_norm_products_kernel", "_norm_backward_kernel"):
            monkeypatch.setattr(rms_norm_triton, name, Recorder(name, launches))
        with launches:
            if launches is passes[0]:
                outputs = _RMSNorms.apply(sizes_of(whole["weights"]), None, backend, *leaves)
            else:
                torch.autograd.grad(outputs, leaves, whole["incoming"])
    return passes


def test_launches(monkeypatch):
    """docs/kernels.md has these numbers."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    from remit_megatron.kernels.rms_norm_triton import TritonNorms

    tokens = 7 * 3
    forward, backward = launched(TritonNorms, monkeypatch, several=True)
    assert forward.kernels == [("_norm_squares_kernel", (tokens, 2)), ("_norm_scale_kernel", (tokens, 2))]
    assert backward.kernels == [("_norm_products_kernel", (2, 2)), ("_norm_backward_kernel", (tokens, 2))]
    # The programs' sums, and their dtype.
    rest = {"aten.sum.dim_IntList": 1, "aten._to_copy.default": 1}
    assert not forward.operations and backward.operations == rest
    forward, backward = launched(TritonNorms, monkeypatch, several=False)
    assert forward.kernels == [("_norm_scale_kernel", (tokens, 2))] and not forward.operations
    assert backward.kernels == [("_norm_products_kernel", (2, 2))] and backward.operations == rest
    before = [one.operations.total() for one in launched(TorchNorms, monkeypatch, several=True)]
    assert before == [23, 35], "as docs/kernels.md says"


def test_what_the_kernels_do_not_take_goes_to_torch(monkeypatch):
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide, double = torch.zeros(2, 65, 128), torch.zeros(2, 2, 4, dtype=torch.float64)
    for vectors, message in (
        ((wide,), "8320 channels"),
        ((double,), "float64"),
        ((torch.zeros(2, 1, 4),) * 3, "found 3"),
    ):
        assert backend_of(vectors, "auto") is TorchNorms
        with pytest.raises(ValueError, match=message):
            backend_of(vectors, "triton")


@pytest.mark.parametrize(
    ("shapes", "widths", "message"),
    [
        (((2, 3, 4), (3, 3, 4)), (12, 12), r"vectors: found shape \[3, 3, 4\]; expected \[2, 'n', 'd'\]"),
        (((2, 3, 4),), (4,), r"weights: found shape \[4\]; expected \[12\]"),
        (((2, 3, 4),), (12, 12), "found 1, 2 and 2 of them"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, widths, message):
    weights = tuple(torch.ones(width) for width in widths)
    with pytest.raises(ValueError, match=message):
        rms_norms([torch.ones(shape) for shape in shapes], weights, sizes=sizes_of(weights))


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(3, 2, 4, requires_grad=True), torch.ones(8, requires_grad=True)
    (output,) = rms_norms([x], [weight], sizes=[(8, EPS)])
    with pytest.raises(RuntimeError, match="create_graph=True; expected one without"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


if __name__ == "__main__":
    work(sys.argv[1])
