"""`remit plan`: what the command prints, writes and refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

import patches

patches.apply()

from remit_megatron import cli  # noqa: E402
from remit_megatron.cluster import command, search, simulate, state  # noqa: E402
from remit_megatron.cluster.report import text  # noqa: E402
from remit_megatron.run.configuration import load_config  # noqa: E402
from tests.unit.cluster.planning import H100, PP, TP, run_file  # noqa: E402


def test_command_reports(tmp_path, capsys):
    path = run_file(tmp_path, "olmo2_1b", objective="remit", **{TP: 2, "sequence_parallel": True})
    output = tmp_path / "plan.json"
    assert cli.main(["plan", str(path), "--nodes", "2", "--simulate", "--json", str(output)]) == 0
    text = capsys.readouterr().out
    for expected in ("16 H100", "2,097,152", "arithmetic, not a measurement", "live, replicated", "best", "runner-up"):
        assert expected in text
    assert "taken to be like the student" in text and "all shapes and bytes agree" in text
    plan = json.loads(output.read_text())
    seconds = plan["seconds_per_step"]
    assert seconds["cached"] < seconds["replicated"] <= seconds["live"]
    assert plan["best"]["seconds"] <= plan["configured"]["seconds"]
    assert [rank["rank"] for rank in plan["simulation"]] == [0, 8, 15] and plan["numbers"]["steps"] == 1000
    assert plan["stages"][0]["state"]["parameters"] == plan["simulation"][0]["built"]["parameters"]


@pytest.mark.parametrize(
    ("gather", "reduce", "passes"),
    [
        (True, True, "the first forward and the last backward pass"),
        (False, True, "the last backward pass"),
        (False, False, None),
    ],
)
def test_the_report_says_what_is_hidden_and_its_rows_add_up(tmp_path, gather, reduce, passes):
    flags = {"overlap_param_gather": gather, "overlap_grad_reduce": reduce, "use_distributed_optimizer": True}
    report = command.plan(load_config(run_file(tmp_path, "olmo2_1b", **flags)), machine=H100, nodes=16)
    lines, data = text(report).splitlines(), report.time.data
    name = search.CAUSES["data"]
    rows = [line for line in lines if line.strip().startswith(name + " ")]
    assert [float(row.split()[-2]) for row in rows] == [pytest.approx(data.waited, abs=6e-4)]
    hidden = [line.strip() for line in lines if line.strip().startswith(name + ":")]
    wanted = f"{name}: {data.total:.3f} s a step, of which {data.total - data.waited:.3f} s behind {passes}"
    assert hidden == ([wanted] if passes else [])
    start = lines.index(next(line for line in lines if line.split()[:2] == ["student", "s/step"]))
    table = [
        line.split() for line in lines[start + 1 : lines.index("", start)] if not line.strip().startswith(f"{name}:")
    ]
    assert sum(float(row[-2]) for row in table) == pytest.approx(report.time.student.total, abs=2e-3)


def test_the_report_says_where_stages_wait_in_turn(tmp_path):
    """Four stages wait longer together than one gathering takes, and nothing is gained."""
    flags = {"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": True, PP: 4}
    path = run_file(tmp_path, "olmo2_1b", **flags, seq_length=512)
    report = command.plan(load_config(path), machine=H100, nodes=16)
    assert report.time.data.waited > report.time.data.total
    assert "but stages wait for their weights one after another (overlap_param_gather)" in text(report)


def test_the_plan_is_for_transformer_engine_and_the_simulation_for_what_can_be_built(
    tmp_path, capsys, without_transformer_engine
):
    """Youtu on two tensor-parallel ranks: 16 layers of a stage with half of the down projections more."""
    path = run_file(tmp_path, "youtu_2b", **{TP: 2, PP: 2, "sequence_parallel": True})
    output = tmp_path / "plan.json"
    assert cli.main(["plan", str(path), "--nodes", "1", "--simulate", "--json", str(output)]) == 0
    text, plan = capsys.readouterr().out, json.loads(output.read_text())
    assert "all shapes and bytes agree" in text
    assert "local ones, on both sides: Transformer Engine's, which the memory above is for, cannot be built" in text
    first = plan["simulation"][0]
    assert first["layers"] == "local"
    more = plan["stages"][0]["state"]["parameters"] - first["built"]["parameters"]
    assert more == 16 * (1536 + 512 + 64) * 2048 // 2
    own = [str(path), "--nodes", "1", "--simulate", "megatron.transformer_impl=local", "--json", str(output)]
    assert cli.main(["plan", *own]) == 0 and "layers: local ones\n" in capsys.readouterr().out
    plan = json.loads(output.read_text())
    assert plan["stages"][0]["state"]["parameters"] == plan["simulation"][0]["built"]["parameters"]


def test_command_fails_where_the_simulation_differs(tmp_path, capsys, monkeypatch):
    def wrong(*args: Any, **kwargs: Any) -> state.StateBytes:
        right = state.state_bytes(*args, **kwargs)
        return state.StateBytes(right.parameters, right.weights, right.gradients, right.optimizer + 12)

    monkeypatch.setattr(simulate, "state_bytes", wrong)
    assert cli.main(["plan", str(run_file(tmp_path)), "--nodes", "1", "--simulate"]) == 70
    assert "optimizer: Megatron" in capsys.readouterr().out


def test_nothing_fits(tmp_path, capsys):
    assert cli.main(["plan", str(run_file(tmp_path)), "--nodes", "1", "--gpu-memory", "1"]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "none fits" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "0"], "--nodes: found 0"),
        (["--nodes", "1", "--gpu", "H1000"], "did you mean"),
        (["--nodes", "1", "--mfu", "1.5"], "--mfu: found 1.5"),
        (["--nodes", "3"], "global_batch_size"),
        (["--nodes", "3"], "expected 2 (16 GPUs), or megatron.global_batch_size 528"),
        # 16 layers and 32 heads: the factor 5 of 40 GPUs is in the batch or nowhere. 515 would do, with eight shards.
        (["--nodes", "5"], "expected 4 (32 GPUs), or megatron.global_batch_size 520"),
        (["--nodes", "16", f"megatron.{TP}=16", "--gpu-memory", "0.1"], "whose memory no possible layout fits"),
        (["--nodes", "1", f"megatron.{TP}=16", "megatron.global_batch_size=null"], "global_batch_size: found nothing"),
        # What no layout mends is said as ever.
        (["--nodes", "1", f"megatron.{TP}=0"], "tensor_model_parallel_size: found 0; expected more than 0"),
        (["--nodes", "1", f"megatron.{TP}=16", "megatron.min_lr=1"], "megatron.min_lr: found 1.0"),
        (["--nodes", "1", f"megatron.{TP}=16", "megatron.optimizer=muon"], "megatron.optimizer: found muon"),
    ],
)
def test_what_cannot_be_laid_out_is_one_line(tmp_path, capsys, options, message):
    assert cli.main(["plan", str(run_file(tmp_path)), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("name", ["transformer_impl", "transformer-impl"])
def test_the_layers_that_are_assumed_may_be_named(tmp_path, capsys, without_transformer_engine, name):
    path = str(run_file(tmp_path, "olmo2_1b"))
    assert cli.main(["plan", path, "--nodes", "1"]) == 0
    assumed = capsys.readouterr().out
    assert "Transformer Engine, which is taken to be installed there" in assumed
    assert cli.main(["plan", path, "--nodes", "1", "--simulate", f"megatron.{name}=transformer_engine"]) == 0
    assert capsys.readouterr().out.startswith(assumed)


def test_plan_needs_no_files_but_the_configuration(tmp_path):
    config = load_config(run_file(tmp_path, "smollm3_3b", objective="kd"))
    report = command.plan(config, machine=H100, nodes=1)
    assert report.planner.reference is not None and report.planner.reference.signal == "hidden"
    # The weights, and hidden states of 64 microbatches of 4,096 tokens, 2,048 wide, in bf16.
    reference, stage = report.stages[-1].reference, report.stages[-1]
    assert reference is not None
    assert reference.pipeline == stage.state.parameters * 2 + 64 * 4096 * 2048 * 2 == stage.reference_bytes


def test_whole_distributions_are_had_on_the_pipeline_only(tmp_path, capsys):
    path, output = run_file(tmp_path, "olmo2_1b", objective="kd"), tmp_path / "plan.json"
    assert cli.main(["plan", str(path), "--nodes", "1", "--json", str(output)]) == 0
    text, plan = capsys.readouterr().out, json.loads(output.read_text())
    assert "live, pipeline" in text and "replicated" not in text and "cached" not in text
    assert plan["seconds_per_step"]["replicated"] is None and plan["seconds_per_step"]["live"] > 0
    assert plan["stages"][0]["reference"]["replicated"] is plan["stages"][0]["reference"]["cached"] is None
    # A replicated reference is one on the pipeline where there are no stages; layouts with stages would be refused.
    report = command.plan(load_config(path, ["reference.placement=replicated"]), machine=H100, nodes=1)
    assert report.stages[0].placement == "pipeline"
    assert {item.layout.pipeline for item in report.found.fitting} == {1}


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("kd", ["reference.source=cache", "reference.cache_dir=x"], "reference.source: found cache; expected live"),
        ("kd", ["reference.write_cache=true", "reference.cache_dir=x"], "reference.write_cache: found true"),
        ("kd", ["reference.placement=replicated", f"megatron.{PP}=2"], "reference.placement: found replicated"),
        ("remit", ["reference.micro_batch_size=3", "megatron.micro_batch_size=2"], "reference.micro_batch_size"),
        ("rho1", ["objective.scope=global_batch", "megatron.hidden_dropout=0.1"], "megatron.hidden_dropout"),
    ],
)
def test_what_the_run_refuses_of_a_reference_is_refused(tmp_path, capsys, objective, options, message):
    path = run_file(tmp_path, "olmo2_1b", objective=objective)
    assert cli.main(["plan", str(path), "--nodes", "1", *options]) == 2
    assert message in capsys.readouterr().err


def test_plan_leaves_out_layouts_that_the_reference_does_not_fit(tmp_path):
    config = load_config(run_file(tmp_path, "olmo2_1b", objective="remit"), ["reference.micro_batch_size=2"])
    report = command.plan(config, machine=H100, nodes=1)
    assert {item.layout.micro_batch for item in report.found.fitting} == {1, 2}


def test_data_that_is_here_has_to_mark_what_is_asked_of_it(tmp_path, capsys):
    from remit_megatron.data.build import build_dataset
    from tests.tiny import make_tokenizer, write_documents

    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    source = write_documents(tmp_path / "corpus.jsonl", count=20, seed=1)
    path = run_file(tmp_path, "olmo2_1b", objective="ntp")
    for name, ended in (("with", True), ("without", False)):
        build_dataset([source], tokenizer, tmp_path / name, append_eod=ended)
        words = [f"data.train=[{tmp_path / name}]", f"data.tokenizer={tokenizer}", "data.mask_eod_loss=true"]
        code = cli.main(["plan", str(path), "--nodes", "1", *words])
        assert code == (0 if ended else 2)
    assert f"data.mask_eod_loss: found true with {tmp_path / 'without'}" in capsys.readouterr().err
