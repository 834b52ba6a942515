"""A run whose own layout these GPUs cannot take: `remit plan` says why and shows the best of those that they can."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import patches

patches.apply()

from remit_megatron import cli  # noqa: E402
from remit_megatron.cluster import command, report, run_layouts  # noqa: E402
from remit_megatron.cluster.planner import ReferencePlan  # noqa: E402
from remit_megatron.cluster.search import candidate, own_layout  # noqa: E402
from remit_megatron.models.build import megatron_arguments  # noqa: E402
from remit_megatron.run import checks  # noqa: E402
from remit_megatron.run.configuration import load_config, load_model_description  # noqa: E402
from remit_megatron.run.megatron_args import build_arguments  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.unit.cluster.planning import CP, H100, PP, TP, run_file  # noqa: E402

RUNS = Path(__file__).resolve().parents[3] / "configs" / "runs"
VIRTUAL = "num_virtual_stages_per_pipeline_rank"


def overrides_of(text: str) -> list[str]:
    """What the report says to add to the command line."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith("to take the best: ")]
    return line.partition(": ")[2].split()


@pytest.mark.parametrize(
    ("run", "nodes", "refused"),
    [
        ("olmo2_1b_remit_paper", 128, "found 512; expected a multiple of 4096"),
        ("smollm3_3b_remit_paper", 128, "found 256; expected a multiple of 1024"),
        ("youtu_2b_remit_paper", 2048, "found 8192; expected a multiple of 16384"),
        ("smollm3_3b_kd_paper", 3, "found 256; expected a multiple of 24"),
    ],
)
def test_more_gpus_than_sequences_are_shared_out_otherwise(capsys, tmp_path, run, nodes, refused):
    """The first line says why the file's own layout is not possible; the overrides of the last make the run valid."""
    path, output = str(RUNS / f"{run}.yaml"), tmp_path / "plan.json"
    assert cli.main(["plan", path, "--nodes", str(nodes), "--json", str(output)]) == 0
    text, plan = capsys.readouterr().out, json.loads(output.read_text())
    first, empty, *_ = text.splitlines()
    assert first.startswith("the configuration's own layout does not fit") and refused in first and not empty
    assert "configured    not possible on these GPUs" in text and "runner-up" in text
    assert plan["configured"] is None and refused in plan["configured_refused"] and plan["shown"] == "best"
    # What is shown is the best one, to the last figure.
    best, numbers = plan["best"], plan["numbers"]
    assert best["fits"] and plan["fitting"] > 0 and plan["simulation"] == []
    assert max(stage["total"] for stage in plan["stages"]) == best["memory"]
    assert numbers["world_size"] == 8 * nodes and numbers["micro_batch_size"] == best["layout"]["micro_batch"]
    # The run takes it, with what it had otherwise.
    config = load_config(path, overrides_of(text))
    assert config.model is not None
    architecture = megatron_arguments(load_model_description(config.model))
    args = build_arguments(config, architecture, world_size=8 * nodes, rank=0, gpu=True)
    assert vars(own_layout(args)) == best["layout"] and args.data_parallel_size * args.micro_batch_size <= 8192
    assert args.data_parallel_size < 8 * nodes == numbers["world_size"]


@pytest.mark.parametrize(
    ("nodes", "megatron", "reason"),
    [
        (1, {PP: 16}, "tensor 1 x pipeline 16 x context 1 = 16; expected a product that divides the 8"),
        (3, {TP: 3, "global_batch_size": 480}, "tensor_model_parallel_size: found 3; expected a divisor"),
        (2, {TP: 16, "sequence_parallel": True}, "found 16; expected a divisor of"),
        (2, {CP: 3}, "tensor 1 x pipeline 1 x context 3"),
        (2, {"sequence_parallel": True}, "sequence_parallel: found true with tensor_model_parallel_size 1"),
        (2, {PP: 2, "num_layers_per_virtual_pipeline_stage": 3}, "found 3; expected a divisor of the 8 layers"),
        (2, {PP: 4, VIRTUAL: 2, "micro_batch_size": 64}, "expected microbatches in whole rounds of the 4 pipeline"),
        (2, {PP: 4, "decoder_first_pipeline_num_layers": 3}, "what Megatron checks: number of layers at middle stage"),
        (2, {"micro_batch_size": 3}, "global_batch_size: found 512; expected a multiple of 48"),
        (16, {"eval_global_batch_size": 64}, "eval_global_batch_size: found 64; expected a multiple of 128"),
    ],
)
def test_whatever_is_wrong_with_a_layout_leads_to_others(tmp_path, nodes, megatron, reason):
    """And the overrides undo what was wrong, however the file says it."""
    path = run_file(tmp_path, **megatron)
    found = command.plan(load_config(path), machine=H100, nodes=nodes)
    assert reason in str(found.refusal) and found.own is None
    text = report.text(found)
    assert text.splitlines()[0].count(reason) == 1
    architecture = megatron_arguments(load_model_description("llama3_1b"))
    config = load_config(path, overrides_of(text))
    args = build_arguments(config, architecture, world_size=8 * nodes, rank=0, gpu=True)
    assert own_layout(args) == found.found.fitting[0].layout == found.shown.layout


