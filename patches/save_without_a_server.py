"""A synchronous save starts no process.

Target    megatron-core 0.19.2, megatron.core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy.save
Why       The writer reports through a queue that a server process holds, for the sake of asynchronous saves; in a
          synchronous one both ends are in the same thread. The server is a spawned Python that imports torch again,
          half a GB and seconds for each rank, and where its rank is killed it stays for ever.
Test      tests/unit/test_patches.py::test_a_synchronous_save_starts_no_process
Upstream  not reported
Drop when synchronous saves use a queue of their own process
"""

from __future__ import annotations

import functools
import queue

from patches import Patch


def _install() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async, torch

    original = torch.TorchDistSaveShardedStrategy.save

    @functools.wraps(original)
    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        kept = filesystem_async._results_queue
        filesystem_async._results_queue = queue.Queue()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            original(self, sharded_state_dict, checkpoint_dir)
        finally:
            filesystem_async._results_queue = kept

    torch.TorchDistSaveShardedStrategy.save = save


PATCH = Patch(
    name="save_without_a_server",
    target="megatron.core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy.save",
    package="megatron-core",
    versions=("0.19.2",),
    why="every rank starts a second Python for a queue that both ends of one thread use; it outlives a killed rank",
    test="tests/unit/test_patches.py::test_a_synchronous_save_starts_no_process",
    upstream="not reported",
    drop_when="synchronous saves use a queue of their own process",
    install=_install,
)
