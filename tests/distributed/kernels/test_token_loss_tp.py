"""token_loss and token_logprob over tensor-parallel ranks (gloo), against float64 on the whole vocabulary.

Four processes start once (this file run as a script), work through all cases and leave their results in a file each;
the tests judge them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from remit_megatron.kernels import reference_token_loss, token_logprob, token_loss
from tests.distributed.script_ranks import run_script

WORLD, TOKENS, HIDDEN = 4, 13, 12
EPS32 = torch.finfo(torch.float32).eps
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Layout:
    """Shards of a vocabulary: columns of each rank, how many ids are real, and what is special about the logits."""

    name: str
    widths: tuple[int, ...]
    vocab_size: int
    logits: str = "normal"

    @property
    def equal(self) -> bool:
        return len(set(self.widths)) == 1


LAYOUTS = (
    Layout("one rank", (29,), 29),
    Layout("one rank, padded", (32,), 29),
    Layout("even", (11, 11), 22),
    Layout("padded", (19, 19), 35),
    Layout("empty second shard", (16, 16), 9),
    Layout("a column each", (1, 1), 2),
    Layout("uneven", (23, 4), 27),
    Layout("even of four", (7,) * 4, 28),
    Layout("padded of four", (16,) * 4, 37),
    Layout("three empty shards", (16,) * 4, 3),
    Layout("a column each of four", (1,) * 4, 4),
    Layout("uneven of four", (5, 1, 9, 2), 16),
    Layout("empty in the middle", (5, 0, 9, 2), 16),
    Layout("vocabulary of one", (4,) * 4, 1),
    Layout("huge", (9,) * 4, 35, "huge"),
    Layout("huge in one shard", (9,) * 4, 35, "huge shard"),
    Layout("a shard of -1e30", (9,) * 4, 35, "low shard"),
    Layout("a shard of -inf", (9,) * 4, 35, "infinite shard"),
    Layout("equal logits", (9,) * 4, 35, "equal"),
)
CASES = [(layout, dtype) for layout in LAYOUTS for dtype in DTYPES]
IDS = [f"{layout.name}-{dtype}" for layout, dtype in CASES]


def inputs(layout: Layout, dtype: str) -> dict[str, torch.Tensor]:
    """The whole problem, equal on every rank and in the test. Padding columns and masked rows hold NaN."""
    generator = torch.Generator().manual_seed(LAYOUTS.index(layout))
    width = sum(layout.widths)
    logits = torch.randn(TOKENS, width, generator=generator) * 3
    special = slice(sum(layout.widths[:1]), sum(layout.widths[:2]))  # the second shard
    lowest = -6e4 if dtype == "float16" else -1e30
    if layout.logits == "huge":
        logits *= 1e4
    elif layout.logits == "equal":
        logits[:] = 1e4
    elif layout.logits != "normal":
        logits[:, special] = {"huge shard": 1e4, "low shard": lowest, "infinite shard": -torch.inf}[layout.logits]
    logits = logits.clamp(max=6e4)
    if dtype == "float16":
        logits = torch.where(logits.isfinite(), logits.clamp(min=-6e4), logits)
    labels = torch.randint(layout.vocab_size, (TOKENS,), generator=generator)
    if layout.logits == "infinite shard":
        labels %= special.start  # a label of -inf has an infinite loss, rightly
    mask = torch.rand(TOKENS, generator=generator) > 0.25
    labels[5] = -100
    weights = torch.rand(TOKENS, generator=generator) * 3 - 1
    first = int((mask & (labels != -100)).nonzero()[0])
    weights[first] = 0.0
    logits[:, layout.vocab_size :] = torch.nan
    logits[~mask] = torch.nan
    hidden, weight = torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(width, HIDDEN, generator=generator)
    kind = DTYPES[dtype]
    return {
        "logits": logits.to(kind),
        "labels": labels,
        "mask": mask,
        "weights": weights,
        "hidden": hidden.to(kind),
        "weight": weight.to(kind),
    }


# -- in each process ------------------------------------------------------------------------------------------


class CountedCollectives:
    """Counts this process's collectives, of any kind that could serve here."""

    NAMES = ("all_gather_into_tensor", "all_gather", "all_reduce", "reduce_scatter_tensor", "broadcast")

    def __init__(self):
        self.count = 0
        for name in self.NAMES:
            setattr(dist, name, self.wrap(getattr(dist, name)))

    def wrap(self, function):
        def counting(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counting

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


def run_case(layout: Layout, dtype: str, group, collectives: CountedCollectives) -> dict[str, object]:
    rank, whole = dist.get_rank(group), inputs(layout, dtype)
    start = sum(layout.widths[:rank])
    own = slice(start, start + layout.widths[rank])
    settings = {
        "tp_group": group,
        "vocab_size": layout.vocab_size,
        "vocab_start": None if layout.equal else start,
        "loss_mask": whole["mask"],
    }
    leaf = whole["logits"][:, own].contiguous().requires_grad_()
    logits, result = leaf * 1, {}
    collectives.take()
    loss = token_loss(logits, whole["labels"], **settings)
    result["forward_collectives"] = collectives.take()
    (gradient,) = torch.autograd.grad(loss, logits, whole["weights"])
    result["backward_collectives"] = collectives.take()
    result["in_place"] = gradient.data_ptr() == logits.data_ptr()
    shard = whole["weight"][own]
    result["logprob"] = token_logprob(whole["hidden"], shard, whole["labels"], chunk_tokens=4, **settings)
    result["logprob_collectives"] = collectives.take()
    bad_labels = whole["labels"].masked_fill(whole["mask"], layout.vocab_size)
    try:
        token_loss(leaf, bad_labels, **settings)
    except ValueError as error:
        result["error"] = str(error)
    assert collectives.take() == 0, "a bad label stops every rank before the collective"
    return result | {"loss": loss.detach(), "gradient": gradient}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}
    collectives, results = CountedCollectives(), {}
    for case, name in zip(CASES, IDS, strict=True):
        if rank < len(case[0].widths):
            results[name] = run_case(*case, groups[len(case[0].widths)], collectives)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


