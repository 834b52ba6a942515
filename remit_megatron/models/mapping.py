"""Names and shapes of weights, Hugging Face <-> Megatron, as tables of a few reusable kinds.

A kind says how the tensors of a Hugging Face file become one Megatron parameter and back; both directions follow from
the same few numbers, so that one cannot drift from the other. Reading takes *lazy* tensors (a safetensors slice, or a
tensor: anything with a shape that can be indexed), so that a tensor-parallel rank reads only its own rows where the
layout allows it.

Legend: d size of a head, n heads, g query groups, h hidden, f feed-forward, V vocabulary, size and rank of the
tensor-parallel group.

Megatron has three names for a weight: the parameter of the local spec, the parameter of the Transformer Engine spec,
and the key in a distributed checkpoint. The last two are the same for all kinds here, and both specs write the same
keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from remit_megatron.runtime.errors import UserError


class Lazy(Protocol):
    """A tensor that may not have been read yet."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True)
class Shape:
    """Sizes that the kinds need.

    Attributes:
        heads: n, query heads of the whole model.
        groups: g, key/value heads of the whole model.
        vocab_size: V, true rows of the embedding.
    """

    heads: int
    groups: int
    vocab_size: int


@dataclass(frozen=True)
class TensorRank:
    """Place in the tensor-parallel group."""

    rank: int = 0
    size: int = 1

    def part(self, total: int, what: str) -> slice:
        """This rank's even share of ``total`` rows."""
        if total % self.size:
            raise UserError("tensor_model_parallel_size", self.size, f"a divisor of {what} ({total})")
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


WHOLE = TensorRank()


def place_of(weight: Weight, place: TensorRank, transformer_impl: str) -> TensorRank:
    """The place whose part of ``weight`` a parameter holds in a model at ``place``, under that kind of layers."""
    whole = transformer_impl != "local" and isinstance(weight, Direct) and weight.te_whole
    return WHOLE if whole else place


class Weight(Protocol):
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    @property
    def hf(self) -> tuple[str, ...]:
        """Hugging Face names, relative to the layer where it is in one."""
        ...

    @property
    def local(self) -> str:
        """Megatron's name under the local spec."""
        ...

    @property
    def te(self) -> str:
        """Megatron's name under the Transformer Engine spec, and in checkpoints."""
        ...

    def hf_shapes(self, full: Sequence[int], shape: Shape) -> tuple[tuple[int, ...], ...]:
        """Shapes of the Hugging Face tensors of a parameter whose unsharded shape is ``full``."""
        ...

    def full_shape(self, local: Sequence[int], size: int) -> tuple[int, ...]:
        """Unsharded shape of a parameter whose shard is ``local``."""
        ...

    def read(self, tensors: Sequence[Lazy], place: TensorRank, full: Sequence[int], shape: Shape) -> Tensor:
        """The shard at ``place``, from Hugging Face tensors."""
        ...

    def write(self, shards: Sequence[Tensor], shape: Shape) -> tuple[Tensor, ...]:
        """Hugging Face tensors, from the shards of all ranks in order (one, for an unsharded parameter)."""
        ...


@dataclass(frozen=True)
class Direct:
    """The same tensor under another name.

    Args:
        hf_name, local, te: names; ``te`` is ``local`` where not given.
        split: how tensor parallelism cuts it: ``column`` (rows of the matrix, dim 0), ``row`` (dim 1), None
            (replicated).
        te_whole: Transformer Engine's layer holds it whole on every rank, whatever ``split`` says of the local one.
    """

    hf_name: str
    local: str
    te: str = ""
    split: Literal["column", "row"] | None = None
    te_whole: bool = False

    def __post_init__(self) -> None:
        if not self.te:
            object.__setattr__(self, "te", self.local)

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_name,)

    @property
    def _dim(self) -> int | None:
        return {"column": 0, "row": 1, None: None}[self.split]

    def hf_shapes(self, full: Sequence[int], shape: Shape) -> tuple[tuple[int, ...], ...]:
        return (tuple(full),)

    def full_shape(self, local: Sequence[int], size: int) -> tuple[int, ...]:
        return tuple(length * size if dim == self._dim else length for dim, length in enumerate(local))

    def read(self, tensors: Sequence[Lazy], place: TensorRank, full: Sequence[int], shape: Shape) -> Tensor:
        (tensor,) = tensors
        if self._dim is None:
            return tensor[:]
        part = place.part(full[self._dim], self.local)
        return tensor[part] if self._dim == 0 else tensor[:, part]

    def write(self, shards: Sequence[Tensor], shape: Shape) -> tuple[Tensor, ...]:
        return (shards[0] if self._dim is None else _cat(shards, self._dim),)


