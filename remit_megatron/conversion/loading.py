"""Weights into a Megatron model: this rank's shards, from safetensors or from a checkpoint of any layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch import distributed as dist

from remit_megatron.conversion.checkpoint_files import CheckpointFiles
from remit_megatron.conversion.shared_reading import Read, read_in_turns
from remit_megatron.conversion.source import ModelSource
from remit_megatron.conversion.tensor_files import DTYPES, LazyTensor, TensorFiles
from remit_megatron.conversion.weight_files import HEAD, IMPLIED
from remit_megatron.models.build import shape_of, unwrap
from remit_megatron.models.family import family_of, required
from remit_megatron.models.mapping import WHOLE, NameMap, Shape, TensorRank, Vocabulary, Weight, place_of
from remit_megatron.runtime.checkpoints import MANIFEST, DamagedCheckpoint, read_manifest, verify
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.parallel import same_fate

logger = logging.getLogger(__name__)

_COMPARED_ROWS = 4096


def load_weights(
    chunks: Sequence[torch.nn.Module], source: ModelSource, *, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Fills every parameter of this rank's model chunks from ``source``, in place, in the parameters' own dtype.

    Collective over all ranks: each parameter is read by one of the replicas that hold it. Only weights are read, no
    optimizer. Rows that pad the vocabulary are set to zero. Memory beyond the model is about two tensors.

    Args:
        chunks: of :func:`remit_megatron.models.build.build_chunks`, or of a training run (wrapped or not).
        source: what :func:`remit_megatron.conversion.source.resolve` found; the chunks must have been built from its
            ``hf_config``.
        on_bytes: called with the bytes filled so far, after each parameter.

    Raises:
        UserError: a weight is missing or unknown, or has another shape than the model; or a checkpoint is not what its
            manifest says.
    """
    models = [unwrap(chunk) for chunk in chunks]
    names = family_of(source.hf_config).names(source.hf_config)
    shape = shape_of(source.hf_config)
    load = _load_huggingface if source.kind == "huggingface" else _load_checkpoint
    with torch.no_grad():
        load(models, source, names, shape, on_bytes or (lambda done: None))


def weights_of(model: GPTModel, names: NameMap) -> Iterable[tuple[str, int | None, Weight, torch.nn.Parameter]]:
    """Each parameter of a chunk: its name there, its layer in the whole model, its entry in the table, itself."""
    numbers = {str(index): int(layer.layer_number) - 1 for index, layer in enumerate(model.decoder.layers)}  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if name.startswith(names.megatron_prefix):
            number, rest = name.removeprefix(names.megatron_prefix).split(".", 1)
            layer, weight = names.find(f"{names.megatron_prefix}{numbers[number]}.{rest}")
        else:
            layer, weight = names.find(name)
        yield name, layer, weight, parameter


