"""Norms of queries and keys over two tensor-parallel ranks (gloo) in Triton's interpreter: against float64 on the whole
vectors, against one process, and a model of OLMo 2 against transformers.

Two processes start once (this file run as a script), because the interpreter is for a whole process; the tests judge
what they leave.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.kernels import rms_norms
from tests.distributed.models import test_parity as parity
from tests.distributed.script_ranks import run_script
from tests.families import VOCABULARY, make_case

RANKS, EPS, CASE, LENGTH, LAYERS = 2, 1e-5, "olmo2-mha_untied", 6, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS = {"as many keys": (6, 6, 8), "fewer keys": (6, 2, 8), "odd": (2, 2, 7)}  # queries, keys, channels; of all ranks
CASES = [(heads, dtype) for heads in HEADS for dtype in DTYPES]


def inputs(heads: str, dtype: str, rank: int | None = None) -> dict[str, list[Tensor]]:
    """Vectors, weights and incoming gradients of queries and keys; of one rank its heads. Nothing comes back to the
    first token; weights and vectors differ in size from rank to rank."""
    generator = torch.Generator().manual_seed(3)
    *counts, channels = HEADS[heads]
    found: dict[str, list[Tensor]] = {"vectors": [], "weights": [], "incoming": []}
    for count in counts:
        sizes = torch.linspace(0.1, 4, count).unsqueeze(-1)
        x, gradient = (torch.randn(5, 3, count, channels, generator=generator) for _ in range(2))
        weight = torch.randn(count, channels, generator=generator) * sizes.flip(0)
        gradient[0, 0] = 0.0
        own = slice(None) if rank is None else slice(rank * count // RANKS, (rank + 1) * count // RANKS)
        found["vectors"].append((x * sizes)[..., own, :].to(DTYPES[dtype]))
        found["weights"].append(weight[own].flatten().to(DTYPES[dtype]))
        found["incoming"].append(gradient[..., own, :].to(DTYPES[dtype]))
    return found


def run(heads: str, dtype: str, rank: int | None, impl: Any) -> list[Tensor]:
    """Outputs, and gradients of vectors and weights, each of queries and of keys."""
    whole = inputs(heads, dtype, rank)
    leaves = [tensor.requires_grad_() for tensor in (*whole["vectors"], *whole["weights"])]
    *counts, channels = HEADS[heads]
    sizes = [(count * channels, EPS) for count in counts]
    group = None if rank is None else dist.group.WORLD
    outputs = rms_norms(leaves[:2], leaves[2:], sizes=sizes, tp_group=group, impl=impl)
    return [tensor.detach() for tensor in (*outputs, *torch.autograd.grad(outputs, leaves, whole["incoming"]))]


def of_a_model(directory: str, tokens: list[list[int]]) -> dict[str, Any]:
    """Logits and gradients of a layout of two ranks, norms in Triton; and how often they were called."""
    from remit_megatron.kernels import rms_norm, rms_norm_triton
    from remit_megatron.models import norm

    calls = 0

    def triton(vectors: Any, impl: str) -> Any:
        nonlocal calls
        calls += 1
        assert rms_norm_triton.refusal(vectors) is None
        return rms_norm_triton.TritonNorms

    parity.LENGTH = LENGTH  # the interpreter takes milliseconds for a row
    rms_norm.backend_of = norm.backend_of = triton  # type: ignore[assignment]
    layout = {"tp": RANKS, "sequence_parallel": True}
    return parity.run_megatron({CASE: directory}, tokens, layout)[CASE] | {"calls": calls}


def work(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {f"{case}": run(*case, rank, "triton") for case in CASES}
    dist.destroy_process_group()
    results |= {f"alone {case}": run(*case, None, "triton") for case in CASES if rank == 0}
    results["model"] = of_a_model(f"{folder}/model", torch.load(f"{folder}/tokens.pt").tolist())
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a model and tokens for it."""
    folder = tmp_path_factory.mktemp("ranks")
    tokens = torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, folder / "tokens.pt")
    make_case(folder / "model", CASE, seed=4, num_hidden_layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from remit_megatron.runtime.launch import free_port

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free_port()))
        return run_script(__file__, folder, RANKS)


def definition(heads: str, dtype: str) -> list[Tensor]:
    """As :func:`run` of the whole, in float64."""
    whole = {name: [tensor.double() for tensor in pair] for name, pair in inputs(heads, dtype).items()}
    leaves = [tensor.requires_grad_() for tensor in (*whole["vectors"], *whole["weights"])]
    outputs = []
    for x, weight in zip(leaves[:2], leaves[2:], strict=True):
        flat = x.flatten(-2)
        outputs.append((flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS) * weight).view(x.shape))
    return [tensor.detach() for tensor in (*outputs, *torch.autograd.grad(outputs, leaves, whole["incoming"]))]


@pytest.mark.parametrize("heads, dtype", CASES)
def test_ranks_have_the_numbers_of_the_whole(ranks, heads, dtype):
    # Of weights, which have no axis of heads, there is one axis; of a rank it has the heads one after the other.
    for number, truth in enumerate(definition(heads, dtype)):
        axis = -2 if truth.ndim > 1 else 0
        together = torch.cat([rank[str((heads, dtype))][number] for rank in ranks], dim=axis)
        alone = ranks[0][f"alone {(heads, dtype)}"][number]
        assert together.dtype == alone.dtype == DTYPES[dtype]
        largest = truth.abs().max()
        # The interpreter cuts to bfloat16 in place of rounding: up to one unit of the last place.
        rounding = torch.finfo(torch.bfloat16).eps if dtype == "bfloat16" else 0.0
        for found in (together, alone):
            assert ((found.double() - truth).abs() <= 4e-7 * largest + rounding * truth.abs()).all()
        differ = (together != alone).sum()
        assert dtype == "float32" or differ <= 0.02 * truth.numel() + 1, "the same but for single roundings"


def test_a_model_on_two_ranks_equals_transformers(ranks, folder):
    logits, gradients = parity.truth(folder / "model", torch.load(folder / "tokens.pt"))
    for rank in ranks:
        found = rank["model"]
        assert found["calls"] == LAYERS * 2, "of every layer and microbatch"
        assert (torch.cat(found["logits"])[..., :VOCABULARY] - logits).abs().max() <= 5e-5
    ours = parity.merged(folder / "model", [rank["model"] for rank in ranks])
    assert ours.keys() == gradients.keys()
    for weight, gradient in gradients.items():
        error = ((ours[weight] - gradient).norm() / gradient.norm()).item()
        assert error <= 1e-5, f"{weight}: {error}"


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
