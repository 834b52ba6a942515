"""`remit plan`: arithmetic against cases done by hand, against Megatron's own counts, and against the real buffers."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import patches

patches.apply()

from megatron.training.training import num_floating_point_operations  # noqa: E402

from remit_megatron import cli  # noqa: E402
from remit_megatron.cluster import activations, command, search, simulate, state, timing  # noqa: E402
from remit_megatron.cluster.fake_world import fake_world  # noqa: E402
from remit_megatron.cluster.hardware import GIB, Gpu, gpu_named  # noqa: E402
from remit_megatron.cluster.inventory import Inventory, take_inventory  # noqa: E402
from remit_megatron.cluster.planner import Planner, ReferencePlan  # noqa: E402
from remit_megatron.cluster.report import settings, text  # noqa: E402
from remit_megatron.cluster.state import Bucket, Parameter  # noqa: E402
from remit_megatron.models.build import megatron_arguments  # noqa: E402
from remit_megatron.models.family import family_of  # noqa: E402
from remit_megatron.models.spec import TE  # noqa: E402
from remit_megatron.run.configuration import load_config, load_model_description  # noqa: E402
from remit_megatron.run.derived import count_parameters, parameters_on_rank  # noqa: E402
from remit_megatron.run.megatron_args import build_arguments  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
MODELS = ("llama3_1b", "olmo2_1b", "smollm3_3b", "youtu_2b")
H100 = timing.Machine(gpu_named("H100"), per_node=8, utilization=0.4)


def run_file(folder: Path, model: Any = "llama3_1b", *, objective: str = "ntp", **megatron: Any) -> Path:
    """A run configuration; its data and its reference exist nowhere."""
    config = {
        "model": model,
        "objective": {"name": objective},
        "reference": {"checkpoint": "checkpoints/nowhere"} if objective != "ntp" else None,
        "data": {"train": "data/nowhere", "tokenizer": "nowhere"},
        "megatron": {
            "seq_length": 4096,
            "micro_batch_size": 1,
            "global_batch_size": 512,
            "train_iters": 1000,
            "lr": 1e-4,
        }
        | megatron,
        "run_dir": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    return path


def arguments(folder: Path, world_size: int, model: Any = "llama3_1b", *, rank: int = 0, **megatron: Any):
    config = load_config(run_file(folder, model, **megatron))
    architecture = megatron_arguments(load_model_description(config.model))
    return build_arguments(config, architecture, world_size=world_size, rank=rank, gpu=True)


# State.


def test_buffer_by_hand():
    """Last parameter first, starts at multiples of 64, end at a multiple of lcm(4, 128)."""
    (bucket,) = state.lay_out([Parameter(10), Parameter(100), Parameter(64)], shards=4, bucket_size=None)
    assert bucket == Bucket(0, 256, ((0, 64), (64, 164), (192, 202)))
    assert [bucket.owned(shard, 4) for shard in range(4)] == [64, 64, 36, 10]


def test_buckets_by_hand():
    """200 elements fill a bucket of 150; the tied table takes one of its own."""
    parameters = [Parameter(256, shared=True), Parameter(100), Parameter(200)]
    buckets = state.lay_out(parameters, shards=2, bucket_size=150)
    assert buckets == [
        Bucket(0, 256, ((0, 200),)),
        Bucket(256, 384, ((256, 356),)),
        Bucket(384, 640, ((384, 640),)),
    ]
    assert state.lay_out([Parameter(1)], shards=3, bucket_size=None, high_busbw=True)[0].end == 3 * 65536


def test_place_of_a_rank(tmp_path):
    args = arguments(tmp_path, 64, **{TP: 2, PP: 2, CP: 4})
    assert args.data_parallel_size == 4
    assert state.place_of(args, 0) == state.Place(0, 0)
    assert state.place_of(args, 31) == state.Place(0, 15)
    # 37 = 1 + 2 * (2 + 4 * (0 + 4 * 1))
    assert state.place_of(args, 37) == state.Place(1, 2)


@pytest.mark.parametrize(
    ("setting", "value"), [("optimizer", "muon"), ("num_distributed_optimizer_instances", 2), ("use_torch_fsdp2", True)]
)
def test_settings_without_a_formula_are_refused(tmp_path, setting, value):
    args = arguments(tmp_path, 8)
    setattr(args, setting, value)
    with pytest.raises(UserError, match=setting):
        state.check_known(args)


@pytest.mark.parametrize("model", MODELS)
def test_inventory_holds_what_the_formulas_count(tmp_path, model):
    args = arguments(tmp_path, 8, model, **{TP: 2, PP: 2, "sequence_parallel": True})
    hf_config = load_model_description(model)
    unlisted = family_of(hf_config).unlisted_parameters(hf_config)
    inventory = take_inventory(hf_config, args, tensor_parallel=2)
    for stage in range(2):
        chunks = state.chunks_of_stage(inventory, args, stage)
        found = sum(parameter.elements for chunk in chunks for parameter in chunk)
        assert found == parameters_on_rank(args, stage, unlisted=unlisted)
    args.make_vocab_size_divisible_by = 1
    whole = take_inventory(hf_config, args, tensor_parallel=1)
    assert whole.all_parameters == count_parameters(args, unlisted=unlisted)


@pytest.fixture
def without_transformer_engine(monkeypatch):
    monkeypatch.setattr("remit_megatron.models.spec.transformer_engine_usable", lambda: False)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_inventory_of_layers_that_cannot_be_built_here(tmp_path, without_transformer_engine, model, tensor):
    """Transformer Engine's hold the down projections of latent attention whole: (1536 + 512 + 64) x 2048 a layer."""
    args = arguments(tmp_path, 8, model, **{TP: tensor, "sequence_parallel": True})
    hf_config = load_model_description(model)
    local = take_inventory(hf_config, args, tensor_parallel=tensor)
    args.transformer_impl = TE
    found = take_inventory(hf_config, args, tensor_parallel=tensor)
    unlisted = family_of(hf_config).unlisted_parameters(hf_config)
    assert found.all_parameters == parameters_on_rank(args, 0, unlisted=unlisted)
    held = 32 * (1536 + 512 + 64) * 2048 * (tensor - 1) // tensor if model == "youtu_2b" else 0
    assert found.all_parameters - local.all_parameters == held
    assert list(found.layer) == list(local.layer)
    if tensor == 2:
        args.make_vocab_size_divisible_by = 1
        whole = take_inventory(hf_config, args, tensor_parallel=1)
        assert whole.all_parameters == count_parameters(args, unlisted=unlisted)


