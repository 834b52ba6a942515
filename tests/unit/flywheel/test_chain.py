"""Rounds, objectives and references: what there is, what needs what, and what is refused in one line."""

from __future__ import annotations

import pytest

from remit_megatron.flywheel.chain import WITHOUT_REFERENCE, Chain, build_chain
from remit_megatron.flywheel.configuration import load_flywheel
from remit_megatron.runtime.errors import UserError

TURN = {
    "midtrain": {"kind": "train", "config": "run.yaml", "model": "base", "reference": "${stage:previous/remit/rlvr}"},
    "sft": {"kind": "sft", "config": "sft.yaml", "model": "${stage:midtrain}"},
    "rlvr": {"kind": "rlvr", "config": "rlvr.yaml", "model": "${stage:sft}"},
    "compare": {"kind": "evaluate", "suite": "easy", "models": {"a": "${stage:ntp/rlvr}", "b": "${stage:remit/rlvr}"}},
}
SQUARED = {"rounds": 2, "objectives": ["ntp", "remit"], "round0": {"remit/rlvr": "RL"}}


def chain(flywheel, stages, **more) -> Chain:
    return build_chain(load_flywheel(flywheel(stages, **more)))


def test_rounds_and_objectives(flywheel) -> None:
    found = chain(flywheel, TURN, **SQUARED)
    assert list(found.stages) == [
        f"round{number}/{name}"
        for number in (1, 2)
        for name in ("ntp/midtrain", "remit/midtrain", "ntp/sft", "remit/sft", "ntp/rlvr", "remit/rlvr", "compare")
    ]
    assert found.stages["round2/remit/midtrain"].needs == ("round1/remit/rlvr",)
    assert found.stages["round1/remit/midtrain"].needs == ()
    assert found.stages["round2/compare"].needs == ("round2/ntp/rlvr", "round2/remit/rlvr")
    # ntp has no use for a reference, and does not wait for one.
    assert found.stages["round2/ntp/midtrain"].needs == ()
    assert found.after("round1/remit/rlvr") == [
        *("round1/compare", "round2/remit/midtrain", "round2/remit/sft", "round2/remit/rlvr", "round2/compare")
    ]


def test_the_objectives_without_a_reference_are_the_registry_s() -> None:
    from remit_megatron.objectives import REGISTRY, build_objective

    found = {name for name in REGISTRY if build_objective(name).reference_signal == "none"}
    assert set(WITHOUT_REFERENCE) == found


def test_an_objective_with_settings_and_a_reference_of_its_own(flywheel) -> None:
    more = {
        "rounds": 2,
        "round0": {"remit/rlvr": "RL", "remit/rlvr@step-40": "weak RL"},
        "objectives": {
            "remit": None,
            "weak": {"name": "remit", "epsilon": 0.5, "reference": "${stage:previous/remit/rlvr@step-40}"},
        },
    }
    stages = {name: TURN[name] for name in ("midtrain", "sft", "rlvr")}
    found = chain(flywheel, stages, **more)
    weak = found.stages["round2/weak/midtrain"]
    assert weak.settings["objective"] == {"name": "remit", "epsilon": 0.5}
    assert weak.settings["reference"].endswith("@step-40}") and weak.needs == ("round1/remit/rlvr",)


def test_a_stage_of_some_rounds_and_one_that_only_waits(flywheel) -> None:
    stages = {
        "data": {"kind": "command", "words": ["x"], "rounds": [1]},
        "train": {"kind": "train", "config": "c", "set": {"data.train": ["${stage:round1/data}/a"]}},
        "look": {"kind": "command", "words": ["y"], "after": ["train"]},
    }
    found = chain(flywheel, stages, rounds=2, objectives=["ntp", "remit"])
    assert found.stages["round2/ntp/train"].needs == ("round1/data",)
    assert found.stages["round2/look"].needs == ()
    assert found.stages["round2/look"].waits == ("round2/ntp/train", "round2/remit/train")


def test_find_takes_the_end_of_an_id(flywheel) -> None:
    found = chain(flywheel, TURN, **SQUARED)
    assert found.find("round1/compare").id == "round1/compare"
    with pytest.raises(UserError, match=r"STAGE: found compare; expected one of round1/compare, round2/compare"):
        found.find("compare")
    assert chain(flywheel, {"a": {"kind": "command", "words": ["x"]}}).find("a").id == "round1/a"
    with pytest.raises(UserError, match=r"did you mean round1/compare\?"):
        found.find("round1/compar")


