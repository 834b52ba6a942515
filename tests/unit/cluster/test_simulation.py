"""`remit plan --simulate`: the arithmetic against the buffers that Megatron builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patches

patches.apply()

from remit_megatron.cluster import simulate  # noqa: E402
from remit_megatron.cluster.fake_world import fake_world  # noqa: E402
from remit_megatron.cluster.inventory import take_inventory  # noqa: E402
from remit_megatron.run.configuration import load_model_description  # noqa: E402
from tests.unit.cluster.planning import CP, PP, TP, arguments  # noqa: E402

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