@dataclass(frozen=True)
class QKV:
    """Query, key and value in one matrix, interleaved by group: (queries of group 0, k 0, v 0, queries of group 1,
    ...).

    [n d, h], [g d, h], [g d, h] <-> [(n + 2 g) d, h]; tensor parallelism cuts dim 0, whole groups at a time where there
    are enough.
    """

    hf: tuple[str, str, str]
    local: str

    @property
    def te(self) -> str:
        return self.local

    def hf_shapes(self, full: Sequence[int], shape: Shape) -> tuple[tuple[int, ...], ...]:
        head = full[0] // (shape.heads + 2 * shape.groups)
        kv = (shape.groups * head, *full[1:])
        return ((shape.heads * head, *full[1:]), kv, kv)

    def full_shape(self, local: Sequence[int], size: int) -> tuple[int, ...]:
        return (local[0] * size, *local[1:])

    def read(self, tensors: Sequence[Lazy], place: TensorRank, full: Sequence[int], shape: Shape) -> Tensor:
        if shape.groups % place.size:  # fewer groups than ranks: a rank holds a piece of one
            return self.read(tensors, WHOLE, full, shape)[place.part(full[0], self.local)]
        head = full[0] // (shape.heads + 2 * shape.groups)
        groups = place.part(shape.groups, "the query groups")
        pieces = []
        for tensor, heads_per_group in zip(tensors, (shape.heads // shape.groups, 1, 1), strict=True):
            rows = heads_per_group * head
            piece = tensor[groups.start * rows : groups.stop * rows]
            pieces.append(piece.reshape(groups.stop - groups.start, rows, *piece.shape[1:]))
        return torch.cat(pieces, dim=1).flatten(0, 1)

    def write(self, shards: Sequence[Tensor], shape: Shape) -> tuple[Tensor, ...]:
        full = _cat(shards, 0)
        head = full.shape[0] // (shape.heads + 2 * shape.groups)
        queries = shape.heads // shape.groups * head
        by_group = full.unflatten(0, (shape.groups, queries + 2 * head))
        q, k, v = by_group.split([queries, head, head], dim=1)
        return tuple(tensor.flatten(0, 1) for tensor in (q, k, v))


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projection in one matrix: [f, h], [f, h] <-> [2 f, h]. Each rank holds its part of both, gate
    first."""

    hf: tuple[str, str]
    local: str

    @property
    def te(self) -> str:
        return self.local

    def hf_shapes(self, full: Sequence[int], shape: Shape) -> tuple[tuple[int, ...], ...]:
        return ((full[0] // 2, *full[1:]),) * 2

    def full_shape(self, local: Sequence[int], size: int) -> tuple[int, ...]:
        return (local[0] * size, *local[1:])

    def read(self, tensors: Sequence[Lazy], place: TensorRank, full: Sequence[int], shape: Shape) -> Tensor:
        part = place.part(full[0] // 2, "ffn_hidden_size")
        return torch.cat([tensor[part] for tensor in tensors])

    def write(self, shards: Sequence[Tensor], shape: Shape) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return tuple(_cat([half[i] for half in halves], 0) for i in range(2))


@dataclass(frozen=True)
class Vocabulary:
    """An embedding or an output head: [V, h] <-> [padded V, h]. Padding rows are zero when read and cut off when
    written."""

    hf_name: str
    local: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_name,)

    @property
    def te(self) -> str:
        return self.local

    def hf_shapes(self, full: Sequence[int], shape: Shape) -> tuple[tuple[int, ...], ...]:
        return ((shape.vocab_size, *full[1:]),)

    def full_shape(self, local: Sequence[int], size: int) -> tuple[int, ...]:
        return (local[0] * size, *local[1:])

    def read(self, tensors: Sequence[Lazy], place: TensorRank, full: Sequence[int], shape: Shape) -> Tensor:
        (tensor,) = tensors
        part = place.part(full[0], "the padded vocabulary")
        rows = tensor[min(part.start, shape.vocab_size) : min(part.stop, shape.vocab_size)]
        missing = part.stop - part.start - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    def write(self, shards: Sequence[Tensor], shape: Shape) -> tuple[Tensor, ...]:
        return (_cat(shards, 0)[: shape.vocab_size],)


def _cat(shards: Sequence[Tensor], dim: int) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


@dataclass(frozen=True)
class NameMap:
    """Every weight of a family.

    Attributes:
        embedding: input embedding.
        layer: weights of one layer, named relative to it.
        final: what follows the last layer, before the head.
        head: output projection; None for a tied model, whose last pipeline stage holds the embedding a second time.
        hf_prefix, megatron_prefix: a layer's name without its number.
    """

    embedding: Weight
    layer: tuple[Weight, ...]
    final: tuple[Weight, ...]
    head: Weight | None
    hf_prefix: str = "model.layers."
    megatron_prefix: str = "decoder.layers."

    def weights(self, num_layers: int) -> list[tuple[int | None, Weight]]:
        """All weights of a model with their layer (0-based; None outside), in the order of a forward pass."""
        outside = [*self.final, *([self.head] if self.head else [])]
        inside = [(layer, weight) for layer in range(num_layers) for weight in self.layer]
        return [(None, self.embedding), *inside, *((None, weight) for weight in outside)]

    def find(self, name: str) -> tuple[int | None, Weight]:
        """The weight behind a Megatron parameter whose layer number, if any, counts over the whole model.

        Raises:
            KeyError: the table does not have it.
        """
        layer, relative, candidates = None, name, (self.embedding, *self.final, *([self.head] if self.head else ()))
        if name.startswith(self.megatron_prefix):
            number, relative = name.removeprefix(self.megatron_prefix).split(".", 1)
            layer, candidates = int(number), self.layer
        elif name == "output_layer.weight" and self.head is None:
            return None, self.embedding
        for weight in candidates:
            if relative in (weight.local, weight.te):
                return layer, weight
        raise KeyError(name)

    def hf_names(self, layer: int | None, weight: Weight) -> tuple[str, ...]:
        """Names in a Hugging Face file."""
        prefix = "" if layer is None else f"{self.hf_prefix}{layer}."
        return tuple(prefix + name for name in weight.hf)
