"""Seconds of a step: against the design's formulas, cases done by hand, and Megatron's count of operations."""

from __future__ import annotations

import math

import pytest

import patches

patches.apply()

from megatron.training.training import num_floating_point_operations  # noqa: E402

from remit_megatron.cluster import timing  # noqa: E402
from remit_megatron.cluster.hardware import GIB, Gpu  # noqa: E402
from remit_megatron.cluster.inventory import Inventory, take_inventory  # noqa: E402
from remit_megatron.run.configuration import load_model_description  # noqa: E402
from tests.unit.cluster.planning import MODELS, PP, TP, arguments  # noqa: E402


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
