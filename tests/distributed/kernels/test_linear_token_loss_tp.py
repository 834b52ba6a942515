"""linear_token_loss over tensor-parallel ranks (gloo), with the real objectives, against one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed as dist

SEQUENCES, LENGTH, HIDDEN = 4, 9, 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OBJECTIVES = ({"name": "remit"}, {"name": "rho1", "scope": "sequence"})

# Shards of a vocabulary, by the height of each rank's, and how many ids are real.
SHARDS = {
    "one": ((31,), 28),
    "even": ((11, 11), 22),
    "padded": ((16, 16), 27),
    "second empty": ((16, 16), 9),
    "uneven": ((23, 4), 27),
    "four, padded": ((8,) * 4, 29),
    "four, three empty": ((8,) * 4, 5),
    "four, uneven": ((5, 1, 9, 2), 16),
    "four, no rows in one": ((5, 0, 9, 2), 15),
}


def inputs(name: str, dtype: str) -> dict[str, torch.Tensor]:
    """The whole problem, equal on every rank and in the test. Padding rows of the weight hold NaN."""
    widths, vocab_size = SHARDS[name]
    generator = torch.Generator().manual_seed(sum(widths) + vocab_size)
    mask = (torch.rand(SEQUENCES, LENGTH, generator=generator) > 0.25).float()
    mask[0], mask[1] = 0, 0
    mask[1, 4] = 1
    weight = torch.randn(sum(widths), HIDDEN, generator=generator)
    weight[vocab_size:] = torch.nan
    return {
        "hidden": torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=generator).to(DTYPES[dtype]),
        "weight": weight.to(DTYPES[dtype]),
        "labels": torch.randint(vocab_size, (SEQUENCES, LENGTH), generator=generator),
        "mask": mask,
        "reference": torch.rand(SEQUENCES, LENGTH, generator=generator) * 5,
        "order": torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH),
    }


def loss_of_shards(names: list[str], dtype: str, objective: dict[str, Any], scale: float) -> dict[str, Any]:
    """All cases with as many shards as ranks: losses, gradients, and the collectives of forward and backward."""
    from remit_megatron.kernels import linear_token_loss
    from remit_megatron.objectives import ChunkedObjective, build_objective

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    counts = {"all_gather_into_tensor": 0, "all_reduce": 0}
    originals = {name: getattr(dist, name) for name in counts}

    def counted(name: str):
        def call(*args, **kwargs):
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    found: dict[str, Any] = {}
    try:
        for name in counts:
            setattr(dist, name, counted(name))
        for name in names:
            widths, vocab_size = SHARDS[name]
            whole, first = inputs(name, dtype), sum(widths[:rank])
            for reduce in (True, False):
                hidden = whole["hidden"].clone().requires_grad_()
                shard = whole["weight"][first : first + widths[rank]].clone().requires_grad_()
                weighting = ChunkedObjective(
                    build_objective(**objective),
                    whole["mask"],
                    reference_loss=whole["reference"],
                    order=whole["order"],
                )
                counts.update(dict.fromkeys(counts, 0))
                loss, losses = linear_token_loss(
                    hidden,
                    shard,
                    whole["labels"],
                    weighting,
                    tp_group=dist.group.WORLD,
                    vocab_size=vocab_size,
                    vocab_start=first,
                    loss_mask=whole["mask"],
                    chunk_sequences=3,
                    reduce_hidden_grad=reduce,
                )
                (loss * scale).backward()
                assert hidden.grad is not None and shard.grad is not None
                found[f"{name} {reduce}"] = {
                    "loss": loss.item(),
                    "losses": losses.tolist(),
                    "hidden": hidden.grad.tolist(),
                    "weight": shard.grad.tolist(),
                    "collectives": dict(counts),
                }
        return found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def logits_path(whole: dict[str, torch.Tensor], vocab_size: int, objective: dict[str, Any], scale: float, kind):
    """Loss, losses and gradients of the whole vocabulary, computed in ``kind``."""
    from remit_megatron.kernels import reference_token_loss
    from remit_megatron.objectives import build_objective

    hidden, weight = (whole[name].to(kind).requires_grad_() for name in ("hidden", "weight"))
    losses = reference_token_loss(hidden @ weight[:vocab_size].t(), whole["labels"], loss_mask=whole["mask"])
    loss = build_objective(**objective)(
        losses, whole["mask"], reference_loss=whole["reference"], order=whole["order"]
    ).loss_sum
    (loss * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return {
        "loss": loss.detach().double(),
        "losses": losses.detach(),
        "hidden": hidden.grad.double(),
        "weight": weight.grad.double(),
    }


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective["name"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradients_of_the_shards(pool, size, dtype, objective):
    names = [name for name, (widths, _) in SHARDS.items() if len(widths) == size]
    assert names
    scale = 2.5
    ranks = pool.run(loss_of_shards, world_size=size, names=names, dtype=dtype, objective=objective, scale=scale)
    for name in names:
        whole, vocab_size = inputs(name, dtype), SHARDS[name][1]
        expected = logits_path(whole, vocab_size, objective, scale, torch.float64)
        plain = logits_path(whole, vocab_size, objective, scale, DTYPES[dtype])
        for reduce in (True, False):
            results = [rank[f"{name} {reduce}"] for rank in ranks]
            found = {key: torch.tensor(results[0][key], dtype=torch.float64) for key in ("loss", "losses")}
            assert all(r["losses"] == results[0]["losses"] and r["loss"] == results[0]["loss"] for r in results)
            parts = torch.tensor([r["hidden"] for r in results], dtype=torch.float64)
            if reduce:  # every rank has the sum, once
                assert all(torch.equal(part, parts[0]) for part in parts)
                found["hidden"] = parts[0]
            else:  # the ranks have their shards' parts
                found["hidden"] = parts.sum(0)
            found["weight"] = torch.cat(
                [torch.tensor(r["weight"], dtype=torch.float64).view(-1, HIDDEN) for r in results]
            )
            assert not found["weight"][vocab_size:].any() and not found["hidden"][whole["mask"] == 0].any()
            eps = torch.finfo(DTYPES[dtype]).eps
            for key, value in expected.items():
                # A part of each shard is rounded before the sum.
                error, plain_error = (found[key] - value).abs().max(), (plain[key] - value).abs().max()
                margin = (3 + size) * eps * value.abs().max()
                assert error <= plain_error + margin, (name, reduce, key, error, plain_error, margin)
            chunks = 2  # three sequences, and the rest
            gathers = 0 if size == 1 else chunks
            reductions = chunks if size > 1 and reduce else 0
            assert all(
                r["collectives"] == {"all_gather_into_tensor": gathers, "all_reduce": reductions} for r in results
            )
