"""Process groups for tools: one process, or the ranks that a launcher started, without Megatron's training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import distributed as dist

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.parallel import RankEnvironment, initialize, rank_environment


@contextmanager
def process_groups(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    alone: bool = False,
    timeout_minutes: int = 10,
) -> Iterator[ProcessGroupCollection]:
    """Megatron's process groups for the duration of the block.

    Args:
        tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size,
            context_parallel_size: the layout; the remaining factor of the world is data parallel.
        alone: one process whatever the environment says (import, export).
        timeout_minutes: how long a rank waits for the others.

    Raises:
        UserError: the layout does not divide the number of processes.
    """
    environment = RankEnvironment() if alone else rank_environment()
    needed = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if environment.world_size % needed:
        raise UserError("number of processes", environment.world_size, f"a multiple of TP x PP x CP = {needed}")
    if alone:  # on the CPU: tools that only move weights need no GPU
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    else:
        initialize(environment, timeout_minutes=timeout_minutes)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
            context_parallel_size=context_parallel_size,
        )
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
