"""What makes another key and what does not: settings, paths and contents, layouts, the code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from remit_megatron.flywheel import keys
from remit_megatron.flywheel.plan import Plan
from remit_megatron.flywheel.runner import Runner
from remit_megatron.posttrain.results import FREE
from remit_megatron.runtime.errors import UserError

RUN = {
    "model": {"base": "tiny_llama", "vocab_size": 64},
    "objective": {"name": "remit"},
    "reference": {"checkpoint": "rl"},
    "data": {"train": [[1.0, "corpus"]], "tokenizer": "tokenizer"},
    "megatron": {"seq_length": 64, "global_batch_size": 4, "train_iters": 6, "lr": 1e-3, "save_interval": 2},
    "run_dir": "ignored",
}
POSTTRAIN = {
    "model": "base",
    "run_dir": "ignored",
    "data": {"train": ["lines.jsonl"]},
    "verifier": "number_at_end",
    "keep": {"every": 10},
    "trl": {"max_steps": 40, "learning_rate": 1e-3},
}


@pytest.fixture
def files(elsewhere) -> Path:
    """Models, data and configurations, as small as their digests need."""
    for name in ("base", "rl"):
        (elsewhere / name).mkdir()
        (elsewhere / name / "config.json").write_text(json.dumps({"model_type": "llama", "name": name}))
        (elsewhere / name / "model.safetensors").write_bytes(name.encode())
    (elsewhere / "corpus.json").write_text(json.dumps({"bin": {"sha256": "1"}, "idx": {"sha256": "2"}}))
    (elsewhere / "tokenizer").mkdir()
    (elsewhere / "tokenizer" / "tokenizer.json").write_text("{}")
    (elsewhere / "lines.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (elsewhere / "run.yaml").write_text(json.dumps(RUN))
    (elsewhere / "rlvr.yaml").write_text(json.dumps(POSTTRAIN))
    return elsewhere


def key(flywheel, stage: dict, **more) -> str:
    (planned,) = Plan(flywheel({"a": stage}, **more)).planned.values()
    return planned.key


def train(**settings) -> dict:
    return {"kind": "train", "config": "run.yaml", "model": "base", "set": settings}


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"logging.interval": 7}, True),
        ({"checkpoint.keep": None}, True),
        ({"data.num_workers": 0, "data.cache_dir": "x"}, True),
        ({"reference.placement": "auto", "reference.on_missing": "refuse"}, True),
        ({"megatron.tensor_model_parallel_size": 2, "megatron.micro_batch_size": 2}, True),
        ({"megatron.save_interval": 1, "megatron.log_throughput": True, "megatron.eval_interval": 9}, True),
        ({"megatron": {"overlap_grad_reduce": True}}, True),
        ({"megatron.lr": 2e-3}, False),
        ({"megatron.train_iters": 7}, False),
        ({"megatron.global_batch_size": 8}, False),
        ({"megatron.use_distributed_optimizer": True}, False),
        ({"objective.epsilon": 0.3}, False),
        ({"seed": 5}, False),
        ({"data.document_mask": True}, False),
        ({"data.packing_seed": 1}, False),
        ({"model.vocab_size": 65}, False),
        ({"data.train": [[2.0, "corpus"]]}, False),
        ({"evaluation": {"suite": "easy", "data": "tokenizer"}}, False),
    ],
    ids=str,
)
def test_settings_of_a_run(files, flywheel, settings, same) -> None:
    assert (key(flywheel, train(**settings)) == key(flywheel, train())) is same


@pytest.mark.parametrize(("action", "same"), [("skip", True), ("rollback", False)])
def test_a_run_that_goes_back_depends_on_where_it_saved(files, flywheel, action, same) -> None:
    one, other = (key(flywheel, train(**{"spikes.action": action, "megatron.save_interval": n})) for n in (2, 3))
    assert (one == other) is same


def test_contents_count_and_places_do_not(files, flywheel) -> None:
    before = key(flywheel, train())
    shutil.copytree("base", "moved")
    assert key(flywheel, {**train(), "model": "moved"}) == before
    (files / "base" / "README.md").write_text("not part of the model")
    assert key(flywheel, train()) == before
    (files / "base" / "model.safetensors").write_bytes(b"BASE")
    assert key(flywheel, train()) != before
    (files / "base" / "model.safetensors").write_bytes(b"base")
    assert key(flywheel, train()) == before
    (files / "corpus.json").write_text(json.dumps({"bin": {"sha256": "3"}, "idx": {"sha256": "2"}}))
    assert key(flywheel, train()) != before


def test_what_is_not_there_is_said_before_anything_runs(files, flywheel) -> None:
    shutil.rmtree("base")
    plan = Plan(flywheel({"a": train()}))
    assert plan.planned["round1/a"].absent == ["config.init base"]
    with pytest.raises(
        UserError, match=r"round1/a: config\.init: found nothing at base; expected what the stage reads"
    ):
        Runner(plan).run()


def test_ranks_count_where_they_make_the_batch(files, flywheel) -> None:
    assert key(flywheel, train()) == key(flywheel, {**train(), "nproc": 2})
    content = {**RUN, "megatron": {k: v for k, v in RUN["megatron"].items() if k != "global_batch_size"}}
    (files / "run.yaml").write_text(json.dumps(content))
    assert key(flywheel, train()) != key(flywheel, {**train(), "nproc": 2})
    rlvr = {"kind": "rlvr", "config": "rlvr.yaml"}
    assert key(flywheel, rlvr) != key(flywheel, {**rlvr, "nproc": 2})


def test_settings_of_post_training(files, flywheel) -> None:
    stage = {"kind": "rlvr", "config": "rlvr.yaml"}
    before = key(flywheel, stage)
    for name in FREE:  # what a stopped run may go on with
        assert key(flywheel, {**stage, "set": {f"trl.{name}": 3}}) == before, name
    assert key(flywheel, {**stage, "set": {"trl": {"learning_rate": 2e-3}}}) != before
    assert key(flywheel, {**stage, "model": "rl"}) != before
    (files / "lines.jsonl").write_text('{"prompt": "1+1=", "answer": "3"}\n')
    assert key(flywheel, stage) != before


def test_a_verifier_of_the_user_s_own_counts_by_its_content(files, flywheel) -> None:
    (files / "mine.py").write_text("def reward(completion, answer): return 1.0\n")
    stage = {"kind": "rlvr", "config": "rlvr.yaml", "set": {"verifier": "mine.py:reward"}}
    before = key(flywheel, stage)
    (files / "mine.py").write_text("def reward(completion, answer): return 0.0\n")
    assert key(flywheel, stage) != before


@pytest.mark.parametrize("where", ["line", "module", "module of a line"])
def test_a_verifier_counts_by_its_content_wherever_it_is_named(files, flywheel, where, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(files))
    name = "mine_of_lines.py:reward" if where == "line" else "mine_of_lines:reward"
    (files / "mine_of_lines.py").write_text("def reward(completion, answer): return 1.0\n")
    stage: dict = {"kind": "rlvr", "config": "rlvr.yaml"}
    if where == "module":
        stage["set"] = {"verifier": name}
    else:
        lines = ({"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3", "verifier": name})
        (files / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = key(flywheel, stage)
    assert key(flywheel, stage) == before
    (files / "mine_of_lines.py").write_text("def reward(completion, answer): return 0.0\n")
    assert key(flywheel, stage) != before


def test_files_that_an_engine_s_command_names_count_by_their_content(files, flywheel) -> None:
    (files / "train.sh").write_text("cp -r $1 $2\n")
    command = {"run": "bash train.sh {model_in} {model_out}"}
    stage = {"kind": "rlvr", "config": "rlvr.yaml", "set": {"engine": "command", "command": command}}
    (files / "rlvr.yaml").write_text(json.dumps({k: v for k, v in POSTTRAIN.items() if k not in ("trl", "keep")}))
    before = key(flywheel, stage)
    (files / "train.sh").write_text("cp -r $1/. $2\n")
    assert key(flywheel, stage) != before


def test_token_files_are_read_where_contents_are_asked_for(files, flywheel, monkeypatch) -> None:
    """Their digests in the key are those of their manifest, which is not read against the files at every start."""
    asked = []
    monkeypatch.setattr(
        "remit_megatron.flywheel.runner.read_manifest", lambda prefix, verify: asked.append((prefix, verify))
    )
    plan = Plan(flywheel({"a": train(), "b": {**train(seed=2), "model": "${stage:a}"}}))
    Runner(plan).check_results()
    assert asked == []
    Runner(plan, verify=True).check_results()
    assert asked == [("corpus", True)]


def test_the_seed_and_the_code(files, flywheel, monkeypatch) -> None:
    before = key(flywheel, train())
    assert key(flywheel, train(), seed=1234) == before  # the default of a run
    assert key(flywheel, train(), seed=7) != before
    assert key(flywheel, train(seed=1234), seed=7) == before
    assert key(flywheel, train(), code="source") != before
    monkeypatch.setattr(keys, "__version__", "0.0.0")
    assert key(flywheel, train()) != before


def test_what_an_objective_has_no_use_for_is_no_part_of_its_key(files, flywheel) -> None:
    stages = {
        "midtrain": {**train(**{"reference.max_dropped": 0.5}), "reference": "${stage:previous/remit/rlvr}"},
        "rlvr": {"kind": "rlvr", "config": "rlvr.yaml", "model": "${stage:midtrain}"},
    }
    path = flywheel(stages, rounds=2, objectives=["ntp", "remit"], round0={"remit/rlvr": "rl"})
    planned = Plan(path).planned
    assert planned["round1/ntp/rlvr"].key == planned["round2/ntp/rlvr"].key
    assert planned["round1/remit/midtrain"].key != planned["round2/remit/midtrain"].key
    words = Plan(path).command(planned["round2/remit/midtrain"]).words
    place = planned["round1/remit/rlvr"].directory / "run" / "model"
    assert f'reference.checkpoint="{place}"' in words and 'objective.name="remit"' in words
    assert "reference=null" in Plan(path).command(planned["round1/ntp/midtrain"]).words


@pytest.mark.parametrize(
    ("producer", "message"),
    [
        ({"kind": "rlvr", "config": "rlvr.yaml", "set": {"keep.every": 15}}, r"keep\.every 15; expected keep\.every"),
        ({"kind": "rlvr", "config": "rlvr.yaml", "set": {"keep": None}}, r"keep\.every nothing"),
        (train(**{"megatron.save_interval": 7, "checkpoint.keep": None}), r"megatron\.save_interval 7; expected"),
        (train(), r"checkpoint\.keep 2; expected checkpoint\.keep null"),
        (
            {"kind": "rlvr", "config": "rlvr.yaml", "set": {"trl.max_steps": 12}},
            r"trl\.max_steps 12; expected trl\.max_steps of 20 or more",
        ),
        (train(**{"checkpoint.keep": None}), r"megatron\.train_iters 6; expected megatron\.train_iters of 20 or more"),
    ],
)
def test_a_step_that_would_not_be_kept(files, flywheel, producer, message) -> None:
    consumer = {**train(), "reference": "${stage:a@step-20}"}
    with pytest.raises(
        UserError, match=rf"stages\.b\.reference: found \$\{{stage:a@step-20\}}, of a stage with {message}"
    ):
        Plan(flywheel({"a": producer, "b": consumer}))
    kept = {"kind": "rlvr", "config": "rlvr.yaml"}
    plan = Plan(flywheel({"a": kept, "b": consumer}))
    place = plan.planned["round1/a"].directory / "run" / "models" / "step-20"
    assert f'reference.checkpoint="{place}"' in plan.command(plan.planned["round1/b"]).words


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (train(**{"run_dir": "x"}), r"stages\.a\.set\.run_dir: found 'x'; expected nothing"),
        (train(**{"init": "x"}), r"stages\.a\.set\.init: found 'x'; expected the key `model`"),
        (train(reference={"checkpoint": "x"}), r"stages\.a\.set\.reference\.checkpoint: .* the key `reference`"),
        (train(**{"megatron.lrr": 1}), None),  # arguments of Megatron are the run's to check
        (train(**{"objektive.name": "x"}), r"round1/a: objektive: found .*did you mean objective\?"),
        ({"kind": "rlvr", "config": "rlvr.yaml", "set": {"model": "x"}}, r"stages\.a\.set\.model"),
        ({"kind": "rlvr", "config": "no.yaml"}, r"round1/a: no\.yaml: found no such file"),
        ({"kind": "evaluate", "model": "base", "suite": "x/y.yaml"}, r"round1/a: --suite: found x/y\.yaml"),
        ({"kind": "command", "words": ["x", "{seed}"]}, r"stages\.a\.words: found \{seed\} without a seed"),
    ],
    ids=str,
)
def test_a_mistake_in_a_late_stage_is_found_before_the_first_runs(files, flywheel, stage, message) -> None:
    if message is None:
        assert key(flywheel, stage)
        return
    with pytest.raises(UserError, match=message):
        key(flywheel, stage)
