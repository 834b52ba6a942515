"""token_weights and weighted_loss over context-parallel ranks (gloo): equal to one process, for any slices.

Four processes start once (this file run as a script), work through all cases and leave their results in a file each;
the tests judge them.
"""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from remit_megatron.objectives.weights import CENTERINGS, token_weights, weighted_loss
from tests.distributed.script_ranks import run_script

WORLD, SEQUENCES, LENGTH = 4, 5, 48
CASES = list(itertools.product((2, 4), ("zigzag", "contiguous", "strided"), CENTERINGS, (0.2, 0.0, None)))
# The means are added in another order, in float64; what is left is the rounding of a weight of at most 2 to float32.
ROUNDING = 2 * torch.finfo(torch.float32).eps


def inputs() -> dict[str, torch.Tensor]:
    """Whole sequences; masks: none, one token, one half, the ends; documents of uneven length; bad scores."""
    generator = torch.Generator().manual_seed(4)
    student = torch.rand(SEQUENCES, LENGTH, generator=generator) * 12
    reference = student + torch.randn(SEQUENCES, LENGTH, generator=generator)
    mask = (torch.rand(SEQUENCES, LENGTH, generator=generator) > 0.2).float()
    mask[0] = 0
    mask[1] = 0
    mask[1, 17] = 1
    mask[2, : LENGTH // 2] = 0
    mask[3, 6:-6] = 0
    reference[4, 5], reference[4, 30], reference[2, 40] = torch.nan, torch.inf, -torch.inf
    student[0, 3] = torch.nan
    ended = torch.rand(SEQUENCES, LENGTH, generator=generator) > 0.85
    document_ids = ended.cumsum(1) * 3 - 7  # any integers
    return {"student": student, "reference": reference, "mask": mask, "document_ids": document_ids}


def own_tokens(slicing: str, rank: int, size: int) -> torch.Tensor:
    """Positions of a rank."""
    if slicing == "zigzag":
        chunks = torch.arange(LENGTH).chunk(2 * size)
        return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))
    return torch.arange(LENGTH).chunk(size)[rank] if slicing == "contiguous" else torch.arange(rank, LENGTH, size)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 4)}
    results = {}
    for size, slicing, centering, epsilon in CASES:
        if rank >= size:
            continue
        own = own_tokens(slicing, rank, size)
        student, reference, mask, documents = (t[:, own] for t in inputs().values())
        options = {
            "epsilon": epsilon,
            "centering": centering,
            "document_ids": documents,
            "cp_group": groups[size],
        }
        weights = [token_weights(student, reference, mask, **options) for _ in range(2)]
        assert torch.equal(*weights), "repeated, the bits are the same"
        result = weighted_loss(student, reference, mask, **options)
        sums = result.statistics | {"loss_sum": result.loss_sum, "counted": result.counted}
        results[size, slicing, centering, epsilon] = {"weights": weights[0], "sums": sums}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    return run_script(__file__, folder, WORLD)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_ranks_together_are_one_process(results, case):
    size, slicing, centering, epsilon = case
    student, reference, mask, documents = inputs().values()
    options = {"epsilon": epsilon, "centering": centering, "document_ids": documents}
    expected = token_weights(student, reference, mask, **options)
    found = torch.full_like(expected, torch.nan)
    for rank in range(size):
        found[:, own_tokens(slicing, rank, size)] = results[rank][case]["weights"]
    counted = (mask > 0) & reference.isfinite()
    assert not found[~counted].any() and torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if epsilon == 0 else ROUNDING)
    if centering != "none":
        assert found[1, 17] == 1, "alone in its sequence and document, on one of the ranks"

    whole = weighted_loss(student, reference, mask, **options)
    parts = [results[rank][case]["sums"] for rank in range(size)]
    assert sum(int(p["counted"]) for p in parts) == int(whole.counted) == int(counted.sum())
    torch.testing.assert_close(sum(p["loss_sum"] for p in parts), whole.loss_sum, rtol=1e-6, atol=1e-5)
    for name, value in whole.statistics.items():
        torch.testing.assert_close(sum(p[name] for p in parts), value, rtol=1e-5, atol=1e-5)


def test_the_cases_are_uneven():
    """What makes the comparison mean something: ranks hold different numbers of counted tokens."""
    _, reference, mask, documents = inputs().values()
    counted = (mask > 0) & reference.isfinite()
    per_rank = torch.stack([counted[:, own_tokens("zigzag", rank, 4)].sum(1) for rank in range(4)])
    assert (per_rank.amax(0) - per_rank.amin(0))[2:4].min() >= 2 and per_rank[:, 1].sum() == 1
    first, second = documents[2, own_tokens("zigzag", 0, 2)], documents[2, own_tokens("zigzag", 1, 2)]
    assert set(first.tolist()) & set(second.tolist()), "a document lies on two ranks"


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