# Activations.


def test_activations_of_a_layer_by_hand(tmp_path):
    """Llama 3.2 1B, 4,096 tokens, bf16; each number is one row of the table in the module."""
    layer = activations.layer_bytes(arguments(tmp_path, 8))
    assert layer.norms == 2 * (16_777_216 + 16_384)
    assert layer.norm_outputs == 2 * 16_777_216
    assert layer.attention == 2 * (4096 * (48 + 40 + 32) * 64 + 4 * 4096 * 64)
    assert layer.sums == 524_288
    assert layer.mlp == 201_326_592
    assert layer.total == 334_004_224


def test_parallelism_divides_activations(tmp_path):
    whole = activations.layer_bytes(arguments(tmp_path, 8))
    split = activations.layer_bytes(arguments(tmp_path, 8, **{TP: 4, "sequence_parallel": True}))
    tables = 2 * 4 * 4096 * 64  # the same on every rank
    assert split.total - tables == pytest.approx((whole.total - tables) / 4)
    alone = activations.layer_bytes(arguments(tmp_path, 8, **{TP: 4}))
    assert alone.norms == whole.norms and alone.mlp == whole.mlp / 4


@pytest.mark.parametrize(
    ("stages", "virtual", "stage", "microbatches", "held"),
    [
        (1, None, 0, 8, 1),
        (4, None, 0, 8, 4),
        (4, None, 3, 8, 1),
        (4, None, 0, 2, 2),
        (4, 2, 0, 8, (6 + 4 + 1) / 2),
        (4, 2, 3, 8, (4 + 1) / 2),
        (4, 2, 0, 4, 8 / 2),
    ],
)
def test_microbatches_in_flight(stages, virtual, stage, microbatches, held):
    args = argparse.Namespace(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=virtual)
    assert activations.microbatches_in_flight(args, stage, microbatches) == held


