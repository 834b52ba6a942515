"""What is said of a quickstart follows from its figures, whichever way they went."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from scipy import stats

from remit_megatron.flywheel.quickstart_report import MEASURES, NAMES, Report, SeedResult, gather
from remit_megatron.flywheel.toy import ToyText
from remit_megatron.flywheel.toy_chain import ARMS, Arm, Chain, Lengths

LENGTHS = Lengths(again=8, every=4)


def result(seed: int, shift: float = 0.0) -> SeedResult:
    """Made up, each figure another one."""
    models = {
        name: {measure: round(0.1 * n + 0.03 * m + shift, 4) for m, measure in enumerate(MEASURES)}
        for n, name in enumerate(NAMES, 1)
    }
    return SeedResult(seed, models, {"ntp": [0.5, 0.7, 0.9], "remit": [0.6 + shift, 0.6, 0.95]}, "Expect a gain.")


def test_results_have_the_form_that_others_read() -> None:
    report = Report([result(7)], LENGTHS, 100)
    record = report.record()
    assert set(record) == {"arms", "after_rl", "seed", "before", "reference_check"}
    assert set(record["arms"]) == {"ntp", "remit", "rho1", "kd", "control"}
    assert record["arms"]["remit"] == {"greedy": 0.4, "sampled": 0.43, "book": 0.46}
    assert record["after_rl"] == {"ntp": [0.5, 0.7, 0.9], "remit": [0.6, 0.6, 0.95]}
    assert record["seed"] == 7
    json.dumps(record)


def test_several_seeds() -> None:
    shifts = [0.0, 0.02, -0.01]
    results = [result(seed, shift) for seed, shift in enumerate(shifts, 1)]
    for r, gain in zip(results, (0.3, 0.32, 0.25), strict=True):
        r.models["remit"]["greedy"] = r.models["ntp"]["greedy"] + gain
    record = Report(results, LENGTHS, 100).record()
    assert record["arms"]["ntp"]["greedy"] == pytest.approx(0.3 + sum(shifts) / 3, abs=1e-4)
    assert [entry["seed"] for entry in record["seeds"]] == [1, 2, 3]
    _, p_value = stats.ttest_1samp([0.3, 0.32, 0.25], 0.0)
    said = " ".join(Report(results, LENGTHS, 100).sentences())
    assert f"greedy +0.290 (ahead in 3 of 3 seeds, p = {p_value:.1g})" in said


def test_what_the_check_said_of_every_seed() -> None:
    """Not of the first alone."""
    results = [result(seed) for seed in (1, 2, 3)]
    words = (
        "Expect a gain: 0.03 nats a token.",
        "Expect harm where this text is.",
        "Expect a gain: 0.05 nats a token.",
    )
    results = [replace(r, verdict=verdict) for r, verdict in zip(results, words, strict=True)]
    said = "`remit check reference` had said, before mid-training: "
    assert Report(results, LENGTHS, 100).sentences()[0] == f"{said}Expect a gain, of 2 of 3; Expect harm, of 1 of 3."
    assert Report(results[1:2], LENGTHS, 100).sentences()[0] == f"{said}{words[1]}"


def test_the_words_follow_the_figures() -> None:
    """A remit that is behind is said to be behind."""
    bad = result(7)
    bad.models["remit"] = {"greedy": 0.1, "sampled": 0.11, "book": 0.12}
    said = Report([bad], LENGTHS, 100).sentences()
    gain = next(sentence for sentence in said if sentence.startswith("Guided by the reference"))
    assert "greedy -0.200" in gain and "at temperature 1 -0.220" in gain
    # The noise of two shares of 500 problems, by hand.
    assert f"(±{1.96 * ((0.3 * 0.7 + 0.1 * 0.9) / 500) ** 0.5:.3f} by chance" in gain
    again = next(sentence for sentence in said if sentence.startswith("Reinforcement learning"))
    assert "ahead of that from the ntp base at 2 of 3 points" in again and "+0.050 at its end, after 8 steps" in again


def test_table_page_and_picture(tmp_path) -> None:
    report = Report([result(1), result(2, 0.01)], LENGTHS, 100)
    table = "\n".join(report.lines())
    for name in NAMES:
        assert re.search(rf"^  {name} ", table, re.MULTILINE)
    assert report.picture().startswith(b"\x89PNG")
    assert report.picture() == report.picture()
    part = report.part()
    assert part.blocks[0].rows[0][:2] == ["base", "0.105 ±0.007"]
    assert "2 seeds (1 to 2)" in part.summary


def test_each_arm_trains_with_its_own_objective(tmp_path) -> None:
    """The command line of every arm, read by the configuration itself."""
    from remit_megatron.run.configuration import load_config

    arms = {**ARMS, "wide": Arm({"name": "remit", "epsilon": None}, "reference-10")}
    chain = Chain(tmp_path, ToyText(seed=3), arms=arms, kept=(10, 20))
    stages = {stage.name: stage for stage in chain.stages()}
    configs = {}
    for name in arms:
        words = [str(word) for word in stages[name].steps[-1].words]  # type: ignore[union-attr]
        assert words[0] == "train"
        configs[name] = load_config(words[1], words[2:])
    named = {name: config.objective.name for name, config in configs.items()}
    assert named == {n: n for n in ("ntp", "remit", "rho1", "kd")} | {"control": "remit", "wide": "remit"}
    guides = {name: config.reference and config.reference.checkpoint for name, config in configs.items()}
    assert guides["ntp"] is None and guides["control"] == str(tmp_path / "base")
    assert all(guides[name] == str(tmp_path / "reference") for name in ("remit", "rho1", "kd"))
    assert configs["wide"].objective.epsilon is None and guides["wide"] == str(tmp_path / "reference-10")
    assert len({config.run_dir for config in configs.values()}) == len(arms)
    # What guides is there before what it guides.
    order = list(stages)
    for name in ("remit", "rho1", "kd"):
        assert order.index("reference") < order.index(name) and "reference" in stages[name].needs


def test_gather_reads_what_the_stages_write(tmp_path) -> None:
    chain, wanted = Chain(tmp_path, ToyText(seed=9), LENGTHS), result(9)
    (tmp_path / "scores").mkdir()
    for name, score in wanted.models.items():
        chain.scores(name).write_text(json.dumps(score))
    for name, curve in wanted.curves.items():
        chain.curve(name).write_text(json.dumps(curve))
    chain.check("reference").write_text(json.dumps({"verdict": wanted.verdict}))
    assert gather([chain]) == [wanted]
