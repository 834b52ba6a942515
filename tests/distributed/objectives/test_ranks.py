"""kd over tensor-parallel ranks and rho1 over data and context parallel ones (gloo), against one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed as dist

TOKENS, HIDDEN = 15, 9
EPS32 = torch.finfo(torch.float32).eps


def join(work, **kwargs: Any) -> Any:
    dist.init_process_group("gloo")
    return work(dist.get_rank(), dist.get_world_size(), **kwargs)


# Distillation: shards of a vocabulary, by the width of each rank's, and how many ids are real.

SHARDS = {
    "one": ((31,), 28),
    "even": ((11, 11), 22),
    "padded": ((16, 16), 27),
    "second empty": ((16, 16), 9),
    "uneven": ((23, 4), 27),
    "four, padded": ((8,) * 4, 29),
    "four, three empty": ((8,) * 4, 5),
    "four, uneven": ((5, 1, 9, 2), 16),
    "four, no columns in one": ((5, 0, 9, 2), 15),
}
SETTINGS = ((1.0, 0.0), (2.0, 0.0), (2.0, 0.3), (0.25, 0.5))


def distillation_inputs(widths: tuple[int, ...], vocab_size: int, scale: float) -> dict[str, torch.Tensor]:
    """The whole problem. Padding and masked rows hold NaN.

    The reference's logits are sums of small multiples of a power of two, so that every product of every shape is exact
    and only what is made of them is judged.
    """
    generator = torch.Generator().manual_seed(sum(widths) + vocab_size)
    width = sum(widths)
    x = torch.randn(TOKENS, width, generator=generator) * scale
    weight = torch.randint(-8, 9, (width, HIDDEN), generator=generator) / 8 * scale
    mask = (torch.rand(TOKENS, generator=generator) > 0.25).float()
    mask[0] = 0
    x[:, vocab_size:], weight[vocab_size:], x[mask == 0] = torch.nan, torch.nan, torch.nan
    return {
        "x": x,
        "weight": weight,
        "hidden": torch.randint(-4, 5, (TOKENS, HIDDEN), generator=generator) / 4,
        "labels": torch.randint(vocab_size, (TOKENS,), generator=generator),
        "mask": mask,
        "incoming": torch.randn(TOKENS, generator=generator),
    }


def distill_shards(rank: int, size: int, *, names: list[str]) -> dict[Any, Any]:
    """All cases with as many shards as ranks: this rank's losses, gradient, and number of collectives."""
    from remit_megatron.kernels import distillation_loss

    count = 0
    gather = dist.all_gather_into_tensor

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        return gather(*args, **kwargs)

    dist.all_gather_into_tensor = counting
    try:
        found: dict[Any, Any] = {}
        for name in names:
            widths, vocab_size = SHARDS[name]
            first, last = sum(widths[:rank]), sum(widths[: rank + 1])
            for scale in (1.0, 1024.0):
                whole = distillation_inputs(widths, vocab_size, scale)
                for temperature, ntp_weight in SETTINGS:
                    leaf = whole["x"][:, first:last].clone().requires_grad_()
                    count = 0
                    loss, nll = distillation_loss(
                        leaf * 1,
                        whole["labels"],
                        whole["hidden"],
                        whole["weight"][first:last],
                        temperature=temperature,
                        ntp_weight=ntp_weight,
                        tp_group=dist.group.WORLD,
                        vocab_size=vocab_size,
                        vocab_start=first,
                        loss_mask=whole["mask"],
                        chunk_tokens=4,
                    )
                    loss.backward(whole["incoming"])
                    assert leaf.grad is not None
                    found[name, scale, temperature, ntp_weight] = [
                        t.tolist() for t in (loss.detach(), nll, leaf.grad)
                    ] + [count]
        return found
    finally:
        dist.all_gather_into_tensor = gather


def definition(whole: dict[str, torch.Tensor], vocab_size: int, temperature: float, ntp_weight: float):
    """Loss and gradient in float64, of the logits rounded to float32."""
    counted = whole["mask"] > 0
    x = whole["x"][:, :vocab_size].double().masked_fill(~counted[:, None], 0.0).requires_grad_()
    y = (whole["hidden"] @ whole["weight"][:vocab_size].t()).double()
    p = torch.softmax(y / temperature, -1)
    divergence = (p * (torch.log_softmax(y / temperature, -1) - torch.log_softmax(x / temperature, -1))).sum(-1)
    nll = torch.nn.functional.cross_entropy(x, whole["labels"], reduction="none")
    loss = ((1 - ntp_weight) * temperature**2 * divergence + ntp_weight * nll) * counted
    (gradient,) = torch.autograd.grad(loss, x, whole["incoming"].double())
    return loss.detach(), (nll * counted).detach(), gradient


@pytest.mark.parametrize("size", [1, 2, 4])
def test_distillation_of_the_shards(pool, size):
    names = [name for name, (widths, _) in SHARDS.items() if len(widths) == size]
    ranks = pool.run(join, world_size=size, work=distill_shards, names=names)
    assert len(ranks[0]) == len(names) * 2 * len(SETTINGS)
    for case in ranks[0]:
        name, scale, temperature, ntp_weight = case
        widths, vocab_size = SHARDS[name]
        whole = distillation_inputs(widths, vocab_size, scale)
        loss, nll, gradient = definition(whole, vocab_size, temperature, ntp_weight)
        assert all(rank[case][:2] == ranks[0][case][:2] for rank in ranks), "the same bits on every rank"
        assert all(rank[case][3] == (size > 1) for rank in ranks), "one collective, in forward"
        margin = 40 * EPS32 * max(temperature, 1 / temperature)
        found_loss, found_nll = (torch.tensor(values, dtype=torch.float64) for values in ranks[0][case][:2])
        torch.testing.assert_close(found_loss, loss, rtol=4e-6, atol=margin, msg=lambda m, case=case: f"{case}: {m}")
        torch.testing.assert_close(found_nll, nll, rtol=4e-6, atol=margin)
        parts = [
            torch.tensor(rank[case][2], dtype=torch.float64).view(TOKENS, width)
            for rank, width in zip(ranks, widths, strict=True)
        ]
        found = torch.cat(parts, dim=1)
        assert not found[:, vocab_size:].any() and not found[whole["mask"] == 0].any()
        torch.testing.assert_close(found[:, :vocab_size], gradient, rtol=1e-5, atol=margin)


