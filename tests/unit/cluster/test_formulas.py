"""Bytes of state and activations: against cases done by hand and against Megatron's own counts."""

from __future__ import annotations

import argparse

import pytest

import patches

patches.apply()

from remit_megatron.cluster import activations, search, state  # noqa: E402
from remit_megatron.cluster.inventory import take_inventory  # noqa: E402
from remit_megatron.cluster.planner import Planner  # noqa: E402
from remit_megatron.cluster.state import Bucket, Parameter  # noqa: E402
from remit_megatron.models.family import family_of  # noqa: E402
from remit_megatron.models.spec import TE  # noqa: E402
from remit_megatron.run.configuration import load_model_description  # noqa: E402
from remit_megatron.run.derived import count_parameters, parameters_on_rank  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.unit.cluster.planning import CP, H100, MODELS, PP, TP, arguments  # noqa: E402

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
    ("world_size", "layout", "changes", "ranks"),
    [
        (8, {}, {}, 1),
        (8, {}, {"distrib_optim_fully_reshardable_mem_efficient": False}, 8),
        (8, {TP: 2, PP: 2}, {}, 4),  # both stages on the node, two ranks of each
        (32, {TP: 2, PP: 2}, {}, 2),  # the second stage begins at rank 16, on another node
        (8, {}, {"dist_ckpt_optim_fully_reshardable": False}, 0),
        (8, {}, {"use_distributed_optimizer": False}, 0),
    ],
)
def test_host_memory_of_a_save(tmp_path, world_size, layout, changes, ranks):
    """12 bytes a parameter: 142 GB for eight ranks of OLMo-2-1B, as Megatron has it, and an eighth by default here."""
    args = arguments(tmp_path, world_size, **layout)
    for name, value in changes.items():
        setattr(args, name, value)
    assert state.save_host_bytes(args, parameters=1_484_916_736, per_node=8) == (12 * 1_484_916_736 * ranks, ranks)


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
