"""The Triton kernels on the CPU, in Triton's interpreter, against float64 and the torch implementation; small shapes.

The interpreter is chosen when the kernels are defined, by an environment variable, for the whole process. So all cases
run in one process of their own (this file run as a script) that leaves its results in a file; the tests judge them.
Speed and memory, and the compiled kernels themselves, are for tests/gpu.
"""

import sys
from dataclasses import dataclass

import pytest
import torch

from remit_megatron.kernels import reference_token_loss, token_logprob, token_loss
from remit_megatron.kernels.token_loss import TorchBackend
from remit_megatron.kernels.vocab_shard import VocabShard
from tests.unit.kernels.interpreter import run_interpreted

EPS32 = torch.finfo(torch.float32).eps
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """Blocks are 16 columns wide, so that few columns make several blocks."""

    name: str
    tokens: int
    width: int
    vocab_size: int
    kind: str = "normal"


CASES = (
    Case("less than a block", 5, 7, 7),
    Case("one block", 4, 16, 16),
    Case("several blocks", 6, 64, 64),
    Case("not a multiple of the block", 6, 53, 53),
    Case("one column", 3, 1, 1),
    Case("one token", 1, 37, 37),
    Case("padding inside a block", 6, 64, 43),
    Case("padding of whole blocks", 6, 64, 5),
    Case("huge", 5, 53, 50, "huge"),
    Case("equal", 5, 53, 50, "equal"),
    Case("first block -1e30", 5, 53, 50, "low"),
    Case("first block -inf", 5, 53, 50, "infinite"),
    Case("nothing counted", 4, 20, 20, "masked"),
)
ALL = [(case, dtype) for case in CASES for dtype in DTYPES]
IDS = [f"{case.name}-{dtype}" for case, dtype in ALL]
SHARDS = [(0, 23), (23, 1), (24, 0), (24, 29), (53, 16)]  # start, columns in memory; ids from 60 on are padding


def inputs(case: Case, dtype: str) -> dict[str, torch.Tensor]:
    """Padding columns and rows that do not count hold NaN, or any label."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    logits = torch.randn(case.tokens, case.width, generator=generator) * 3
    labels = torch.randint(case.vocab_size, (case.tokens,), generator=generator)
    lowest = -6e4 if dtype == "float16" else -1e30
    if case.kind == "huge":
        logits = (logits * 1e4).clamp(-6e4, 6e4)
    elif case.kind == "equal":
        logits[:] = 1e4
    elif case.kind in ("low", "infinite"):
        logits[:, :16] = lowest if case.kind == "low" else -torch.inf
        labels = labels.clamp(min=16)
    mask = torch.ones(case.tokens) if case.tokens == 1 else (torch.arange(case.tokens) % 3 != 1).float()
    if case.kind == "masked":
        mask[:] = 0
    logits[:, case.vocab_size :] = torch.nan
    logits[mask == 0] = torch.nan
    labels[mask == 0] = 1 << 40
    weights = torch.rand(case.tokens, generator=generator) * 3 - 1
    if case.tokens > 1:
        weights[0] = 0.0
    weights[mask == 0] = torch.inf
    return {"logits": logits.to(DTYPES[dtype]), "labels": labels, "mask": mask, "weights": weights}


def run(case: Case, dtype: str, impl: str) -> dict[str, torch.Tensor]:
    whole = inputs(case, dtype)
    settings = {"vocab_size": case.vocab_size, "loss_mask": whole["mask"], "impl": impl}
    leaf = whole["logits"].clone().requires_grad_()
    logits = leaf * 1
    loss = token_loss(logits, whole["labels"], **settings)
    version = logits._version
    (gradient,) = torch.autograd.grad(loss, logits, whole["weights"])
    in_place = torch.tensor(gradient.data_ptr() == logits.data_ptr() and logits._version > version)
    token_loss(leaf, whole["labels"], **settings).backward(whole["weights"])
    return {"loss": loss.detach(), "gradient": gradient.detach(), "in_place": in_place, "leaf_gradient": leaf.grad}


def run_shards(backend, dtype: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Statistics and gradient of shards of uneven width, with numbers for M, g / S and the label's gradient."""
    generator = torch.Generator().manual_seed(9)
    logits = (torch.randn(7, 69, generator=generator) * 3).to(DTYPES[dtype])
    labels = torch.tensor([0, 22, 23, 24, 59, 40, 30])
    counted = torch.tensor([True, True, True, True, True, False, True])
    scale, label_gradient = (torch.randn(7, generator=generator) for _ in range(2))
    results = []
    for start, width in SHARDS:
        shard = VocabShard(start=start, columns=min(width, 60 - start), vocab_size=60)
        x = logits[:, start : start + width].contiguous()
        statistics = backend.statistics(x, labels, counted, shard)
        settings = {"maximum": torch.full((7,), 9.0), "row_scale": scale, "label_gradient": label_gradient}
        backend.gradient(x, x, labels, counted, shard, **settings)
        results.append((statistics, x))
    return results


