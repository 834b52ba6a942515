"""The study's bookkeeping: what is trained once, what is tested and how, what its tables say."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from scipy import stats

from remit_megatron.flywheel.toy_stages import Stages
from remit_megatron.flywheel.toy_study import MAIN, PARTS, Study, collect, compare, difference, predictions
from remit_megatron.flywheel.toy_study_tables import _CLAIMS, curve_difference, markdown, picture, verdict


def keys(root: Path, *parts: str) -> dict[str, str]:
    stages = Study(root, parts, [3]).stages()
    machine = Stages(root, stages, 1, print)
    machine._stopped = True  # only the keys are wanted
    assert machine.run() == 75
    return machine._keys


def test_parts_share_what_they_have_in_common(tmp_path) -> None:
    """The same stage has the same key in every part: a study in parts trains nothing twice."""
    every = keys(tmp_path, *PARTS)
    for part in PARTS:
        own = keys(tmp_path, part)
        assert own and all(every[name] == key for name, key in own.items())
    assert len(every) < sum(len(keys(tmp_path, part)) for part in PARTS)
    assert {name.split("/")[1] for name in every} == {"seed-3"}


def test_every_claim_is_about_something_that_is_trained() -> None:
    trained = {(cell, arm) for cells in PARTS.values() for cell, arms in cells.items() for arm in arms}
    for _, cell, name, other, measure, wanted in _CLAIMS:
        assert {(cell, name), (cell, other)} <= trained
        assert measure in ("greedy", "sampled", "book") and wanted in ("above", "below", "none")


def test_paired_test_against_scipy() -> None:
    first, second = [0.61, 0.64, 0.58, 0.66, 0.6], [0.55, 0.6, 0.59, 0.57, 0.52]
    found = compare(a - b for a, b in zip(first, second, strict=True))
    theirs = stats.ttest_rel(first, second)
    interval = theirs.confidence_interval(0.95)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.ahead == 4
    assert compare([0.1, 0.2]).p is None


def made_up(root: Path) -> None:
    """Three seeds of the main cell: remit 0.1 to 0.3 ahead, a weak reference that does harm."""
    for seed in (1, 2, 3):
        place = root / MAIN / f"seed-{seed}" / "scores"
        place.mkdir(parents=True)
        for name, value in {
            "base": 0.3,
            "ntp": 0.5,
            "remit": 0.5 + 0.1 * seed,
            "rl-5": 0.45,
            "no-clip": 0.3 + 0.15 * seed,
        }.items():
            (place / f"{name}.json").write_text(json.dumps({"greedy": value, "sampled": value, "book": 0.9}))
        (place / "after_ntp.json").write_text("[0.5, 0.6, 0.7]")
        (place / "after_remit.json").write_text(json.dumps([0.6, 0.6 + 0.01 * seed, 0.7]))
        for name, word in {"reference": "a gain: it is ahead.", "reference-5": "harm where it is."}.items():
            text = {"loss_difference": {"value": 0.1, "low": 0.05, "high": 0.15}}
            (place / f"check_{name}.json").write_text(json.dumps({"verdict": f"Expect {word}", "text": text}))


def test_collected_compared_and_tabled(tmp_path) -> None:
    made_up(tmp_path)
    data = json.loads(json.dumps(collect(tmp_path)))
    found = difference(data, MAIN, "remit", "ntp", "sampled")
    assert found is not None and found.mean == pytest.approx(0.2) and found.ahead == 3
    assert difference(data, MAIN, "rho1", "ntp", "sampled") is None
    told = predictions(data)
    assert sorted((row["reference"], row["said"]) for row in told) == [("reference", 1)] * 3 + [("reference-5", -1)] * 3
    further = [row["further"] for row in told if row["reference"] == "reference"]
    assert [row["no-clip"] for row in further] == pytest.approx([-0.05, 0.1, 0.25])
    assert all(row["further"] == {} for row in told if row["reference"] != "reference")
    curve = curve_difference(data, slice(1, None))
    assert curve is not None and curve.mean == pytest.approx(0.01)
    tables = markdown(data)
    assert "| main | remit | 3 | 0.700 ±0.100 |" in tables
    assert "| expect a gain | 3 | 3 | +0.200 | 2 of 3 | – |" in tables
    assert "| expect harm | 3 | 0 | -0.050 | – | – |" in tables
    assert "The sign was right 6 of 6 times that one was predicted" in tables
    _, p = stats.ttest_1samp([0.1, 0.2, 0.3], 0)
    row = f"| remit beats ntp at temperature 1 | +0.200 | [-0.048, +0.448] | 3 of 3 | {p:.1g} | not shown |"
    assert row in tables


def test_the_readme_s_picture_is_of_the_committed_data() -> None:
    """Byte for byte with the matplotlib that made it; with another, letters may differ by a pixel."""
    root = Path(__file__).resolve().parents[3]
    drawn = imread(io.BytesIO(picture(json.loads((root / "docs/study/toy.json").read_text()))))
    kept = imread(root / "docs/images/quickstart.png")
    assert drawn.shape == kept.shape and abs(drawn - kept).mean() < 0.01


@pytest.mark.parametrize(
    ("values", "wanted", "said"),
    [
        ([0.1, 0.11, 0.12], "above", "shown"),
        ([-0.1, -0.11, -0.12], "above", "contradicted"),
        ([-0.1, -0.11, -0.12], "below", "shown"),
        ([-0.1, 0.11, 0.02], "above", "not shown"),
        ([-0.1, 0.11, 0.02], "none", "none seen"),
        ([0.1, 0.11, 0.12], "none", "a difference is there (above 0)"),
        ([0.1, 0.11], "above", "too few seeds"),
    ],
)
def test_verdicts(values, wanted, said) -> None:
    assert verdict(compare(values), wanted) == said
