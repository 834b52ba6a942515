"""What a run leaves: models, which are what it started from with other weights, and the record that it is complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.files import fsync_directory, fsync_file

COMPLETE = "complete.json"
# Arguments of TRL that do not change what is learnt: a run that goes on may change them, and no key has them.
FREE = {
    *("output_dir", "save_steps", "save_strategy", "save_total_limit", "save_on_each_node", "eval_steps"),
    *("eval_delay", "per_device_eval_batch_size", "eval_accumulation_steps", "log_completions", "ddp_timeout"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "skip_memory_metrics"),
    *("dataloader_prefetch_factor", "dataset_num_proc", "torch_empty_cache_steps", "debug"),
}
# Read by transformers beside the weights: who reads the result finds what the source had, byte for byte.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def write_model(model: Any, directory: Path, *, source: Path, chat_template: str | None, untied: bool = False) -> None:
    """Writes a Hugging Face directory, whole or not at all.

    TRL changes the padding token of the tokenizer and the model's configuration for its own work; the directory has
    those of ``source``, so that the result is the same model to everything that compares tokenizers.

    Args:
        model: transformers', unwrapped.
        source: the directory that the run started from.
        chat_template: text of the template to put in place of the source's; None keeps it.
        untied: whether the model has a head of its own although the source's config.json calls it tied.
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
    if untied:
        config["tie_word_embeddings"] = False
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


def compare_identity(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Refuses to go on with what is another run.

    Args:
        before, now: names and values that the two have in common if they are the same run; ``trl`` holds TRL's
            arguments, of which some may change.

    Raises:
        UserError: a value differs.
    """
    for name, value in now.items():
        if name != "trl" and before.get(name) != value:
            found, expected = _short(value), _short(before.get(name))
            raise UserError(name, found, f"{expected}, as the run in {run_dir} has it, or another run_dir")
    old, new = before.get("trl", {}), now.get("trl", {})
    for name in sorted(old.keys() | new.keys()):
        if name not in FREE and old.get(name) != new.get(name):
            found, expected = show(new.get(name)), show(old.get(name))
            raise UserError(f"trl.{name}", found, f"{expected}, as the run in {run_dir} has it, or another run_dir")


def _short(value: Any) -> str:
    return f"digest {value[:12]}…" if isinstance(value, str) and len(value) == 64 else show(value)
