"""What a rank asks of a checkpoint to go on: the optimizer's state that it owns, not the whole model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.distributed.training.test_training import configuration, material  # noqa: F401 - a fixture

RANKS = 4


def train_and_measure(path: str, overrides: list[str]) -> dict[str, Any]:
    """One rank of ``remit train``; bytes of optimizer state that it asked for, and elements that it owns."""
    import patches

    patches.apply()
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train

    found: dict[str, Any] = {"asked": 0, "padded": 0, "saved_by": 0}
    described = DistributedOptimizer.sharded_param_state_fully_reshardable

    def measured(self: Any, model: Any, is_loading: bool = False, metadata: Any = None) -> Any:
        state = described(self, model, is_loading, metadata)
        kinds = (ShardedTensor, ShardedTensorFactory)
        total = sum(part.data.nbytes for part in nested_values(state or {}) if isinstance(part, kinds))
        found["asked" if is_loading else "saved_by"] = total
        found["padded"] = 12 * sum(buffer.numel_unpadded for buffer in self.buffers)
        return state

    DistributedOptimizer.sharded_param_state_fully_reshardable = measured
    try:
        found["code"] = train(load_config(path, overrides))
    finally:
        DistributedOptimizer.sharded_param_state_fully_reshardable = described
    return found


def test_a_rank_asks_for_what_it_owns(pool, material):  # noqa: F811
    run_dir = material["root"] / "optimizer_memory"
    settings = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    config = configuration(material, run_dir, {"name": "ntp"}, **settings)
    run_dir.mkdir()
    path = run_dir / "input.yaml"
    path.write_text(json.dumps(config))
    first = pool.run(train_and_measure, world_size=RANKS, path=str(path), overrides=["megatron.exit_interval=1"])
    assert [rank["code"] for rank in first] == [75] * RANKS
    # One rank of the replica group holds the state that is saved, the others nothing.
    whole = first[0]["saved_by"]
    assert [rank["saved_by"] for rank in first] == [whole, 0, 0, 0]
    assert 0.99 * first[0]["padded"] < whole <= first[0]["padded"], "12 bytes a parameter"
    second = pool.run(train_and_measure, world_size=RANKS, path=str(path), overrides=[])
    assert [rank["code"] for rank in second] == [0] * RANKS
    assert second[0]["asked"] == whole, "the first replica, for Megatron's check"
    # A quarter, and the parameters of which a rank owns a part only.
    assert all(0 < rank["asked"] < 0.7 * whole for rank in second[1:]), [rank["asked"] / whole for rank in second]
    assert len((Path(run_dir) / "metrics.jsonl").read_text().splitlines()) > 1