# -- the tests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    """Name of the case -> the result of each of its ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    saved = run_script(__file__, folder, WORLD)
    return {name: [s[name] for s in saved[: len(case[0].widths)]] for case, name in zip(CASES, IDS, strict=True)}


def truth(whole: dict[str, torch.Tensor], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = whole["logits"][:, :vocab_size].double().requires_grad_()
    loss = reference_token_loss(logits, whole["labels"], loss_mask=whole["mask"])
    (gradient,) = torch.autograd.grad(loss, logits, whole["weights"].double())
    return loss.detach(), gradient


def plain(whole: dict[str, torch.Tensor], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One process, float32, autograd, gradient in the dtype of the logits."""
    counted = whole["mask"] & (whole["labels"] != -100)
    logits = whole["logits"][:, :vocab_size].masked_fill(~counted[:, None], 0.0).requires_grad_()
    labels = whole["labels"].masked_fill(~counted, -100)
    loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)
    (gradient,) = torch.autograd.grad(loss, logits, whole["weights"])
    return loss.detach(), gradient


@pytest.mark.parametrize("layout, dtype", CASES, ids=IDS)
def test_loss_and_gradient_of_the_shards(results, layout, dtype):
    ranks, whole = results[f"{layout.name}-{dtype}"], inputs(layout, dtype)
    counted = whole["mask"] & (whole["labels"] != -100)
    assert 4 < counted.sum() < TOKENS
    true_loss, true_gradient = truth(whole, layout.vocab_size)
    plain_loss, plain_gradient = plain(whole, layout.vocab_size)

    loss = ranks[0]["loss"]
    assert all(torch.equal(r["loss"], loss) for r in ranks), "every rank has the same bits"
    assert not loss[~counted].any()
    # Margins, in roundings, as in the tests of one process: the shards' totals are rescaled once more.
    assert ((loss - true_loss).abs() <= (plain_loss - true_loss).abs() + 6 * EPS32 * true_loss.abs().clamp(min=1)).all()

    assert all(r["in_place"] for r, width in zip(ranks, layout.widths, strict=True) if width)
    gradient = torch.cat([r["gradient"] for r in ranks], dim=1)
    assert gradient.dtype == DTYPES[dtype] and gradient.shape == whole["logits"].shape
    assert not gradient[:, layout.vocab_size :].any() and not gradient[~counted].any()
    gradient = gradient[:, : layout.vocab_size]
    assert not gradient[counted & (whole["weights"] == 0)].any() and (whole["weights"] == 0).any()
    info = torch.finfo(DTYPES[dtype])
    margin = (info.eps + 200 * EPS32) * true_gradient.abs() + info.smallest_normal * info.eps
    rows = counted.nonzero().squeeze(1)
    margin[rows, whole["labels"][rows]] += 6 * EPS32 * whole["weights"][rows].abs()
    assert ((gradient - true_gradient).abs() <= (plain_gradient - true_gradient).abs() + margin).all()


@pytest.mark.parametrize("layout, dtype", CASES, ids=IDS)
def test_logprob_of_the_shards(results, layout, dtype):
    ranks, whole = results[f"{layout.name}-{dtype}"], inputs(layout, dtype)
    logits = whole["hidden"] @ whole["weight"][: layout.vocab_size].t()
    expected = -reference_token_loss(logits, whole["labels"], loss_mask=whole["mask"])
    # A product of another shape may be summed in another order and round to a neighbor.
    margin = float(logits.abs().max()) * torch.finfo(DTYPES[dtype]).eps
    for rank in ranks:
        assert torch.equal(rank["logprob"], ranks[0]["logprob"])
        torch.testing.assert_close(rank["logprob"].double(), expected, rtol=1e-6, atol=margin)


@pytest.mark.parametrize("layout, dtype", CASES, ids=IDS)
def test_one_collective_and_an_error_on_every_rank(results, layout, dtype):
    for rank in results[f"{layout.name}-{dtype}"]:
        expected = 0 if len(layout.widths) == 1 else 1
        assert rank["forward_collectives"] == expected and rank["backward_collectives"] == 0
        assert rank["logprob_collectives"] == expected, "one for the call, not one for each chunk"
        assert f"found {layout.vocab_size} at flat position" in rank["error"]


def test_all_ranks_took_part(results):
    assert len(results) == len(CASES) == 3 * len(LAYOUTS)
    assert {len(ranks) for ranks in results.values()} == {1, 2, 4}


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