def test_recomputation_keeps_less(tmp_path):
    kept = {}
    for kind in ("none", "mlp", "full"):
        values = {name: value for name, value in search._recompute_arguments(kind).items() if value is not None}
        args = arguments(tmp_path, 8, **values)
        planner = Planner(load_model_description("llama3_1b"), args, machine=H100)
        kept[kind] = planner.memory(args, 0).activations
    assert kept["none"].layers == 16 * 334_004_224
    assert kept["mlp"].layers == 16 * (334_004_224 - 201_326_592) and kept["mlp"].recomputed == 201_326_592
    assert kept["full"].layers == 16 * 16_777_216
    assert kept["none"].logits == 4096 * (128_256 * 2 + 26)


# Time.


def free_machine() -> timing.Machine:
    """A machine whose communication costs nothing."""
    return timing.Machine(Gpu("free", 1e15, 80 * GIB, math.inf, math.inf), per_node=8, utilization=1.0)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 8), (4, 8), (4, 9), (4, 10), (8, 64)])
def test_time_is_that_of_the_design(tmp_path, stages, microbatches):
    """With B = 2 F and a reference like the student: 3, 4 and max(4 m, 3 (m + p - 1)) F."""
    args = arguments(tmp_path, stages, **{PP: stages, "global_batch_size": microbatches})
    inventory = take_inventory(load_model_description("llama3_1b"), args, tensor_parallel=1)
    layers_alone = Inventory(**{**vars(inventory), "head": {}})
    machine = free_machine()
    forward = timing.forward_time(layers_alone, args, machine)
    rounds = microbatches + stages - 1
    times = timing.step_time(
        layers_alone,
        args,
        machine,
        microbatches=microbatches,
        parameters=[1] * stages,
        reference=(layers_alone, args),
    )
    assert times.cached == pytest.approx(3 * rounds * forward.total)
    assert times.live == pytest.approx(4 * rounds * forward.total)
    assert times.replicated == pytest.approx(max(4 * microbatches, 3 * rounds) * forward.total)


@pytest.mark.parametrize("model", MODELS)
def test_operations_are_those_that_megatron_counts(tmp_path, model):
    """The mfu of metrics.jsonl and of a plan mean the same."""
    args = arguments(tmp_path, 8, model, **{TP: 2, "sequence_parallel": True})
    inventory = take_inventory(load_model_description(model), args, tensor_parallel=2)
    layer, _ = timing.layer_flops(inventory, args)
    forward = 2 * (args.num_layers * layer + timing.head_flops(inventory, args))
    assert 3 * forward == pytest.approx(num_floating_point_operations(args, 1), rel=0.01)


def test_the_stage_with_the_head_is_the_slowest(tmp_path):
    args = arguments(tmp_path, 8, **{PP: 4})
    inventory = take_inventory(load_model_description("llama3_1b"), args, tensor_parallel=1)
    forward = timing.forward_time(inventory, args, free_machine())
    layer, _ = timing.layer_flops(inventory, args)
    head = timing.head_flops(inventory, args)
    assert forward.compute == pytest.approx((4 * layer + head) / 1e15)
    assert forward.mean == pytest.approx((16 * layer + head) / 4 / 1e15)


