"""What a training run really holds, in bytes: tensors saved for backward, weights, gradients and optimizer state."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SavedTensors:
    """Peak of the bytes that autograd keeps, each storage counted once; parameters are not counted."""

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0
        self._alive: dict[int, list[int]] = {}  # storage -> [bytes, tensors saved of it]
        self._parameters: set[int] | None = None

    @contextmanager
    def recording(self) -> Iterator[SavedTensors]:
        """Counts what is saved within, after :meth:`start`, recomputation included."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield self

    def start(self) -> None:
        """From here on saved tensors count; the parameters are in their final places. Only the first call matters."""
        if self._parameters is None:
            found = (item for item in gc.get_objects() if isinstance(item, torch.nn.Parameter))
            self._parameters = {parameter.untyped_storage().data_ptr() for parameter in found}

    def _pack(self, tensor: torch.Tensor) -> Any:
        key = tensor.untyped_storage().data_ptr()
        if self._parameters is None or key in self._parameters:
            return tensor
        entry = self._alive.setdefault(key, [tensor.untyped_storage().nbytes(), 0])
        if entry[1] == 0:
            self._now += entry[0]
            self.peak = max(self.peak, self._now)
        entry[1] += 1
        return _Held(self, key, tensor)

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        return packed.tensor if isinstance(packed, _Held) else packed

    def drop(self, key: int) -> None:
        """One tensor of a storage is no longer kept."""
        entry = self._alive[key]
        entry[1] -= 1
        if entry[1] == 0:
            self._now -= entry[0]
            del self._alive[key]


class _Held:
    """A saved tensor; tells when autograd lets go of it."""

    def __init__(self, owner: SavedTensors, key: int, tensor: torch.Tensor):
        self.tensor, self._owner, self._key = tensor, owner, key

    def __del__(self) -> None:
        self._owner.drop(self._key)


def megatron_objects() -> list[Any]:
    """Wrapped model chunks and optimizers that exist in this process."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    gc.collect()
    return [item for item in gc.get_objects() if isinstance(item, DistributedDataParallel | MegatronOptimizer)]


def state_bytes(earlier: list[Any]) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state that Megatron holds in this process, from the tensors.

    Args:
        earlier: what :func:`megatron_objects` gave before the run; it does not count.
    """
    from megatron.core.distributed import DistributedDataParallel

    known = {id(item) for item in earlier}
    objects = [item for item in megatron_objects() if id(item) not in known]
    chunks: list[Any] = [item for item in objects if isinstance(item, DistributedDataParallel)]
    inner = [getattr(item, "optimizer", None) for item in objects if item not in chunks]
    optimizers = list({id(item): item for item in inner if isinstance(item, torch.optim.Optimizer)}.values())
    weights = _storages([parameter.data for chunk in chunks for parameter in chunk.parameters()])
    gradients = _storages([buffer.grad_data for chunk in chunks for buffer in chunk.buffers])
    held: list[torch.Tensor] = []
    for optimizer in optimizers:
        held += [parameter.data for group in optimizer.param_groups for parameter in group["params"]]
        for state in optimizer.state.values():
            held += [value for name, value in state.items() if name != "step" and isinstance(value, torch.Tensor)]
    own = {key: size for key, size in _storages(held).items() if key not in weights}
    return {
        "parameters": sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(own.values()),
    }


def _storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
