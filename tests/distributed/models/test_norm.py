"""The norm of a vector that tensor parallelism has split: values and gradients of the whole vector's norm."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

WIDTH, EPS = 24, 1e-3


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [3, 2, WIDTH], weight [WIDTH] and the gradient that comes back, of very different sizes over the vector."""
    generator = torch.Generator().manual_seed(1)
    x, weight, gradient = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 2, WIDTH), (WIDTH,), (3, 2, WIDTH))
    )
    return (x * torch.arange(1, WIDTH + 1)).to(dtype), weight.to(dtype), gradient.to(dtype)


def truth(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and gradients of x and of the weight, in float64."""
    x, weight, gradient = (tensor.double() for tensor in inputs(dtype))
    x.requires_grad_(), weight.requires_grad_()
    output = functional.rms_norm(x, (WIDTH,), weight, EPS)
    output.backward(gradient)
    assert x.grad is not None and weight.grad is not None
    return output.detach(), x.grad, weight.grad


def on_a_rank(dtype: torch.dtype, twice: bool) -> dict[str, Any]:
    """This rank's part of the output and of both gradients; ``twice`` calls the norm on one x, summing gradients."""

    import patches

    patches.apply()
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.models.build import default_arguments, model_config
    from remit_megatron.models.norm import ShardedRMSNorm
    from tests.families import hf_values

    config = model_config(hf_values("olmo2-mha_untied"), default_arguments(params_dtype=dtype)).transformer
    with process_groups(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"])) as groups:
        rank, ranks = groups.tp.rank(), groups.tp.size()
        part = slice(rank * WIDTH // ranks, (rank + 1) * WIDTH // ranks)
        x, weight, gradient = (tensor[..., part].clone() for tensor in inputs(dtype))
        norm = ShardedRMSNorm(config, WIDTH, EPS, tp_group=groups.tp)
        norm.weight.data.copy_(weight)
        kept = x.clone()
        x.requires_grad_()
        output = norm(x)
        if twice:
            output = 0.5 * (output + norm(x))
        output.backward(gradient)
        assert torch.equal(x.detach(), kept), "the input is left as it was"
        attributes = [getattr(norm.weight, name) for name in ("tensor_model_parallel", "partition_dim")]
        sharded = norm.sharded_state_dict("n.")["n.weight"]
        return {
            "parts": (output.detach(), x.grad, norm.weight.grad),
            "attributes": attributes,
            "sharded": (sharded.global_shape, sharded.global_offset),
        }


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_equals_the_norm_of_the_whole_vector(pool, ranks, dtype, tolerance):
    found = pool.run(on_a_rank, world_size=ranks, dtype=dtype, twice=ranks == 2)
    for whole, *parts in zip(truth(dtype), *(rank["parts"] for rank in found), strict=True):
        assert parts[0].dtype == dtype
        error = (torch.cat(parts, dim=-1).double() - whole).abs().max() / whole.abs().max()
        assert error <= tolerance
    for rank, result in enumerate(found):
        assert result["attributes"] == [True, 0]
        assert result["sharded"] == ((WIDTH,), (rank * WIDTH // ranks,))


def pair_on_a_rank() -> dict[str, Any]:
    """Queries of 24 and keys of 12 channels, normed together and each for itself; how often ranks wait for others."""
    from collections import Counter

    import patches

    patches.apply()
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.models.build import default_arguments, model_config
    from remit_megatron.models.norm import ShardedRMSNorm, sharded_rms_norms
    from tests.families import hf_values

    config = model_config(hf_values("olmo2-mha_untied"), default_arguments()).transformer
    reduce, counted = dist.all_reduce, Counter()

    def count(*arguments: Any, **settings: Any) -> Any:
        counted["reductions"] += 1
        return reduce(*arguments, **settings)

    with process_groups(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"])) as groups:
        ranks, results, waits = groups.tp.size(), [], []
        norms = tuple(ShardedRMSNorm(config, width, EPS, tp_group=groups.tp) for width in (24, 12))
        generator = torch.Generator().manual_seed(groups.tp.rank())
        shapes = [(5, 2, 2, width // ranks // 2) for width in (24, 12)]  # two heads
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        incoming = [torch.randn(shape, generator=generator) for shape in shapes]
        for norm in norms:
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        dist.all_reduce = count
        try:
            for together in (True, False):
                counted.clear()
                vectors = tuple(value.clone().requires_grad_() for value in values)
                if together:
                    outputs = sharded_rms_norms(vectors, norms, groups.tp)
                else:
                    outputs = tuple(norm(x.flatten(2)).view_as(x) for norm, x in zip(norms, vectors, strict=True))
                gradients = torch.autograd.grad(outputs, (*vectors, *(norm.weight for norm in norms)), incoming)
                results.append([tensor.detach().tolist() for tensor in (*outputs, *gradients)])
                waits.append(counted["reductions"])
        finally:
            dist.all_reduce = reduce
    return {"results": results, "waits": waits}


def test_two_norms_with_one_reduction(pool):
    """OLMo 2's queries and keys: forward and backward wait for the other ranks once each, not twice."""
    for rank in pool.run(pair_on_a_rank, world_size=2):
        together, apart = rank["results"]
        assert together == apart, "a sum of two ranks is the same bits, whatever travels beside it"
        assert rank["waits"] == [2, 4]
