"""Our selection beside that of the MiniPLM authors: selection.json holds what their script kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from remit_megatron.data.miniplm import Keep, Scores, difference_score

GOLDEN = json.loads((Path(__file__).parent / "selection.json").read_text())


RATIOS = ("0.8", "0.5", "0.1", "1.0")


def ours(losses: dict[str, list[float]], ratio: str, directory: Path) -> list[int]:
    """Numbers of the samples that we keep, of losses that are equal over each sample."""
    pairs = zip(losses["reference"], losses["teacher"], strict=True)
    values = [difference_score(np.full(4, reference), np.full(4, teacher)) for reference, teacher in pairs]
    scores = Scores(len(values), directory=directory)
    scores.in_order[:] = values
    scores.sort()
    threshold, ties = scores.threshold(Keep.parse(ratio).of(len(values)))
    first, left = scores.selected(0, 20, threshold, ties)
    second, _ = scores.selected(20, len(values), threshold, left)
    return [*first.tolist(), *second.tolist()]


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_authors_keep_the_same(tmp_path, ratio):
    assert ours(GOLDEN["scores"]["distinct"], ratio, tmp_path) == GOLDEN["scores"]["distinct"]["kept"][ratio]


@pytest.mark.parametrize("ratio", RATIOS)
def test_of_equal_scores_as_many(tmp_path, ratio):
    """Which of several samples of one score they keep is up to a sort that promises no order; we keep the first."""
    tied = GOLDEN["scores"]["tied"]
    difference = np.array(tied["reference"]) - np.array(tied["teacher"])
    found, expected = ours(tied, ratio, tmp_path), tied["kept"][ratio]
    assert sorted(difference[found]) == sorted(difference[expected])
    lowest = min(difference[found])
    same = np.flatnonzero(difference == lowest).tolist()
    assert [sample for sample in found if sample in same] == same[: sum(sample in same for sample in expected)]
    assert ratio != "0.5" or found != expected, "the edge falls between equal scores"
