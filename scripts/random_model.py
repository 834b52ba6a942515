"""A Hugging Face directory of any size with random weights, written a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MAX_FILE_BYTES = 5_000_000_000


def write_random_model(
    directory: Path,
    hf_config: dict[str, Any],
    *,
    dtype: torch.dtype,
    seed: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> dict[str, tuple[int, ...]]:
    """Writes config.json and safetensors of the shapes that follow from it; ``patches.apply()`` must have run.

    Args:
        directory: must not exist.
        hf_config: content of config.json.
        dtype: of all weights, which are normal with a deviation of 0.02.
        max_file_bytes: weights are spread over several files where they take more.

    Returns:
        Shape of every tensor, by name.
    """
    from remit_megatron.conversion.tensor_files import TensorFileWriter

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    shapes = tensor_shapes(hf_config)
    files = _split(shapes, dtype, max_file_bytes)
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    generator = torch.Generator().manual_seed(seed)
    for name, held in zip(names, files, strict=True):
        with TensorFileWriter(directory / name, held, dtype=dtype) as writer:
            for tensor, shape in held.items():
                writer.write(tensor, torch.empty(shape, dtype=dtype).normal_(0.0, 0.02, generator=generator))
    weight_map = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    else:
        (directory / names[0]).rename(directory / "model.safetensors")
    return shapes


def tensor_shapes(hf_config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of a model's weights, in the order of the model."""
    from remit_megatron.conversion.loading import weights_of
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.models.build import build_chunks, default_arguments, model_config, shape_of, unwrap
    from remit_megatron.models.family import family_of

    names = family_of(hf_config).names(hf_config)
    found: dict[str, tuple[int, ...]] = {}
    with process_groups(alone=True) as groups, torch.device("meta"):
        config = model_config(hf_config, default_arguments(transformer_impl="local"))
        model = unwrap(build_chunks(config, groups, mixed_precision=False)[0])
        for _, layer, weight, parameter in weights_of(model, names):
            shapes = weight.hf_shapes(parameter.shape, shape_of(hf_config))
            found |= zip(names.hf_names(layer, weight), shapes, strict=True)
    return found


def _split(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_file_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    files: list[dict[str, tuple[int, ...]]] = [{}]
    so_far = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if files[-1] and so_far + size > max_file_bytes:
            files.append({})
            so_far = 0
        files[-1][name] = shape
        so_far += size
    return files
