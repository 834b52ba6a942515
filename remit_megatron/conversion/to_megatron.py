"""Hugging Face directory -> Megatron checkpoint: torch_dist files, ``hf/`` with what travels along, a manifest last.

Weights are read when they are written: memory stays near the size of the largest one, whatever the model's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from remit_megatron.conversion.directories import complete_directory
from remit_megatron.conversion.loading import HuggingFaceWeights, weights_of
from remit_megatron.conversion.processes import process_groups
from remit_megatron.conversion.source import ModelSource, copy_companions, resolve, with_dtype
from remit_megatron.conversion.streamed_save import save_streamed
from remit_megatron.models.build import build_chunks, default_arguments, model_config, unwrap
from remit_megatron.runtime.checkpoints import describe_files, write_manifest
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import HF_SUBFOLDER
from remit_megatron.runtime.progress import Progress

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def import_model(hf: str | os.PathLike, output: str | os.PathLike, *, dtype: str | None = None) -> None:
    """Writes a checkpoint that any tensor- and pipeline-parallel layout can load.

    Args:
        hf: directory with config.json and safetensors.
        output: the checkpoint's directory; complete or absent.
        dtype: ``bf16`` or ``fp32``; None keeps bf16 where every weight of the model is, and is fp32 otherwise (nothing
            is rounded). Buffers, and a copy of a tied head, do not count.

    Raises:
        UserError: the input is incomplete or not supported, or the output cannot be written.
    """
    source = resolve(hf, field="--hf")
    if source.kind != "huggingface":
        raise UserError("--hf", f"{source.path}, a Megatron checkpoint", "a Hugging Face directory")
    weights = HuggingFaceWeights(source)
    wanted = DTYPES[dtype] if dtype else _common_dtype({tensor.dtype for tensor in weights.used()})
    size = sum(torch.Size(tensor.shape).numel() for tensor in weights.used()) * wanted.itemsize
    # A little more than the weights: names, tokenizer, manifest.
    with complete_directory(output, field="--output", needed_bytes=size + (64 << 20)) as directory:
        with process_groups(alone=True) as groups:
            config = model_config(source.hf_config, default_arguments(params_dtype=wanted, transformer_impl="local"))
            with torch.device("meta"):
                model = unwrap(build_chunks(config, groups, mixed_precision=False)[0])
            digests = _write_weights(model, weights, directory)
        (directory / HF_SUBFOLDER).mkdir()
        copy_companions(source.path, directory / HF_SUBFOLDER)
        _write_config(source, directory / HF_SUBFOLDER, str(wanted).removeprefix("torch."))
        files = describe_files(directory, known=digests)
        write_manifest(directory, files=files, iteration=0, kind="import", dtype=str(wanted).removeprefix("torch."))
    logger.info("imported %s to %s", source.path, output)


def _write_weights(model: GPTModel, weights: HuggingFaceWeights, directory: Path) -> dict[str, str]:
    """Returns what `save_streamed` returns."""
    entries = {name: (layer, weight, parameter) for name, layer, weight, parameter in weights_of(model, weights.names)}
    for layer, weight, parameter in entries.values():  # all of them before the first byte is written
        weights.tensors(layer, weight, parameter.shape)
    progress = Progress("import", total=sum(parameter.nbytes for *_, parameter in entries.values()), unit="B")
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        layer, weight, parameter = entries[name]
        progress.update(done)
        done += parameter.nbytes
        return weights.read(layer, weight, parameter.shape).to(parameter.dtype).contiguous()

    digests = save_streamed(model, read, directory)
    progress.update(done)
    progress.finish()
    return digests


def _write_config(source: ModelSource, directory: Path, dtype: str) -> None:
    """The file byte for byte, but where it says another dtype of the weights than they now have."""
    if all(source.hf_config.get(key) in (None, dtype) for key in ("dtype", "torch_dtype")):
        shutil.copyfile(source.path / "config.json", directory / "config.json")
        return
    config = with_dtype(source.hf_config, dtype)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _common_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
