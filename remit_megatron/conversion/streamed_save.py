"""A Megatron checkpoint (torch_dist) of a model that is never in memory.

Megatron's own writer takes a model that holds its weights and collects all of them before the first is written. Here
the model is on ``meta``; plan, metadata and bytes (but for checksums that nothing reads) are those that Megatron would
write of the same model in one process, but each weight is asked for when its turn in the file comes, and forgotten when
it is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    FileSystemWriter,
    SerializationFormat,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from remit_megatron.conversion.loading import sharded_weights
from remit_megatron.conversion.read_ahead import one_ahead
from remit_megatron.runtime.files import FollowingDigest

# How the state dict is arranged; recorded in the checkpoint for those who read it.
_CONTENT = {"singleton_local_shards": False}


def save_streamed(model: GPTModel, read: Callable[[str], Tensor], directory: str | os.PathLike) -> dict[str, str]:
    """Writes the checkpoint of iteration 0, in one process.

    Args:
        model: an unsharded model; only shapes and dtypes of its parameters are used.
        read: name of a parameter in ``model`` to its value, of the same shape and dtype, contiguous. Called once for
            each parameter, in the order of the file, in a thread that is one value ahead of the writing.
        directory: exists and is empty.

    Returns:
        Name in ``directory`` to SHA-256 of the file with the weights.
    """
    sharded = sharded_weights(model)
    strategy = _StreamedSave(_pieces(model, sharded), read)
    state = {"model": sharded, "checkpoint_version": 3.0, "iteration": 0}
    try:
        with _no_crc32():
            dist_checkpointing.save(state, str(directory), strategy, content_metadata=dict(_CONTENT))
    except CheckpointException as failed:  # a BaseException around what happened on each rank, and there is one
        ((error, _),) = failed.failures.values()
        raise error from None
    return strategy.digests


@contextmanager
def _no_crc32() -> Iterator[None]:
    """The manifest has digests of the files; the CRC-32 that torch adds for each tensor, which nothing reads, takes as
    long as all other writing."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


@dataclass(frozen=True)
class _Piece:
    """A stored piece of a parameter, as a view of the whole: most are all of it, gate and up projection are halves."""

    parameter: str
    size: torch.Size
    stride: tuple[int, ...]
    start: int

    def of(self, value: Tensor) -> Tensor:
        view = value.as_strided(self.size, self.stride, self.start)
        if view.numel() == value.numel():
            return view
        # What is saved of a tensor is all of its storage: this one's is the piece alone, in the same memory.
        piece = view.contiguous().view(-1).view(torch.uint8).numpy()
        return torch.from_numpy(piece).view(view.dtype).view(self.size)


# Key in the checkpoint and offset there.
_Pieces = dict[tuple[str, tuple[int, ...]], _Piece]


def _pieces(model: GPTModel, sharded: dict[str, Any]) -> _Pieces:
    found: _Pieces = {}
    for name, parameter in model.named_parameters():
        entry = sharded[name]
        parts: Any = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            assert isinstance(part, ShardedTensor) and part.data is not None, name
            assert part.data.untyped_storage().nbytes() == parameter.nbytes, f"{name}: not a view of the parameter"
            view = _Piece(name, part.data.size(), part.data.stride(), int(part.data.storage_offset()))
            found[part.key, tuple(part.global_offset)] = view
    return found


class _StreamedSave(TorchDistSaveShardedStrategy):
    """Megatron's strategy with another writer."""

    def __init__(self, pieces: _Pieces, read: Callable[[str], Tensor]):
        super().__init__()
        self._parts, self._read = pieces, read
        self.digests: dict[str, str] = {}

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=_OneByOne(Path(checkpoint_dir), self.digests),
            planner=_Planner(self._parts, self._read),
        )


class _Planner(MCoreSavePlanner):
    """Megatron's plan; tensors are read when they are resolved."""

    def __init__(self, pieces: _Pieces, read: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts, self._read = pieces, read
        self._values: Iterator[tuple[str, Tensor]] = iter(())
        self._held: tuple[str, Tensor] | None = None

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        planned = {_place(item) for item in plan.items if item.type != WriteItemType.BYTE_IO}
        assert planned == self._parts.keys(), "the plan has other tensors than the model has parameters"
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        # As Megatron's own writer does.
        metadata.all_local_plans = all_plans  # pyright: ignore[reportAttributeAccessIssue]
        return plans, metadata

    def read_ahead(self, items: Iterable[WriteItem]) -> None:
        """``items`` are what will be resolved, in this order."""
        names = (self._parts[_place(item)].parameter for item in items if item.type != WriteItemType.BYTE_IO)
        self._values = one_ahead((name, self._read(name)) for name, _ in groupby(names))

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        piece = self._parts[_place(write_item)]
        if self._held is None or self._held[0] != piece.parameter:
            self._held = None  # or it would stay while the next one is waited for
            self._held = next(self._values)
        name, value = self._held
        assert name == piece.parameter and write_item.tensor_data is not None
        return piece.of(value).view(write_item.tensor_data.chunk.sizes)


def _place(item: WriteItem) -> tuple[str, tuple[int, ...]]:
    assert item.index.offset is not None
    return item.index.fqn, tuple(item.index.offset)


class _OneByOne(FileSystemWriter):
    """Resolves an item, writes it, drops it; torch's own writer keeps the last tensor of every key to the end."""

    def __init__(self, path: Path, digests: dict[str, str]):
        super().__init__(path)
        self._directory, self._digests = path, digests

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        objects_first = sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO)
        assert isinstance(planner, _Planner)
        planner.read_ahead(objects_first)
        with open(self._directory / name, "wb") as stream, FollowingDigest(self._directory / name) as digest:
            results = [
                _write_item(
                    self.transforms, stream, planner.resolve_data(item), item, name, SerializationFormat.TORCH_SAVE
                )
                for item in objects_first
            ]
            stream.flush()
            os.fsync(stream.fileno())
            self._digests[name] = digest.hexdigest()
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written
