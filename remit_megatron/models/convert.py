"""Weights into a Megatron model: this rank's shards, from safetensors or from a checkpoint of any layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors import safe_open
from torch import Tensor

from remit_megatron.errors import UserError
from remit_megatron.models.build import shape_of, unwrap
from remit_megatron.models.family import family_of
from remit_megatron.models.mapping import NameMap, Shape, TensorRank, Vocabulary, Weight
from remit_megatron.models.source import ModelSource, tensor_files

logger = logging.getLogger(__name__)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that old files hold and that the architecture implies.
_IMPLIED = ("rotary_emb.inv_freq",)


class LazyTensor:
    """A tensor in a safetensors file; indexing reads that part only."""

    def __init__(self, file: Any, name: str, path: Path):
        self._slice = file.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
        found = self._slice.get_dtype()
        if found not in _DTYPES:
            raise UserError(f"{path} {name}", f"dtype {found}", f"one of {', '.join(_DTYPES)}")
        self.dtype = _DTYPES[found]

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, slice) and index.start is not None and index.start >= index.stop:
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return self._slice[index]


class TensorFiles:
    """All tensors of a Hugging Face directory by name. Files are mapped when first used."""

    def __init__(self, directory: Path):
        self._paths = tensor_files(directory)
        self._open: dict[Path, Any] = {}

    def names(self) -> set[str]:
        return set(self._paths)

    def __getitem__(self, name: str) -> LazyTensor:
        path = self._paths.get(name)
        if path is None:
            raise UserError("Hugging Face weights", f"no tensor {name}", "every weight that config.json implies")
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        return LazyTensor(self._open[path], name, path)


def load_weights(chunks: Sequence[torch.nn.Module], source: ModelSource) -> None:
    """Fills every parameter of this rank's model chunks from ``source``, in place, in the parameters' own dtype.

    Collective over all ranks where the source is a checkpoint. Only weights are read, no optimizer. Rows that pad the
    vocabulary are set to zero. From safetensors, memory beyond the model is about one tensor.

    Args:
        chunks: of :func:`remit_megatron.models.build.build_chunks`, or of a training run (wrapped or not).
        source: what :func:`remit_megatron.models.source.resolve` found; its ``hf_config`` must be the one that the
            chunks were built from.

    Raises:
        UserError: a weight is missing or unknown, or has another shape than the model.
    """
    models = [unwrap(chunk) for chunk in chunks]
    names = family_of(source.hf_config).names(source.hf_config)
    shape = shape_of(source.hf_config)
    with torch.no_grad():
        if source.kind == "huggingface":
            _load_huggingface(models, source, names, shape)
        else:
            _load_checkpoint(models, source)
            for model in models:
                for _, weight, parameter in weights_of(model, names):
                    if isinstance(weight, Vocabulary):
                        _zero_padding(parameter, model.pg_collection.tp.rank(), shape.vocab_size)


def weights_of(model: GPTModel, names: NameMap) -> Iterable[tuple[int | None, Weight, torch.nn.Parameter]]:
    """Each parameter of a chunk with its layer number in the whole model and its entry in the table."""
    numbers = {str(index): int(layer.layer_number) - 1 for index, layer in enumerate(model.decoder.layers)}  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if name.startswith(names.megatron_prefix):
            number, rest = name.removeprefix(names.megatron_prefix).split(".", 1)
            name = f"{names.megatron_prefix}{numbers[number]}.{rest}"
        layer, weight = names.find(name)
        yield layer, weight, parameter


def hf_names(names: NameMap, num_layers: int) -> set[str]:
    """Every tensor name of a complete Hugging Face model."""
    return {name for layer, weight in names.weights(num_layers) for name in names.hf_names(layer, weight)}


def _load_huggingface(models: Sequence[GPTModel], source: ModelSource, names: NameMap, shape: Shape) -> None:
    files = TensorFiles(source.path)
    known = hf_names(names, source.hf_config["num_hidden_layers"])
    if names.head is None:
        known.add("lm_head.weight")  # a tied model's files may hold it a second time
    unknown = sorted(name for name in files.names() - known if not name.endswith(_IMPLIED))
    if unknown:
        raise UserError(
            f"weights in {source.path}", f"{unknown[0]} ({len(unknown)} unknown)", "weights of the family only"
        )
    filled: set[tuple[int | None, str]] = set()
    for model in models:
        place = TensorRank(model.pg_collection.tp.rank(), model.pg_collection.tp.size())
        for layer, weight, parameter in weights_of(model, names):
            full = weight.full_shape(parameter.shape, place.size)
            tensors = [files[name] for name in names.hf_names(layer, weight)]
            expected = weight.hf_shapes(full, shape)
            for name, tensor, wanted in zip(names.hf_names(layer, weight), tensors, expected, strict=True):
                if tensor.shape != tuple(wanted):
                    raise UserError(
                        f"{source.path} {name}", f"shape {tensor.shape}", f"{tuple(wanted)}, as config.json says"
                    )
            parameter.copy_(weight.read(tensors, place, full, shape))
            # The embedding of a tied model fills two parameters where pipelining keeps a copy on the last stage.
            assert (layer, weight.local) not in filled or weight is names.embedding, (
                f"filled twice: {weight.local} of {layer}"
            )
            filled.add((layer, weight.local))


def sharded_weights(model: GPTModel, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Megatron's description of a chunk for distributed checkpoints. ``metadata`` comes from the checkpoint that is
    read."""
    return model.sharded_state_dict(metadata={**(metadata or {}), "dp_cp_group": model.pg_collection.dp_cp})


def _load_checkpoint(models: Sequence[GPTModel], source: ModelSource) -> None:
    metadata = dist_checkpointing.load_content_metadata(str(source.path))
    wanted = {f"model{index}": sharded_weights(model, metadata) for index, model in enumerate(models)}
    check_shapes(wanted, source.path)
    loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(source.path))  # pyright: ignore[reportAssignmentType]
    for index, model in enumerate(models):
        model.load_state_dict(loaded[f"model{index}"])  # strict: every parameter, once


def check_shapes(wanted: dict[str, Any], path: Path) -> None:
    """Compares what a model asks for with what a checkpoint holds.

    Raises:
        UserError: a weight is missing, or has another shape; the vocabulary axis may differ, by padding.
    """
    held = dist_checkpointing.load_tensors_metadata(str(path))
    for tensor in _sharded_tensors(wanted):
        if tensor.key not in held:
            raise UserError(
                f"checkpoint {path}", f"no weight {tensor.key}", "the weights of the model in its config.json"
            )
        found, expected = tuple(held[tensor.key].global_shape), tuple(tensor.global_shape)
        skip = 1 if tensor.allow_shape_mismatch else 0
        if len(found) != len(expected) or found[skip:] != expected[skip:]:
            raise UserError(f"checkpoint {path} {tensor.key}", f"shape {found}", f"{expected}, as the model has it")


def _sharded_tensors(state: Any) -> Iterable[ShardedTensor]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _sharded_tensors(value)
    elif isinstance(state, ShardedTensorFactory):
        yield from _sharded_tensors(state.build())
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _sharded_tensors(value)
    elif isinstance(state, ShardedTensor):
        yield state


def _zero_padding(parameter: Tensor, rank: int, vocab_size: int) -> None:
    """Sets the rows of a vocabulary shard that lie behind the true vocabulary to zero."""
    rows = parameter.shape[0]
    parameter[max(0, min(rows, vocab_size - rank * rows)) :] = 0