def two_nodes() -> timing.Machine:
    """100 GB/s within a node of 8 and 10 GB/s between nodes."""
    return timing.Machine(Gpu("two", 1e15, 80 * GIB, 100e9, 10e9), per_node=8, utilization=1.0)


@pytest.mark.parametrize(
    ("flags", "forward", "backward", "expected"),
    [
        ({}, 0.4, 0.8, (0.6, 0.3, 0.6, 0.3)),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, 0.4, 0.8, (0.6, 0.3, 0.0, 0.0)),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, 0.1, 0.2, (0.6, 0.3, 0.4, 0.2)),
        ({"overlap_grad_reduce": True}, 0.1, 0.2, (0.6, 0.3, 0.4, 0.3)),
        ({"accumulate_allreduce_grads_in_fp32": False}, 0.1, 0.2, (0.3, 0.3, 0.3, 0.3)),
        # An all-reduce is one operation of twice the bytes, and backward can hide all of it.
        ({"use_distributed_optimizer": False}, 0.1, 0.2, (1.2, 0.0, 1.2, 0.0)),
        ({"use_distributed_optimizer": False, "overlap_grad_reduce": True}, 0.1, 0.5, (1.2, 0.0, 0.7, 0.0)),
    ],
    ids=["off", "whole", "part", "gradients_only", "bf16_gradients", "all_reduce", "all_reduce_hidden"],
)
def test_what_one_microbatch_hides_by_hand(tmp_path, flags, forward, backward, expected):
    """1.6e9 parameters on 16 ranks: 15/16 of 4 bytes of gradient and 2 of weight at 10 GB/s are 0.6 and 0.3 s."""
    defaults = {"overlap_grad_reduce": False, "overlap_param_gather": False, "use_distributed_optimizer": True}
    args = arguments(tmp_path, 16, "llama3_1b")
    for name, value in (defaults | flags).items():
        setattr(args, name, value)
    found = timing.data_time(args, two_nodes(), [1_600_000_000], forward=[forward], first_backward=backward)
    assert (found.reduced, found.gathered, found.reduce_wait, found.gather_wait) == pytest.approx(expected)
    assert found.total == pytest.approx(sum(expected[:2])) and found.waited == pytest.approx(sum(expected[2:]))


@pytest.mark.parametrize(
    ("virtual", "align", "backward", "waits"),
    [
        # Gathering takes 0.3 and 0.15 s, forward 0.1 s: the first microbatch is held up by 0.2 and then by 0.05 s.
        (1, True, 0.2, (0.4, 0.25)),
        (1, True, 0.9, (0.0, 0.25)),
        # All stages gather at once; the half that is reduced last starts when nothing is left to hide it.
        (2, True, 0.2, (0.4, 0.2)),
        (2, True, 0.9, (0.3, 0.2)),
        (2, False, 0.9, (0.0, 0.2)),
    ],
)
def test_what_stages_of_a_pipeline_wait_for_by_hand(tmp_path, virtual, align, backward, waits):
    more = {"num_virtual_stages_per_pipeline_rank": 2} if virtual == 2 else {}
    args = arguments(tmp_path, 32, **{PP: 2}, overlap_grad_reduce=True, overlap_param_gather=True, **more)
    args.align_grad_reduce = align
    found = timing.data_time(
        args, two_nodes(), [1_600_000_000, 800_000_000], forward=[0.1, 0.1], first_backward=backward
    )
    assert (found.reduce_wait, found.gather_wait) == pytest.approx(waits)
    assert found.total == pytest.approx(0.9)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_a_step_waits_for_what_its_own_microbatch_does_not_hide(tmp_path, recompute):
    """Backward is 2 F, and what it recomputes hides communication too; m plays no part."""
    whole = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    more = whole if recompute else {}
    args = arguments(tmp_path, 16, overlap_grad_reduce=True, overlap_param_gather=True, **more)
    inventory, machine = take_inventory(load_model_description("llama3_1b"), args, tensor_parallel=1), two_nodes()
    layer, _ = timing.layer_flops(inventory, args)
    forward = (16 * layer + timing.head_flops(inventory, args)) / 1e15
    backward = 2 * forward + (16 * layer / 1e15 if recompute else 0.0)
    found = [
        timing.step_time(inventory, args, machine, microbatches=microbatches, parameters=[1_600_000_000])
        for microbatches in (1, 32)
    ]
    for time in found:
        assert 0 < backward < 0.6 and 0 < forward < 0.3
        assert time.student.data == time.data.waited == pytest.approx(0.6 - backward + 0.3 - forward)
    assert found[1].cached - found[0].cached == pytest.approx(31 * found[0].microbatch)


