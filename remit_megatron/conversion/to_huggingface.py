"""Megatron checkpoint -> Hugging Face directory that transformers loads unchanged.

The model is built on the meta device, without memory; the checkpoint is then read a weight at a time, whatever layout
wrote it, and each is written before the next is read: memory stays near twice the size of the largest one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from remit_megatron.conversion.checkpoint_files import CheckpointFiles
from remit_megatron.conversion.directories import complete_directory
from remit_megatron.conversion.loading import hf_names, sharded_weights, weights_of
from remit_megatron.conversion.processes import process_groups
from remit_megatron.conversion.source import ModelSource, copy_companions, resolve, with_dtype, with_head
from remit_megatron.conversion.tensor_files import TensorFileWriter
from remit_megatron.conversion.to_megatron import DTYPES
from remit_megatron.models.build import build_chunks, default_arguments, model_config, shape_of, unwrap
from remit_megatron.models.family import family_of
from remit_megatron.models.mapping import NameMap, Shape, Weight
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.progress import Progress

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16, torch.float16)}


# Name in the model, layer, row of the table, unsharded shape.
Entry = tuple[str, int | None, Weight, torch.Size]


@dataclass
class _OutputFile:
    """What goes into one safetensors file, and its bytes."""

    entries: list[Entry] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    size: int = 0


def export_model(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes safetensors, config.json, tokenizer and generation configuration.

    Args:
        checkpoint: what :func:`remit_megatron.conversion.source.resolve` takes, other than a Hugging Face directory.
        output: directory; complete or absent.
        dtype: ``bf16`` or ``fp32``; None keeps the checkpoint's.
        max_file_bytes: weights are spread over several files where they take more.

    Raises:
        UserError: the checkpoint is incomplete or does not fit its config.json, or the output cannot be written.
    """
    source = resolve(checkpoint, field="--checkpoint", digests=True)
    if source.kind != "checkpoint":
        raise UserError("--checkpoint", f"{source.path}, a Hugging Face directory", "a Megatron checkpoint")
    with process_groups(alone=True) as groups:
        config = model_config(source.hf_config, default_arguments(transformer_impl="local"))
        with torch.device("meta"):
            model = unwrap(build_chunks(config, groups, mixed_precision=False)[0])
        reader = _Reader(model, source)
        wanted = DTYPES[dtype] if dtype else reader.dtype
        files = _plan(reader, wanted, max_file_bytes)
        total = sum(file.size for file in files)
        with complete_directory(output, field="--output", needed_bytes=total + (64 << 20)) as directory:
            kept = _write_weights(directory, reader, files, wanted)
            copy_companions(source.hf_files, directory)
            _write_config(directory, source, wanted, without_padding=kept)
    logger.info("exported iteration %s of %s to %s", source.iteration, source.path, output)


class _Reader:
    """Reads weights of a checkpoint by entry of the table, unsharded."""

    def __init__(self, model: GPTModel, source: ModelSource):
        self.names: NameMap = family_of(source.hf_config).names(source.hf_config)
        self.shape: Shape = shape_of(source.hf_config)
        self.num_layers: int = source.hf_config["num_hidden_layers"]
        self.zero_rows = family_of(source.hf_config).zero_rows(source.hf_config)
        self._files = CheckpointFiles(source.path)
        self._sharded = sharded_weights(model, self._files.content_metadata)
        embedding = next(name for name, _, weight, _ in weights_of(model, self.names) if weight is self.names.embedding)
        self.dtype: torch.dtype = self._files.stored(self._sharded[embedding].key).properties.dtype
        self.entries: list[Entry] = [
            (name, layer, weight, parameter.shape) for name, layer, weight, parameter in weights_of(model, self.names)
        ]

    def shapes(self, entry: Entry) -> dict[str, tuple[int, ...]]:
        """Hugging Face names and shapes of one Megatron parameter."""
        _, layer, weight, full = entry
        return dict(zip(self.names.hf_names(layer, weight), weight.hf_shapes(full, self.shape), strict=True))

    def read(self, entry: Entry) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and tensors of one Megatron parameter."""
        name, layer, weight, _ = entry
        tensors = weight.write([self._files.read(self._sharded[name])], self.shape)
        return zip(self.names.hf_names(layer, weight), tensors, strict=True)


def _plan(reader: _Reader, dtype: torch.dtype, max_file_bytes: int) -> list[_OutputFile]:
    """Which weights each output file gets."""
    files = [_OutputFile()]
    for entry in reader.entries:
        shapes = reader.shapes(entry)
        size = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        if files[-1].entries and files[-1].size + size > max_file_bytes:
            files.append(_OutputFile())
        files[-1].entries.append(entry)
        files[-1].shapes |= shapes
        files[-1].size += size
    written = {name for file in files for name in file.shapes}
    assert written == hf_names(reader.names, reader.num_layers), "the table and the model disagree"
    return files


def _write_weights(directory: Path, reader: _Reader, files: list[_OutputFile], dtype: torch.dtype) -> bool:
    """Returns whether a row that transformers would set to zero is something else, as training makes it of a tied
    one."""
    total = sum(file.size for file in files)
    progress = Progress("export", total=total, unit="B")
    weight_map: dict[str, str] = {}
    done, trained = 0, False
    for number, file in enumerate(files, start=1):
        path = directory / (
            "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        with TensorFileWriter(path, file.shapes, dtype=dtype) as writer:
            for entry in file.entries:
                for name, tensor in reader.read(entry):
                    writer.write(name, tensor)
                    weight_map[name] = path.name
                    row = reader.zero_rows.get(name)
                    trained |= row is not None and bool(tensor[row].any())
                    done += tensor.numel() * dtype.itemsize
                    del tensor  # or it would hold its parameter while the next one is read
                progress.update(done)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    progress.finish()
    return trained


def _write_config(directory: Path, source: ModelSource, dtype: torch.dtype, *, without_padding: bool) -> None:
    """config.json unchanged, but for the dtype where that is another, names that transformers does not know, the name
    of a model without its head, and that of a file that weights came from.

    Args:
        without_padding: also without ``pad_token_id``, whose row transformers would set to zero.
    """
    exported = family_of(source.hf_config).exported(source.hf_config)
    exported = {name: value for name, value in exported.items() if name != "transformers_weights"}
    if without_padding:
        logger.warning(
            "config.json gets no pad_token_id (was %s): transformers would set its row of the embedding to zero, which "
            "is not what it was trained to; the tokenizer's padding token stays",
            exported["pad_token_id"],
        )
        exported["pad_token_id"] = None
    config = with_dtype(with_head(exported), _DTYPE_NAMES[dtype])
    if config == source.hf_config:
        shutil.copyfile(source.hf_files / "config.json", directory / "config.json")
        return
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
