"""`overlap_grad_reduce`, which runs have on GPUs: what is counted of it here, where nothing can be gained by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import hf_values

CASE = "llama-gqa_4_2_untied"
BUCKET = 4000  # numbers of a bucket, at least


def backward(overlap: bool) -> dict[str, Any]:
    """A backward pass of one of two replicas: bytes whose reduction had begun when the last gradient was there."""
    import patches

    patches.apply()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.models.build import build_chunks, default_arguments, model_config, unwrap

    begun: list[int] = []
    at_the_end: list[int] = []
    original = torch.distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        begun.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    with process_groups() as groups:
        torch.manual_seed(0)
        (chunk,) = build_chunks(model_config(hf_values(CASE), default_arguments()), groups, initialize=True)
        chunk.train().requires_grad_(True)
        settings = DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=BUCKET)
        model = DistributedDataParallel(chunk.config, settings, chunk)
        first = unwrap(model).embedding.word_embeddings.weight  # its gradient is the last of a backward pass
        first.register_hook(lambda _: at_the_end.append(sum(begun)))
        ids = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
        torch.distributed.all_reduce = all_reduce
        try:
            for _ in range(2):  # in the first pass Megatron finds out which gradients come
                model.zero_grad_buffer()
                begun.clear()
                at_the_end.clear()
                logits = model(ids[:, :-1], torch.arange(16).expand(2, -1), None)
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
                model.finish_grad_sync()
        finally:
            torch.distributed.all_reduce = original
        gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    return {"early": at_the_end, "total": sum(begun), "reductions": len(begun), "gradients": gradients}


@pytest.fixture(scope="module")
def passes(pool) -> dict[bool, list[dict[str, Any]]]:
    return {overlap: pool.run(backward, world_size=2, overlap=overlap) for overlap in (False, True)}


def test_reductions_begin_while_the_backward_pass_goes_on(passes):
    for apart, overlapped in zip(passes[False], passes[True], strict=True):
        size = 4 * sum(gradient.numel() for gradient in apart["gradients"].values())
        assert apart["early"] == [0] and apart["total"] == size, "all of them after the last gradient"
        (early,) = overlapped["early"]
        assert overlapped["reductions"] > 4 and overlapped["total"] == size, "every number once"
        assert early > 0.7 * size, f"{early / size:.0%} of the bytes before the last gradient"


def test_the_gradients_are_the_same(passes):
    for apart, overlapped in zip(passes[False], passes[True], strict=True):
        for name, gradient in apart["gradients"].items():
            torch.testing.assert_close(overlapped["gradients"][name], gradient, rtol=1e-6, atol=1e-8)