# Search.


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


# Simulation.

SIMULATED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tied_virtual_1024": (
        "llama3_1b",
        1024,
        {TP: 4, PP: 4, "sequence_parallel": True, "num_virtual_stages_per_pipeline_rank": 2},
    ),
    "untied_buckets_16": (
        "olmo2_1b",
        16,
        {TP: 2, PP: 2, "sequence_parallel": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "latent_context_16": ("youtu_2b", 16, {TP: 2, CP: 2, "sequence_parallel": True, "overlap_grad_reduce": True}),
    "fp32_whole_optimizer_24": (
        "smollm3_3b",
        24,
        {PP: 3, "bf16": False, "use_distributed_optimizer": False, "global_batch_size": 480},
    ),
}


@pytest.mark.parametrize("case", SIMULATED)
def test_simulation_agrees_to_the_byte(tmp_path, case):
    model, world_size, megatron = SIMULATED[case]
    if world_size == 1024:
        megatron = megatron | {"global_batch_size": 1024}
    hf_config, args = load_model_description(model), arguments(tmp_path, world_size, model, **megatron)
    sharded = take_inventory(hf_config, args, tensor_parallel=args.tensor_model_parallel_size)
    whole = take_inventory(hf_config, args, tensor_parallel=1)
    ranks = simulate.interesting_ranks(world_size)
    assert ranks == [0, world_size // 2, world_size - 1]
    for rank in ranks:
        found = simulate.simulate_rank(
            hf_config,
            lambda number: arguments(tmp_path, world_size, model, rank=number, **megatron),
            rank,
            sharded=sharded,
            whole=whole,
        )
        assert found.agrees, simulate.describe_difference(found)
        assert found.built.optimizer > 0 and found.tensors > 10
    assert not torch.distributed.is_initialized()


def test_simulation_finds_a_wrong_plan(tmp_path):
    hf_config, args = load_model_description("llama3_1b"), arguments(tmp_path, 16)
    other = take_inventory(hf_config | {"intermediate_size": 8064}, args, tensor_parallel=1)
    found = simulate.simulate_rank(
        hf_config, lambda number: arguments(tmp_path, 16, rank=number), 15, sharded=other, whole=other
    )
    assert not found.agrees
    assert "optimizer" in simulate.describe_difference(found) and any("linear_fc1" in text for text in found.misshapen)


def test_one_process_group_at_a_time(tmp_path):
    args = arguments(tmp_path, 8)
    with fake_world(args, world_size=8, rank=3) as groups:
        assert groups.dp.size() == 8 and groups.dp.rank() == 3
        with pytest.raises(RuntimeError, match="process group"), fake_world(args, world_size=8, rank=0):
            pass
    assert not torch.distributed.is_initialized()


# The command.


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
        (["--nodes", "3", "megatron.global_batch_size=480", f"megatron.{TP}=3"], "tensor_model_parallel_size: found 3"),
        (["--nodes", "1", f"megatron.{PP}=16"], "tensor 1 x pipeline 16"),
        (["--nodes", "2", "--gpus-per-node", "4", f"megatron.{TP}=8"], "tensor parallelism stays within a node"),
        (["--nodes", "3"], "global_batch_size"),
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
