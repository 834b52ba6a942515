"""The search for a layout: what it tries, what it takes, how it says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import patches

patches.apply()

from remit_megatron.cluster import search, timing  # noqa: E402
from remit_megatron.cluster.hardware import GIB, Gpu, gpu_named  # noqa: E402
from remit_megatron.cluster.planner import Planner, ReferencePlan  # noqa: E402
from remit_megatron.cluster.report import settings  # noqa: E402
from remit_megatron.models.build import megatron_arguments  # noqa: E402
from remit_megatron.run.configuration import load_config, load_model_description  # noqa: E402
from remit_megatron.run.megatron_args import build_arguments  # noqa: E402
from tests.unit.cluster.planning import CP, H100, PP, TP, arguments  # noqa: E402


def planner_of(folder: Path, world_size: int, model: str = "olmo2_1b", **megatron: Any) -> Planner:
    hf_config = load_model_description(model)
    args = arguments(folder, world_size, model, **megatron)
    return Planner(hf_config, args, machine=H100, reference=ReferencePlan(hf_config, "pipeline"))


def test_layouts_divide_everything(tmp_path):
    args = planner_of(tmp_path, 16).args
    found = list(search.layouts(args, gpus_per_node=8))
    assert len(found) == len(set(found)) > 100
    for layout in found:
        assert layout.tensor * layout.pipeline * layout.context * layout.data == 16
        assert layout.tensor <= 8 and 16 % layout.tensor == 0
        assert 16 % (layout.pipeline * layout.virtual) == 0  # layers
        assert 512 % (layout.data * layout.micro_batch) == 0
        assert layout.virtual == 1 or 512 // (layout.data * layout.micro_batch) % layout.pipeline == 0


def test_search_takes_the_fastest_that_fits(tmp_path):
    planner = planner_of(tmp_path, 16)
    limit = 12 * GIB
    found = search.search(planner, limit=limit)
    assert found.fitting and found.too_large
    assert all(item.memory <= limit for item in found.fitting)
    assert all(item.memory > limit for item in found.too_large)
    best = found.fitting[0]
    assert best.seconds <= min(item.seconds for item in found.fitting) * 1.01
    assert found.too_large[0].seconds < best.seconds, "memory is what holds it back"
    # More memory never makes the best one slower.
    assert search.search(planner, limit=70 * GIB).fitting[0].seconds <= best.seconds * 1.01
    assert search.search(planner, limit=GIB).fitting == []


def test_search_drops_what_is_not_accepted(tmp_path):
    planner = planner_of(tmp_path, 16)
    everything = search.search(planner, limit=70 * GIB)
    refused = everything.fitting[0].layout
    found = search.search(planner, limit=70 * GIB, accepted=lambda layout: layout != refused)
    assert found.fitting[0] == everything.fitting[1]
    within = search.search(planner, limit=70 * GIB, allowed=lambda layout: layout.context == 1)
    assert {item.layout.context for item in within.fitting} == {1}


def best_alone(folder: Path, **megatron: Any) -> search.Search:
    """Layouts of 128 GPUs that are data parallel only, at half the bandwidth between nodes."""
    gpu = gpu_named("H100")
    machine = timing.Machine(Gpu(gpu.name, gpu.flops, gpu.memory, gpu.link, gpu.network / 2), 8, 0.4)
    args = arguments(folder, 128, "olmo2_1b", use_distributed_optimizer=True, **megatron)
    planner = Planner(load_model_description("olmo2_1b"), args, machine=machine)
    return search.search(planner, limit=70 * GIB, allowed=lambda layout: layout.data == 128)


def test_the_micro_batch_that_hides_more_is_chosen(tmp_path):
    """Two microbatches of 2 or one of 4: the same products, but the pass that hides communication is twice as long."""
    apart = best_alone(tmp_path, overlap_grad_reduce=False, overlap_param_gather=False)
    assert apart.fitting[0].layout.micro_batch == 2
    assert search.tie(apart) == (
        "of 3 within 1% of the fastest: the most tokens in a microbatch (counted up to 8,192), then the least memory"
    )
    hidden = best_alone(tmp_path, overlap_grad_reduce=True, overlap_param_gather=True)
    assert hidden.fitting[0].layout.micro_batch == 4 and search.tie(hidden) is None
    second = next(item for item in hidden.fitting if item.layout.micro_batch == 2 and item.layout.recompute == "none")
    assert second.seconds - hidden.fitting[0].seconds == pytest.approx(
        second.student.data - hidden.fitting[0].student.data
    )


def test_the_tie_rule_is_said_as_it_was_used(tmp_path):
    item = best_alone(tmp_path).fitting[0]

    def found(*others: dict[str, Any]) -> search.Search:
        return search.Search([item, *(replace(item, **other) for other in others)], [], 70 * GIB)

    assert search.tie(found()) is None and search.tie(found({"seconds": item.seconds * 1.02})) is None
    assert search.tie(found({"memory": item.memory + 1})) == "of 2 within 1% of the fastest: the least memory"
    # More than enough tokens count as enough.
    assert search.tie(found({"tokens": 16_384})) == "of 2 within 1% of the fastest: the least memory"
    assert "the most tokens" in (search.tie(found({"tokens": 4096, "seconds": item.seconds * 0.995})) or "")


@pytest.mark.parametrize(
    "layout",
    [
        search.Layout(2, 4, 2, 1, 2, 2, True, "full"),
        search.Layout(1, 2, 1, 2, 4, 1, False, "mlp"),
        search.Layout(1, 1, 1, 1, 16, 1, False, "none"),
    ],
    ids=str,
)
def test_the_printed_overrides_ask_for_the_layout(tmp_path, layout):
    """From a configuration that has everything otherwise."""
    other = {TP: 4, PP: 2, "sequence_parallel": True, "num_layers_per_virtual_pipeline_stage": 2, "micro_batch_size": 4}
    other |= {CP: 2, "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
    before = arguments(tmp_path, 16, "olmo2_1b", **other)
    config = load_config(tmp_path / "run.yaml", settings(layout, before))
    architecture = megatron_arguments(load_model_description("olmo2_1b"))
    args = build_arguments(config, architecture, world_size=16, rank=0, gpu=True)
    assert search.own_layout(args) == layout