# RHO-1: a global batch of sequences over data parallel ranks, context parallel ranks and microbatches.

SAMPLES, LENGTH = 16, 24
LAYOUTS = {"1 rank": (1, 1), "dp2": (2, 1), "cp2": (1, 2), "dp2 cp2": (2, 2), "dp4": (4, 1), "cp4": (1, 4)}


def scored_batch() -> dict[str, torch.Tensor]:
    """Masks: none, one token, the first left out; every difference a multiple of 1/2, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(11)
    student = torch.randint(0, 10, (SAMPLES, LENGTH), generator=generator) / 2
    reference = torch.randint(0, 10, (SAMPLES, LENGTH), generator=generator) / 2
    mask = (torch.rand(SAMPLES, LENGTH, generator=generator) > 0.4).float()
    mask[3:5] = 0
    mask[4, 17] = 1
    mask[6:8, 0] = 0
    reference[9, 3:9] = torch.inf
    return {"student": student, "reference": reference, "mask": mask}


def select_tokens(rank: int, world: int, *, data: int, context: int, micro: int, keep: float) -> dict[str, list]:
    """What this rank keeps in each scope: positions in the global batch."""
    from remit_megatron.models.batch import Batch, sequence_slice
    from remit_megatron.objectives import ScoredTokens, build_objective

    groups = [dist.new_group([d * context + c for c in range(context)]) for d in range(data)]
    dp_rank, cp_rank = divmod(rank, context)
    cp_group = groups[dp_rank] if context > 1 else None
    whole = scored_batch()
    positions = torch.arange(LENGTH).expand(micro, LENGTH)
    scored = []
    for number in range(SAMPLES // (micro * data)):
        first = (number * data + dp_rank) * micro
        student, reference, mask, place = (
            sequence_slice(t, cp_rank, context)
            for t in (*(t[first : first + micro] for t in whole.values()), positions)
        )
        order = Batch(student, student, mask, place, student).order(context, first_sample=first)
        scored.append(ScoredTokens(student, reference, mask, order))
    found: dict[str, list] = {}
    for scope in ("sequence", "micro_batch", "global_batch"):
        objective: Any = build_objective("rho1", keep=keep, scope=scope)
        group = dist.group.WORLD if world > 1 else None
        chosen = objective.select(scored, group=group) if scope == "global_batch" else [None] * len(scored)
        kept, count, total = [], 0, 0.0
        for tokens, selected in zip(scored, chosen, strict=True):
            loss = tokens.student_loss.clone().requires_grad_()
            result = objective(
                loss,
                tokens.loss_mask,
                reference_loss=tokens.reference_loss,
                order=tokens.order,
                selected=selected,
                cp_group=cp_group,
            )
            result.loss_sum.backward()
            assert loss.grad is not None
            kept += tokens.order[loss.grad > 0].tolist()
            count += int(result.counted)
            total += float(result.loss_sum.detach())
        found[scope] = [kept, count, total]
    return found


def kept_by_sorting(scope: str, micro: int, keep: float) -> set[int]:
    whole = scored_batch()
    group_of = {"sequence": 1, "micro_batch": micro, "global_batch": SAMPLES}[scope]
    kept: set[int] = set()
    for first in range(0, SAMPLES, group_of):
        candidates = []
        for sample in range(first, first + group_of):
            for position in range(LENGTH):
                student, reference, mask = (float(t[sample, position]) for t in whole.values())
                if mask and reference != float("inf"):
                    candidates.append((reference - student, sample * LENGTH + position))
        count = int(keep * len(candidates) + 0.5)
        kept |= {place for _, place in sorted(candidates)[: max(count, 1)]}
    return kept


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("micro", "keep"), [(2, 0.8), (4, 0.35), (1, 0.001)])
def test_every_layout_keeps_the_same_tokens(pool, layout, micro, keep):
    data, context = LAYOUTS[layout]
    ranks = pool.run(
        join,
        world_size=data * context,
        work=select_tokens,
        data=data,
        context=context,
        micro=micro,
        keep=keep,
    )
    student = scored_batch()["student"].flatten()
    for scope in ("sequence", "micro_batch", "global_batch"):
        expected = kept_by_sorting(scope, micro, keep)
        found = [place for rank in ranks for place in rank[scope][0]]
        assert len(found) == len(set(found)) == sum(rank[scope][1] for rank in ranks)
        assert set(found) == expected, scope
        total = float(student[sorted(expected)].double().sum())
        assert sum(rank[scope][2] for rank in ranks) == pytest.approx(total, rel=1e-6)


def test_ties_lie_at_the_global_threshold():
    whole = scored_batch()
    counted = (whole["mask"] > 0) & whole["reference"].isfinite()
    excess = (whole["student"] - whole["reference"])[counted].sort(descending=True).values
    for keep in (0.8, 0.35):
        count = int(keep * len(excess) + 0.5)
        assert excess[count - 1] == excess[count], "the last one kept equals the first one left out"