def run_logprob(dtype: str, impl: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(48, 8, generator=generator)
    labels, mask = torch.randint(43, (9,), generator=generator), torch.arange(9) % 4
    hidden, weight = hidden.to(DTYPES[dtype]), weight.to(DTYPES[dtype])
    return token_logprob(hidden, weight, labels, vocab_size=43, chunk_tokens=4, loss_mask=mask, impl=impl)


def work(file: str) -> None:
    from remit_megatron.kernels import token_loss_triton

    token_loss_triton._FORWARD_BLOCK = token_loss_triton._BACKWARD_BLOCK = 16
    results = {name: run(*case, "triton") for case, name in zip(ALL, IDS, strict=True)}
    results |= {f"shards-{dtype}": run_shards(token_loss_triton.TritonBackend, dtype) for dtype in DTYPES}
    results |= {f"logprob-{dtype}": run_logprob(dtype, "triton") for dtype in DTYPES}
    torch.save(results, file)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    return run_interpreted(__file__, tmp_path_factory.mktemp("triton"), timeout=300)


@pytest.mark.parametrize("case, dtype", ALL, ids=IDS)
def test_loss_and_gradient(results, case, dtype):
    """Error at most that of plain float32 autograd plus a margin in roundings; see test_token_loss.py."""
    found, whole = results[f"{case.name}-{dtype}"], inputs(case, dtype)
    counted = whole["mask"] != 0
    loss, gradient = found["loss"], found["gradient"]
    assert found["in_place"], "written over the logits, and said to autograd"
    assert torch.equal(found["leaf_gradient"], gradient)
    assert loss.dtype == torch.float32 and gradient.dtype == DTYPES[dtype]
    assert not loss[~counted].any() and not gradient[~counted].any() and not gradient[:, case.vocab_size :].any()
    loss, gradient = loss[counted], gradient[counted, : case.vocab_size]
    if not len(loss):
        return
    labels, weights = whole["labels"][counted], whole["weights"][counted]
    exact = whole["logits"][counted, : case.vocab_size].double().requires_grad_()
    true_loss = reference_token_loss(exact, labels)
    (true_gradient,) = torch.autograd.grad(true_loss, exact, weights.double())
    leaf = whole["logits"][counted, : case.vocab_size].clone().requires_grad_()
    plain_loss = torch.nn.functional.cross_entropy(leaf.float(), labels, reduction="none")
    (plain_gradient,) = torch.autograd.grad(plain_loss, leaf, weights)

    margin = 6 * EPS32 * true_loss.abs().clamp(min=1)
    assert ((loss - true_loss).abs() <= (plain_loss - true_loss).abs() + margin).all()
    info = torch.finfo(DTYPES[dtype])
    margin = (info.eps + 200 * EPS32) * true_gradient.abs() + info.smallest_normal * info.eps
    margin[torch.arange(len(labels)), labels] += 6 * EPS32 * weights.abs()
    assert ((gradient - true_gradient).abs() <= (plain_gradient - true_gradient).abs() + margin).all()
    if case.tokens > 1:
        assert not gradient[0].any(), "the first weight is zero"


@pytest.mark.parametrize("dtype", DTYPES)
def test_uneven_shards_are_those_of_torch(results, dtype):
    expected = run_shards(TorchBackend, dtype)
    for (start, width), (statistics, gradient), (true_statistics, true_gradient) in zip(
        SHARDS, results[f"shards-{dtype}"], expected, strict=True
    ):
        assert gradient.shape == (7, width), start
        torch.testing.assert_close(statistics, true_statistics, rtol=8 * EPS32, atol=0)
        # One rounding to the dtype, which the interpreter truncates for bfloat16.
        torch.testing.assert_close(gradient, true_gradient, rtol=torch.finfo(DTYPES[dtype]).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprob(results, dtype):
    torch.testing.assert_close(results[f"logprob-{dtype}"], run_logprob(dtype, "torch"), rtol=1e-6, atol=1e-6)


def test_triton_on_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl: found 'triton'"):
        token_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), impl="triton")


if __name__ == "__main__":
    work(sys.argv[1])
