"""Where weights come from: a Hugging Face directory, or a checkpoint of ours, and what each of them holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from remit_megatron.conversion.weight_files import tensor_files
from remit_megatron.runtime.checkpoints import (
    DamagedCheckpoint,
    is_checkpoint,
    iteration_directory,
    iterations,
    newest_complete,
    read_manifest,
    verify,
)
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import HF_SUBFOLDER, parse_json, sha256_file

# What transformers reads of a tokenizer, as patterns. These files decide ids and belong together: one of another
# tokenizer among them would make a third.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.*.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
CHAT_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
# What travels with the weights through import, training and export.
COMPANION_FILES = (*TOKENIZER_FILES, *CHAT_FILES, "generation_config.json")


@dataclass(frozen=True)
class ModelSource:
    """Complete weights on disk.

    Attributes:
        kind: ``huggingface`` (safetensors), or ``checkpoint`` (Megatron torch_dist files with ``hf/`` and a manifest).
        path: directory that holds the weights themselves.
        hf_config: content of config.json.
        tokenizer: directory with tokenizer files, or None where there are none.
        iteration: iteration of a checkpoint; 0 for an import, None for a Hugging Face directory.
    """

    kind: Literal["huggingface", "checkpoint"]
    path: Path
    hf_config: dict[str, Any]
    tokenizer: Path | None
    iteration: int | None

    @property
    def hf_files(self) -> Path:
        """Directory with config.json and its companions."""
        return self.path / HF_SUBFOLDER if self.kind == "checkpoint" else self.path


def resolve(path: str | os.PathLike, *, field: str = "checkpoint", digests: bool = False) -> ModelSource:
    """Finds complete weights behind a path.

    Args:
        path: a Hugging Face directory, an output of ``remit import``, a run directory (its newest complete checkpoint),
            its ``checkpoints`` folder, or one iteration's directory.
        field: how messages name the path.
        digests: read the whole checkpoint and compare with its manifest. Sizes are always compared.

    Raises:
        UserError: nothing there, or not complete, or of a kind that is not supported.
    """
    path = Path(path)
    if not path.is_dir():
        expected = "a directory with a checkpoint or a Hugging Face model"
        raise UserError(field, f"{path} (a file)" if path.exists() else f"no directory {path}", expected)
    if is_checkpoint(path):
        return _checkpoint(path, field, digests)
    if (path / "config.json").exists():
        return _huggingface(path, field)
    for root in (path / "checkpoints", path):
        if iterations(root):
            return _newest(root, field, digests)
    expected = (
        "config.json with *.safetensors, a checkpoint with manifest.json, or a run directory with checkpoints/iter_*"
    )
    found = "neither of these" if any(path.iterdir()) else "an empty directory"
    raise UserError(field, f"{found} in {path}", expected)


def _newest(root: Path, field: str, digests: bool) -> ModelSource:
    newest = newest_complete(root, digests=digests)
    if newest is None:
        raise UserError(
            field, f"no complete checkpoint among {len(iterations(root))} in {root}", "at least one with a manifest"
        )
    return _checkpoint(iteration_directory(root, newest), field, False)


def _checkpoint(path: Path, field: str, digests: bool) -> ModelSource:
    try:
        manifest = verify(path, digests=True) if digests else read_manifest(path)
        if not digests:
            verify(path, digests=False)
    except DamagedCheckpoint as damage:
        raise UserError(field, f"half a checkpoint: {damage}", "a complete checkpoint") from None
    hf = path / HF_SUBFOLDER
    return ModelSource(
        kind="checkpoint",
        path=path,
        hf_config=read_config(hf, field),
        tokenizer=_tokenizer(hf),
        iteration=manifest.properties.get("iteration", 0),
    )


def _huggingface(path: Path, field: str) -> ModelSource:
    hf_config = read_config(path, field)
    tensor_files(path, field)
    return ModelSource(kind="huggingface", path=path, hf_config=hf_config, tokenizer=_tokenizer(path), iteration=None)


def _tokenizer(directory: Path) -> Path | None:
    return (
        directory
        if any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
        else None
    )


def read_config(directory: Path, field: str = "checkpoint") -> dict[str, Any]:
    """Content of ``config.json``.

    Raises:
        UserError: it is missing, is not JSON, or marks quantized weights.
    """
    path = directory / "config.json"
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(field, f"no {path}", "the model's config.json") from None
    except ValueError as error:
        raise UserError(str(path), f"no JSON ({error})", "the model's configuration") from None
    if not isinstance(config, dict):
        raise UserError(str(path), type(config).__name__, "a JSON object")
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{path} quantization_config", config["quantization_config"], "none: plain floating-point weights"
        )
    return config


def weights_digest(source: ModelSource) -> str:
    """Hex digest of what decides a model's outputs: its weights as they are stored, and its architecture.

    From a checkpoint's manifest it costs nothing; a Hugging Face directory's safetensors are read whole.
    """
    if source.kind == "checkpoint":
        files = read_manifest(source.path).files
        digests = [entry["sha256"] for name, entry in files.items() if not name.startswith(f"{HF_SUBFOLDER}/")]
    else:
        digests = [sha256_file(path) for path in set(tensor_files(source.path).values())]
    described = {
        name: value
        for name, value in source.hf_config.items()
        if name not in ("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache")
    }
    content = json.dumps([sorted(digests), described], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


_SAMPLES, _SAMPLED = 16, 1 << 16  # of each file: blocks, evenly spaced, and bytes of one


def weights_fingerprint(source: ModelSource) -> str:
    """Hex digest that another model in the same place does not have, for the price of some blocks of each file.

    Training moves every weight, so that blocks tell; a change of a few weights by hand does not. Use
    :func:`weights_digest` where that matters.
    """
    if source.kind == "checkpoint":
        return weights_digest(source)
    found = hashlib.sha256()
    for path in sorted(set(tensor_files(source.path).values())):
        size = os.stat(path).st_size
        found.update(f"{size};".encode())
        with open(path, "rb") as file:
            for number in range(_SAMPLES):
                file.seek(max(size - _SAMPLED, 0) * number // (_SAMPLES - 1))
                found.update(file.read(_SAMPLED))
    return found.hexdigest()


def read_companions(source: Path, patterns: Sequence[str] = COMPANION_FILES) -> dict[str, bytes]:
    """Content of tokenizer files, chat templates and generation configuration that exist, by relative path."""
    files = (file for pattern in patterns for file in sorted(source.glob(pattern)) if file.is_file())
    return {str(file.relative_to(source)): file.read_bytes() for file in files}


def copy_companions(source: Path, target: Path, patterns: Sequence[str] = COMPANION_FILES) -> None:
    """Writes :func:`read_companions` to ``target``; what is there already stays."""
    for name, content in read_companions(source, patterns).items():
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)


def with_head(hf_config: dict[str, Any]) -> dict[str, Any]:
    """config.json content that names a model with its head, ``LlamaForCausalLM`` for ``LlamaModel``: an export has one,
    and some programs go by the name. The content itself where it names none without."""
    named = hf_config.get("architectures")
    if not isinstance(named, list) or not any(isinstance(name, str) and name.endswith("Model") for name in named):
        return hf_config
    whole = [f"{name.removesuffix('Model')}ForCausalLM" if str(name).endswith("Model") else name for name in named]
    return hf_config | {"architectures": whole}


def with_dtype(hf_config: dict[str, Any], name: str) -> dict[str, Any]:
    """config.json content that says of its weights that they are ``name`` ("bfloat16"), under each of the two keys
    that is there; ``dtype`` where none is. transformers reads ``dtype``, and before version 5 ``torch_dtype``."""
    keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["dtype"]
    return hf_config | dict.fromkeys(keys, name)
