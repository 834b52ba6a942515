"""The models that a run writes: what it started from, with other weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from remit_megatron.runtime.files import fsync_directory, fsync_file

# Read by transformers beside the weights: who reads the result finds what the source had, byte for byte.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def write_model(model: Any, directory: Path, *, source: Path, chat_template: str | None) -> None:
    """Writes a Hugging Face directory, whole or not at all.

    TRL changes the padding token of the tokenizer and the model's configuration for its own work; the directory has
    those of ``source``, so that the result is the same model to everything that compares tokenizers.

    Args:
        model: transformers', unwrapped.
        source: the directory that the run started from.
        chat_template: text of the template to put in place of the source's; None keeps it.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    for name in ("config.json", "generation_config.json"):
        (temporary / name).unlink(missing_ok=True)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in _WEIGHTS:
                shutil.copyfile(file, temporary / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if chat_template is not None:
        (temporary / "chat_template.jinja").write_text(chat_template)
    for file in temporary.iterdir():
        fsync_file(file)
    fsync_directory(temporary)
    if directory.exists():
        shutil.rmtree(directory)
    temporary.rename(directory)
    fsync_directory(directory.parent)
