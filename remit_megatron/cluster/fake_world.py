"""One rank of a world that does not exist, and tensors that take no memory.

torch's fake process group answers for any number of ranks without a second process; its collectives move nothing. With
all tensors on ``meta``, a rank of a thousand can build its share of a model and of the optimizer on a laptop.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors


class MetaTensors(TorchFunctionMode):
    """Every tensor that is made within is made on ``meta``, whatever device its maker asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None or func in _device_constructors():
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class CudaTypeNames(TorchFunctionMode):
    """``Tensor.type()`` of a tensor on ``meta`` is the name that it would have on a GPU.

    Megatron's distributed optimizer sorts parameters by that name.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, str) and ".meta." in result:
            from patches import cpu_device

            # Where there is no GPU, Tensor.type is patched to put "cuda" in front of what it gets.
            prefix = "torch." if cpu_device.PATCH.in_force() else "torch.cuda."
            return prefix + result.rsplit(".", 1)[1]
        return result


@contextlib.contextmanager
def fake_world(args: argparse.Namespace, *, world_size: int, rank: int) -> Iterator[ProcessGroupCollection]:
    """Megatron's process groups as rank ``rank`` of ``world_size`` would have them; taken down on leaving.

    Args:
        args: a validated Megatron namespace; its parallel sizes are used.
        world_size: ranks of the world, a multiple of the product of the parallel sizes.
        rank: which of them to be.

    Raises:
        RuntimeError: this process has a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("fake_world: found a process group in this process; expected none")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    log = logging.getLogger("megatron")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells every bucket, and every time that GPTModel has a successor
    excepthook = sys.excepthook  # init_process_group puts the rank in front of every line of a traceback, for good
    dist.init_process_group(backend="fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(**_sizes(args), create_gloo_process_groups=False)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = excepthook
        log.setLevel(level)


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    """What ``megatron.training.initialize`` passes on, as far as it decides who is in which group."""
    names = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "num_distributed_optimizer_instances",
    )
    order = "tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"
    return {name: getattr(args, name) for name in names} | {"order": order}
