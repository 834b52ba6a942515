"""Every flywheel that comes with the package: read, resolved and dry-run, from another directory."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from remit_megatron import cli
from remit_megatron.flywheel.plan import Plan
from remit_megatron.flywheel.runner import Runner
from remit_megatron.flywheel.state import dry_run
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.installed import find_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FLYWHEELS = sorted(str(path.relative_to(CONFIGS.parent)) for path in CONFIGS.glob("flywheels/*.yaml"))


def test_there_are_four() -> None:
    assert {Path(path).stem for path in FLYWHEELS} >= {"paper_fig5a", "paper_fig5b", "remit_squared", "toy"}


@pytest.mark.parametrize("path", FLYWHEELS)
def test_a_shipped_flywheel(path, elsewhere) -> None:
    plan = Plan(path)
    text = dry_run(plan)
    assert len(re.findall(r"^round\d+/\S+: new, ", text, re.MULTILINE)) == len(plan.planned)
    for line in re.findall(r"^  (remit .*)$", text, re.MULTILINE):
        namespace, room, run = cli._parse(shlex.split(line)[1:])
        assert room and run
        if hasattr(namespace, "config"):
            assert find_config(namespace.config).is_file()


@pytest.mark.parametrize("name", ["paper_fig5a", "paper_fig5b", "remit_squared", "paper_fig15"])
def test_batches_of_post_training_are_the_published_ones(name, elsewhere) -> None:
    """OLMo 2's: 128 sequences, 128 pairs, 48 prompts of 16 completions, whatever the number of GPUs."""
    found: dict[str, set[int]] = {}
    for planned in Plan(f"configs/flywheels/{name}.yaml").planned.values():
        if planned.stage.kind in ("sft", "dpo", "rlvr"):
            trl = planned.content["config"]["trl"]
            ranks = planned.content["config"]["ranks"]
            batch = ranks * trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"]
            found.setdefault(planned.stage.kind, set()).add(batch)
    assert found["rlvr"] == {768} and found.get("sft", {128}) == found.get("dpo", {128}) == {128}


def test_the_figures_are_what_they_say(elsewhere) -> None:
    plain, whole, squared = (
        Plan(f"configs/flywheels/{name}.yaml") for name in ("paper_fig5a", "paper_fig5b", "remit_squared")
    )
    assert plain.planned["round1/remit/rlvr"].stage.needs == ("round1/remit/midtrain",)
    assert whole.planned["round1/remit/rlvr"].stage.needs == ("round1/remit/dpo",)
    # Both figures share their mid-training; in a common run_dir it would be done once.
    assert plain.planned["round1/kd/midtrain"].key == whole.planned["round1/kd/midtrain"].key
    assert squared.planned["round2/remit/midtrain"].stage.needs == ("round1/remit/rlvr",)
    assert squared.planned["round1/ntp/rlvr"].directory == squared.planned["round2/ntp/rlvr"].directory
    sections = {
        name: plain.planned[f"round1/{name}/midtrain"].content["config"]["objective"] for name in ("rho1", "kd")
    }
    assert sections["rho1"]["scope"] == "global_batch" and sections["kd"]["name"] == "kd"


@pytest.mark.parametrize(
    ("override", "field", "near"),
    [
        (
            "stages.midtrain.set.megatron.tensor_model_paralel_size=2",
            "megatron.tensor_model_paralel_size",
            "tensor_model",
        ),
        ("stages.midtrain.set.megatron.lr=fast", "megatron.lr", "number"),
        ("stages.midtrain.set.megatron.init_model_with_meta_device=true", "megatron.init_model_with_meta_device", ""),
        ("stages.rlvr.set.trl.max_stepz=24", "trl.max_stepz", "max_steps"),
        ("stages.rlvr.set.trl.learning_rate=fast", "trl.learning_rate", "number"),
    ],
)
def test_an_argument_of_a_late_stage_is_checked_before_the_first_starts(elsewhere, override, field, near) -> None:
    plan = Plan("configs/flywheels/toy.yaml", [override])
    for begin in (lambda: dry_run(plan), lambda: plan.check_arguments(plan.standing())):
        with pytest.raises(UserError) as error:
            begin()
        assert error.value.field.startswith("round1/") and error.value.field.endswith(f": {field}")
        assert near in error.value.expected


def test_a_flywheel_with_a_wrong_argument_starts_nothing(elsewhere, monkeypatch) -> None:
    plan = Plan("configs/flywheels/toy.yaml", ["stages.rlvr.set.trl.max_stepz=24"])
    monkeypatch.setattr(plan, "check_inputs", lambda standing: None)  # there is no quickstart here
    with pytest.raises(UserError, match="max_stepz"):
        Runner(plan, start=lambda *_: pytest.fail("nothing is started")).run()
    assert not list((plan.run_dir / "stages").glob("*"))


def test_a_stage_that_submits_a_job_of_its_own_is_not_submitted(elsewhere) -> None:
    """It ends with 75 until that job has ended, and every job that ends with 75 is put into the queue again."""
    plan = Plan("configs/flywheels/toy.yaml", ["stages.rlvr.set.engine=nemo_rl"])
    with pytest.raises(UserError, match=r"round1/ntp/rlvr: engine: found nemo_rl with --slurm"):
        plan.check_jobs(plan.standing())
    plan = Plan("configs/flywheels/toy.yaml")
    plan.check_jobs(plan.standing())


def test_only_a_stage_that_trl_runs_asks_trl(elsewhere, monkeypatch) -> None:
    """Where another engine does the work TRL need not be installed, and its arguments are not the measure."""
    from remit_megatron.posttrain import trl_arguments

    monkeypatch.setattr(trl_arguments, "config_class", lambda stage: pytest.fail("TRL is asked"))
    plan = Plan("configs/flywheels/toy.yaml", ["stages.rlvr.set.engine=nemo_rl"])
    plan.check_arguments(plan.standing())