def assign(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Fills a whole parameter at once, in its own precision.

    Transformer Engine's FP8 parameters quantize what is copied into them, with scales taken from all of it. One that is
    to be trained also keeps its random initial value in high precision on the host, and the optimizer makes its master
    weight from that: it must hold the loaded weight too, or the first update would bring the random one back.
    """
    parameter.copy_(value)
    kept = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if kept is not None:
        kept.copy_(value)


def hf_names(names: NameMap, num_layers: int) -> set[str]:
    """Every tensor name of a complete Hugging Face model."""
    return {name for layer, weight in names.weights(num_layers) for name in names.hf_names(layer, weight)}


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, whatever their dtypes; a NaN is a NaN."""
    wide = torch.promote_types(first.dtype, second.dtype)
    first, second = first.to(wide), second.to(wide)
    return torch.equal(first, second) or bool(((first == second) | (first.isnan() & second.isnan())).all())


class HuggingFaceWeights:
    """The weights of a Hugging Face directory as Megatron parameters, each read when it is asked for.

    Args:
        source: of kind ``huggingface``.

    Raises:
        UserError: the directory holds a tensor that the family does not know, or a head that is not tied although
            config.json says so.
    """

    def __init__(self, source: ModelSource):
        family = family_of(source.hf_config)
        self.names: NameMap = family.names(source.hf_config)
        self._zero_rows = family.zero_rows(source.hf_config)
        self._shape, self._path = shape_of(source.hf_config), source.path
        self._files = TensorFiles(source.path)
        self._num_layers: int = required(source.hf_config, "num_hidden_layers")
        (embedding,) = self.names.embedding.hf
        known = self._named_in_files(hf_names(self.names, self._num_layers), embedding)
        # A tied model's files may hold the one matrix twice, or under the head's name alone.
        head = self._renamed.get(HEAD, HEAD)
        self._tied = self.names.head is None and head in self._files.names()
        unknown = self._files.names() - known - ({head} if self._tied else set())
        unknown = sorted(name for name in unknown if not IMPLIED.search(name))
        if unknown:
            raise UserError(
                f"weights in {source.path}", f"{unknown[0]} ({len(unknown)} unknown)", "weights of the family only"
            )
        if self._tied and self._renamed.get(embedding, embedding) not in self._files.names():
            self._renamed[embedding] = head
        elif self._tied:
            self._check_tied(self._renamed.get(embedding, embedding), head)

    def _named_in_files(self, known: set[str], embedding: str) -> set[str]:
        """The names ``known`` as the files have them, which may lack the part that says which part of a model they are
        (saved without its head, by ``AutoModel``), or have it once more (saved out of a wrapper). As in
        ``rename_source_key`` of transformers 5, each name by itself; but not where two would be one."""
        found, part = self._files.names(), embedding.split(".", 1)[0] + "."
        wanted = known | {HEAD}
        self._renamed: dict[str, str] = {}
        for name in sorted(found - wanted):
            for target in (name.removeprefix(part), part + name):
                if target in wanted and target not in found and target not in self._renamed:
                    self._renamed[target] = name
                    break
        return {self._renamed.get(name, name) for name in known}

    def _check_tied(self, embedding: str, head: str) -> None:
        """Refuses a head of its own in a model that config.json calls tied; a few rows at a time."""
        first, second = self._files[embedding], self._files[head]
        same = first.shape == second.shape and bool(first.shape)
        for start in range(0, first.shape[0] if same else 0, _COMPARED_ROWS):
            part = slice(start, start + _COMPARED_ROWS)
            if not same_values(first[part], second[part]):
                same = False
                break
        if not same:
            found = f"true, and {head} differs from {embedding} in {self._path}"
            expected = "false for a head of its own (transformers then does not tie it), or equal weights"
            raise UserError("config.json tie_word_embeddings", found, expected)

    def used(self) -> list[LazyTensor]:
        """The tensors that the model is made of: no buffers, and once what a file holds twice.

        Raises:
            UserError: one of them is missing, or has a dtype that weights do not have.
        """
        return [self._tensor(name) for name in sorted(hf_names(self.names, self._num_layers))]

    def check(self) -> None:
        """What can be said of the weights before there is a model of Megatron to fill.

        Raises:
            UserError: one is missing or of a dtype that weights do not have, or the vocabulary has other rows than
                config.json says.
        """
        self.used()
        for weight in (self.names.embedding, self.names.head):
            for name in () if weight is None else weight.hf:
                found = self._tensor(name).shape
                if found[:1] != (self._shape.vocab_size,):
                    expected = f"{self._shape.vocab_size} rows, as config.json says"
                    raise UserError(f"{self._path} {name}", f"shape {found}", expected)

    def _tensor(self, name: str) -> LazyTensor:
        if name == HEAD and self._renamed.get(name, name) not in self._files.names():
            found = f"no tensor {name}"
            raise UserError(f"weights in {self._path}", found, "one, or config.json with tie_word_embeddings true")
        tensor = self._files[self._renamed.get(name, name)]
        if tensor.dtype not in DTYPES.values():
            found = f"dtype {str(tensor.dtype).removeprefix('torch.')}"
            raise UserError(f"{self._path} {name}", found, f"one of {', '.join(DTYPES)}")
        tensor.zero_row = self._zero_rows.get(name)
        return tensor

    def tensors(
        self, layer: int | None, weight: Weight, local: Sequence[int], place: TensorRank = WHOLE
    ) -> list[LazyTensor]:
        """What the parameter is made of, not read yet.

        Args:
            local: shape of the parameter, whose shard at ``place`` it is.

        Raises:
            UserError: a tensor is missing, or has another shape or a dtype that weights do not have.
        """
        names = self.names.hf_names(layer, weight)
        found = [self._tensor(name) for name in names]
        expected = weight.hf_shapes(weight.full_shape(local, place.size), self._shape)
        for name, tensor, wanted in zip(names, found, expected, strict=True):
            if tensor.shape != tuple(wanted):
                raise UserError(
                    f"{self._path} {name}", f"shape {tensor.shape}", f"{tuple(wanted)}, as config.json says"
                )
        return found

    def read(self, layer: int | None, weight: Weight, local: Sequence[int], place: TensorRank = WHOLE) -> Tensor:
        """The parameter in the files' dtype; as :meth:`tensors` otherwise."""
        found = self.tensors(layer, weight, local, place)
        return weight.read(found, place, weight.full_shape(local, place.size), self._shape)


def _load_huggingface(
    models: Sequence[GPTModel], source: ModelSource, names: NameMap, shape: Shape, on_bytes: Callable[[int], None]
) -> None:
    weights = HuggingFaceWeights(source)
    done = 0
    filled: set[tuple[int | None, str]] = set()
    for model in models:
        rank = TensorRank(model.pg_collection.tp.rank(), model.pg_collection.tp.size())
        parts: list[tuple[torch.nn.Parameter, Read]] = []
        for _, layer, weight, parameter in weights_of(model, names):
            place = place_of(weight, rank, model.config.transformer_impl)
            weights.tensors(layer, weight, parameter.shape, place)  # what is missing is missing on every rank
            parts.append((parameter, partial(weights.read, layer, weight, parameter.shape, place)))
            # The embedding of a tied model fills two parameters where pipelining keeps a copy on the last stage.
            assert (layer, weight.local) not in filled or weight is names.embedding, (
                f"filled twice: {weight.local} of {layer}"
            )
            filled.add((layer, weight.local))
        for parameter, value in read_in_turns(parts, _replicas(model)):
            assign(parameter, value)
            done += parameter.nbytes
            on_bytes(done)


def sharded_weights(model: GPTModel, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Megatron's description of a chunk for distributed checkpoints. ``metadata`` comes from the checkpoint that is
    read."""
    return model.sharded_state_dict(metadata={**(metadata or {}), "dp_cp_group": model.pg_collection.dp_cp})


def _load_checkpoint(
    models: Sequence[GPTModel], source: ModelSource, names: NameMap, shape: Shape, on_bytes: Callable[[int], None]
) -> None:
    _compare_with_manifest(source)
    files = CheckpointFiles(source.path)
    done = 0
    for model in models:
        sharded = sharded_weights(model, files.content_metadata)
        found = list(weights_of(model, names))
        vocabularies = {id(parameter) for _, _, weight, parameter in found if isinstance(weight, Vocabulary)}
        parts = [(parameter, partial(files.read, sharded[name])) for name, _, _, parameter in found]
        for parameter, value in read_in_turns(parts, _replicas(model)):
            assign(parameter, value)
            if id(parameter) in vocabularies:
                _zero_padding(parameter, model.pg_collection.tp.rank(), shape.vocab_size)
            done += parameter.nbytes
            on_bytes(done)


def _compare_with_manifest(source: ModelSource) -> None:
    """Every byte of a checkpoint is read once more, by one of the ranks: a flipped bit would be a weight like any
    other, and another config.json another model. Once in a process, while no file has another time."""
    with same_fate("comparing a checkpoint with its manifest"):
        try:
            files = [source.path / name for name in (*read_manifest(source.path).files, MANIFEST)]
            times = tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)
            _verified(source.path.absolute(), times, dist.get_rank(), dist.get_world_size())
        except DamagedCheckpoint as damage:
            raise UserError("checkpoint", f"a damaged one: {damage}", "files that are as they were saved") from None


@cache
def _verified(path: Path, times: tuple[int, ...], part: int, parts: int) -> None:
    verify(path, part=part, parts=parts)


def _replicas(model: GPTModel) -> dist.ProcessGroup | None:
    """The ranks that hold the same parameters: those of the same place in the tensor and pipeline groups."""
    return getattr(model.pg_collection, "dp_cp", None)


def _zero_padding(parameter: Tensor, rank: int, vocab_size: int) -> None:
    """Sets the rows of a vocabulary shard that lie behind the true vocabulary to zero."""
    rows = parameter.shape[0]
    parameter[max(0, min(rows, vocab_size - rank * rows)) :] = 0
