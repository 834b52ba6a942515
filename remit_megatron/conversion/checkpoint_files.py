"""Reading parts of a Megatron distributed checkpoint (torch_dist), one weight at a time, in one process.

Megatron's own loader wants the whole state of all ranks in one collective call. Here a rank asks for the part that a
sharded state dict describes, whatever layout wrote it, and gets it as a tensor; memory is that tensor and one stored
piece of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from remit_megatron.runtime.errors import UserError


class CheckpointFiles:
    """The tensors of one checkpoint directory.

    Args:
        path: directory with ``.metadata`` and ``*.distcp``; one of ours, verified against its manifest before.
    """

    def __init__(self, path: Path):
        self.path = path
        self._reader = FileSystemReader(path)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: dict[str, Any] = metadata.state_dict_metadata
        # How the writer arranged its state dict; a reader must arrange its own alike.
        self.content_metadata: dict[str, Any] = dist_checkpointing.load_content_metadata(str(path)) or {}

    def stored(self, key: str) -> TensorStorageMetadata:
        """Size, dtype and pieces of a stored tensor.

        Raises:
            UserError: the checkpoint does not have it.
        """
        found = self._tensors.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise UserError(
                f"checkpoint {self.path}", f"no weight {key}", "the weights of the model in its config.json"
            )
        return found

    def read(self, sharded: ShardedTensor | ShardedTensorFactory) -> Tensor:
        """The part that ``sharded`` describes, in the stored dtype, on the CPU. Its data is not used and may be on
        ``meta``.

        Rows of a vocabulary that the checkpoint does not have are zero.

        Raises:
            UserError: the weight is missing, or its unsharded shape is another.
        """
        if isinstance(sharded, ShardedTensorFactory):
            parts: Any = sharded.build()  # a list, for every parameter of a dense model
            merge: Any = sharded.merge_fn
            return merge([self.read(part) for part in parts])
        stored = self.stored(sharded.key)
        found, expected = tuple(stored.size), tuple(sharded.global_shape)
        # Vocabularies may be padded differently; Megatron marks them.
        free = 1 if sharded.allow_shape_mismatch else 0
        if len(found) != len(expected) or found[free:] != expected[free:]:
            raise UserError(
                f"checkpoint {self.path} {sharded.key}", f"shape {found}", f"{expected}, as the model has it"
            )
        sizes = [1] * sharded.prepend_axis_num + list(sharded.local_shape)
        part = torch.empty(sizes, dtype=stored.properties.dtype)
        offsets = sharded.global_offset
        rows = max(0, min(sizes[0], found[0] - offsets[0]))
        part[rows:].zero_()
        if rows:
            self._fill(sharded.key, stored, part[:rows], offsets)
        return part.reshape(sharded.local_shape)

    def _fill(self, key: str, stored: TensorStorageMetadata, target: Tensor, offsets: tuple[int, ...]) -> None:
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=target.shape)
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        assert covered == target.numel(), f"{key}: the stored pieces cover {covered} of {target.numel()} elements"
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()


class _Into(DefaultLoadPlanner):
    """Everything that is read goes into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target