COMMAND = {"kind": "command", "words": ["x"]}
SCORE = {"kind": "score", "config": "c"}


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ({"a": {"kind": "trian"}}, {}, r"stages\.a\.kind: found 'trian'.*did you mean train\?"),
        ({"a": {**COMMAND, "wrods": 1}}, {}, r"stages\.a\.wrods: found 1.*did you mean words\?"),
        ({"a": {"kind": "train"}}, {}, r"stages\.a\.config: found nothing"),
        ({"a": {**COMMAND, "nproc": 0}}, {}, r"stages\.a\.nproc: found 0; expected 1 or more"),
        ({"a": {**COMMAND, "nproc": True}}, {}, r"stages\.a\.nproc: found True; expected a number"),
        ({"a": {**COMMAND, "rounds": [2]}}, {}, r"stages\.a\.rounds: found 2; expected numbers from 1 to 1"),
        ({"a": {**COMMAND, "output": "../x"}}, {}, r"stages\.a\.output: found '\.\./x'"),
        ({"a": {**COMMAND, "slurm": {"dependency": "x"}}}, {}, r"stages\.a\.slurm\.dependency"),
        ({"round1": COMMAND}, {}, r"stages\.round1: found 'round1'"),
        ({"a": COMMAND}, {"round": 2}, r"round: found 2; expected one of run_dir.*did you mean round"),
        ({"a": COMMAND}, {"rounds": 0}, r"rounds: found 0; expected 1 or more"),
        ({"a": COMMAND}, {"code": "x"}, r"code: found 'x'; expected version or source"),
        ({"a": COMMAND}, {"objectives": {"a": {}}}, r"objectives\.a: found the name of a stage"),
        ({"a": {"kind": "evaluate", "suite": "easy"}}, {}, r"stages\.a\.model: found nothing; expected one of model"),
        ({"a": {"kind": "export", "model": "${stage:b}"}}, {}, r"stages\.a\.model: found \$\{stage:b\}; expected one"),
        (
            {"sft": COMMAND, "a": {"kind": "command", "words": ["${stage:sfd}"]}},
            {},
            r"stages\.a\.words\[0\]: found \$\{stage:sfd\}; expected one of the stages sft, a; did you mean sft\?",
        ),
        (
            {"a": {"kind": "command", "words": ["${stage:b c}"]}},
            {},
            r"found \$\{stage:b c\}; expected \$\{stage:NAME\}",
        ),
        (
            {"s": SCORE, "a": {"kind": "train", "config": "c", "reference": "${stage:s}"}},
            {},
            r"stages\.a\.reference: found \$\{stage:s\}, a score stage, which gives a scores; expected a model",
        ),
        (
            {"s": SCORE, "a": {"kind": "train", "config": "c", "scores": "${stage:a}"}},
            {},
            r"stages\.a\.scores: found \$\{stage:a\}, a train stage",
        ),
        (
            {"e": {"kind": "export", "model": "x"}, "a": {"kind": "export", "model": "${stage:e@step-4}"}},
            {},
            r"stages\.a\.model: found \$\{stage:e@step-4\}, a export stage; expected a step of",
        ),
        (
            {"s": COMMAND, "a": {"kind": "export", "model": "x/${stage:s}"}},
            {},
            r"stages\.a\.model: found x/\$\{stage:s\}; expected a path, or",
        ),
        (
            {"a": {"kind": "command", "words": ["${stage:previous/a}"]}},
            {},
            r"found \$\{stage:previous/a\} in round 1; expected a path for a in round0",
        ),
        (
            {"a": {"kind": "command", "words": ["${stage:rmit/a}"]}},
            {"objectives": ["remit"]},
            r"found \$\{stage:rmit/a\}; expected one of the objectives remit; did you mean remit\?",
        ),
        (
            {"a": COMMAND, "b": {"kind": "command", "words": ["${stage:remit/a}"]}},
            {"objectives": ["remit"]},
            r"found \$\{stage:remit/a\}; expected \$\{stage:a\}: it is one for all objectives",
        ),
        (
            {
                "a": {"kind": "command", "words": ["${stage:b}"]},
                "b": {"kind": "command", "words": ["x"], "after": ["c"]},
                "c": {"kind": "command", "words": ["${stage:a}"]},
            },
            {},
            r"stages\.a: found round1/a needs round1/b needs round1/c needs round1/a; expected",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flywheel, stages, more, message) -> None:
    with pytest.raises(UserError, match=message):
        chain(flywheel, stages, **more)


def test_a_run_dir_is_needed(elsewhere) -> None:
    (elsewhere / "f.yaml").write_text("stages: {a: {kind: command, words: [x]}}")
    with pytest.raises(UserError, match="run_dir: found nothing"):
        load_flywheel("f.yaml")
