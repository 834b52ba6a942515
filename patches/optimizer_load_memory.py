"""Loading the distributed optimizer's state takes the memory of what a rank owns, not of the whole model's state.

Target    megatron-core 0.19.2, megatron.core.optimizer.distrib_optimizer.DistributedOptimizer
          .sharded_param_state_fully_reshardable and .get_parameter_state_dp_zero
Why       In the format that loads on any layout every rank asks for the state of all parameters of its tensor- and
          pipeline-parallel place, 12 bytes each, and then keeps its share: on a node of eight replicas of OLMo-2-1B
          that is 142 GB of host memory, and eight times the reading.
Test      tests/distributed/test_optimizer_memory.py::test_a_rank_asks_for_what_it_owns
Upstream  not reported; the code is the same on main at d98e8a6
Drop when a rank asks for the parameters that it owns a part of

The first replica asks for all of it, as before: Megatron checks that every part of a checkpoint is asked for by the
ranks that are the first to hold it. The tensors are not filled with zeros first, so that memory which nothing is
loaded into is never touched.
"""

from __future__ import annotations

import functools
from collections import ChainMap
from typing import Any

from patches import Patch


def _install() -> None:
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    whole = DistributedOptimizer.get_parameter_state_dp_zero

    @functools.wraps(whole)
    def get_parameter_state_dp_zero(self, use_gloo_comm=True, empty_data=False, return_on_all_ranks=False):
        if not (empty_data and return_on_all_ranks):
            return whole(self, use_gloo_comm, empty_data, return_on_all_ranks)
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for index, ranges in enumerate(self.gbuf_ranges):
            (dtype,) = ranges
            numel = self.buffers[index].numel_unpadded
            keys = ("param", *self.optimizer_state_keys)
            tensors = {key: torch.empty(numel, dtype=torch.float32, device="cpu") for key in keys}
            state[index] = {dtype: {**tensors, "numel_unpadded": numel}}
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = get_parameter_state_dp_zero

    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(original)
    def sharded_param_state_fully_reshardable(self, model_sharded_state_dict, is_loading=False, metadata=None):
        state = original(self, model_sharded_state_dict, is_loading, metadata)
        if not is_loading or state is None or metadata is None or metadata["dp_cp_group"].rank() == 0:
            return state
        kept, number = {}, -1
        for index, ranges in enumerate(self.gbuf_ranges):
            for buckets in ranges.values():
                owned = ChainMap(*(bucket["param_map"] for bucket in buckets))
                for parameter in self.buffers[index].param_index_map:
                    number += 1
                    if parameter in owned:
                        kept[number] = state[number]
        return kept

    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_param_state_fully_reshardable


PATCH = Patch(
    name="optimizer_load_memory",
    target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable",
    package="megatron-core",
    versions=("0.19.2",),
    why="every rank loads the whole optimizer's state, 12 bytes a parameter, and keeps its share",
    test="tests/distributed/test_optimizer_memory.py::test_a_rank_asks_for_what_it_owns",
    upstream="not reported; the code is the same on main at d98e8a6",
    drop_when="a rank asks for the parameters that it owns a part of",
    install=_install,
    note="the first replica still asks for everything, which Megatron's check of the whole demands",
)