def test_tensor_parallelism_within_a_node_only(tmp_path, capsys):
    path = run_file(tmp_path, "llama3_1b", **{TP: 8})
    assert cli.main(["plan", str(path), "--nodes", "2", "--gpus-per-node", "4"]) == 0
    assert "tensor parallelism stays within a node" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("megatron", "reason"),
    [
        ({CP: 2}, "data.document_mask: found true with context_parallel_size > 1"),
        ({PP: 2, "micro_batch_size": 2}, "micro_batch_size: found 2 with data.document_mask"),
    ],
)
def test_layouts_that_document_masks_refuse(tmp_path, megatron, reason):
    config = load_config(run_file(tmp_path, "smollm3_3b", **megatron), ["data.document_mask=true"])
    found = command.plan(config, machine=H100, nodes=2)
    assert reason in str(found.refusal)
    assert all(item.layout.context == 1 for item in found.found.fitting)
    assert all(item.layout.micro_batch == 1 for item in found.found.fitting if item.layout.pipeline > 1)


def test_the_simulation_is_of_what_is_shown(tmp_path, capsys):
    path, output = run_file(tmp_path, "olmo2_1b", **{PP: 3}), tmp_path / "plan.json"
    assert cli.main(["plan", str(path), "--nodes", "128", "--simulate", "--json", str(output)]) == 0
    plan = json.loads(output.read_text())
    assert "all shapes and bytes agree" in capsys.readouterr().out
    assert [rank["rank"] for rank in plan["simulation"]] == [0, 512, 1023]
    assert plan["simulation"][0]["built"]["parameters"] == plan["stages"][0]["state"]["parameters"]


def test_the_start_of_a_search_plays_no_part_in_it(tmp_path):
    """Twice the same run on the same GPUs, once with a layout of its own that they cannot take."""
    right = command.plan(load_config(run_file(tmp_path, "olmo2_1b")), machine=H100, nodes=2)
    other: dict[str, Any] = {CP: 3, VIRTUAL: 5}
    wrong = command.plan(load_config(run_file(tmp_path, "olmo2_1b", **other)), machine=H100, nodes=2)
    assert right.refusal is None and right.own is not None and wrong.own is None
    assert wrong.found == right.found
    assert wrong.shown == right.found.fitting[0] == candidate(right.planner, wrong.shown.layout)


def test_settings_that_demand_parallelism_are_kept(tmp_path):
    """tp_comm_overlap wants sequence parallelism: no layout without it is shown, and none is needed to start from."""
    path = run_file(tmp_path, "olmo2_1b", **{TP: 16, "sequence_parallel": True, "tp_comm_overlap": True})
    found = command.plan(load_config(path), machine=H100, nodes=1)
    assert found.refusal is not None and found.args.tp_comm_overlap
    assert all(item.layout.tensor > 1 for item in [found.shown, *report.runners_up(found.found)])


def test_values_that_are_objects_once_read(tmp_path):
    """The choice of an attention is a name in the file; what was read is not written back."""
    flags: dict[str, Any] = {"attention_backend": "auto", "micro-batch-size": 1}
    config = load_config(run_file(tmp_path, "olmo2_1b", **flags))
    del config.megatron["micro_batch_size"]
    found = command.plan(config, machine=H100, nodes=2)
    assert found.refusal is None and len(found.found.fitting) > 100


@pytest.mark.parametrize(
    ("microbatches", "group", "fine"),
    [
        (8, None, True),
        (2, None, False),
        (10, None, False),
        (12, None, True),
        (8, 6, False),
        (10, 6, True),
        (4, 6, False),
    ],
)
def test_rounds_of_virtual_stages_are_those_of_megatron(microbatches, group, fine):
    """forward_backward_pipelining_with_interleaving of Megatron 0.19.2: groups of 4 stages or more, and no rest that is
    smaller."""
    args = argparse.Namespace(
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=2,
        microbatch_group_size_per_vp_stage=group,
        global_batch_size=microbatches * 6,
        micro_batch_size=2,
        data_parallel_size=3,
    )
    if fine:
        checks.check_rounds(args)
    else:
        with pytest.raises(UserError, match=f"{microbatches} microbatches"):
            checks.check_rounds(args)


def test_a_reference_of_other_sizes_limits_the_layouts(tmp_path):
    """Twelve layers beside the student's sixteen: eight stages fit one of them only."""
    student = load_model_description("llama3_1b")
    reference = ReferencePlan(student | {"num_hidden_layers": 12}, "pipeline")
    config = load_config(run_file(tmp_path, objective="remit", **{PP: 8}))
    runs = run_layouts.RunLayouts(config, student, machine=H100, nodes=2, signal="loss", reference=reference)
    args, refusal = runs.start()
    assert "12 layers of the reference" in str(refusal)
    for stages, allowed in ((8, False), (4, True)):
        layout = replace(own_layout(runs.own()), pipeline=stages, data=16 // stages)
        assert runs.allows(layout, layout.arguments(args)) == allowed
