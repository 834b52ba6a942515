"""Where weights come from: a Hugging Face directory, or a checkpoint of ours, and what each of them holds."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from remit_megatron.runtime.checkpoints import (
    MANIFEST,
    DamagedCheckpoint,
    iteration_directory,
    iterations,
    newest_complete,
    read_manifest,
    verify,
)
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import HF_SUBFOLDER, sha256_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What travels with the weights through import, training and export.
COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json")
_INDEX = "model.safetensors.index.json"


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
    if (path / MANIFEST).exists() or (path / HF_SUBFOLDER).is_dir() or (path / ".metadata").exists():
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
        iteration=int(manifest.properties.get("iteration", 0)),
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
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(field, f"no {path}", "the model's config.json") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"no JSON ({error})", "the model's configuration") from None
    if not isinstance(config, dict):
        raise UserError(str(path), type(config).__name__, "a JSON object")
    if config.get("quantization_config"):
        raise UserError(
            f"{path} quantization_config", config["quantization_config"], "none: plain floating-point weights"
        )
    return config


def tensor_files(directory: Path, field: str = "checkpoint") -> dict[str, Path]:
    """Name of every tensor in a Hugging Face directory -> the safetensors file that holds it.

    Headers and sizes of all files are checked, so a download that broke off is found before any work starts.

    Raises:
        UserError: no safetensors, a file of the index is missing, or a file is damaged.
    """
    index = directory / _INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            legacy = sorted(
                path.name for path in (*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth"))
            )
            found = f"only {', '.join(legacy)}" if legacy else "no weights"
            raise UserError(
                field, f"{found} in {directory}", "*.safetensors (pickled weights are not read: they can run code)"
            )
        if len(files) > 1:
            raise UserError(
                field, f"{len(files)} safetensors files and no {_INDEX} in {directory}", "one file, or the index"
            )
        return dict.fromkeys(read_header(files[0])[1], files[0])
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        wanted = {name: directory / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(index), f"{type(error).__name__}: {error}", "JSON with a weight_map") from None
    for file in sorted(set(wanted.values())):
        if not file.is_file():
            raise UserError(str(index), f"{file.name}, which is not there", "every file that the index names")
        _, held = read_header(file)
        for name in sorted(name for name, holder in wanted.items() if holder == file):
            if name not in held:
                raise UserError(str(file), f"no tensor {name}", "the tensors that the index puts there")
    return wanted


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file starts, and the header's entry of every tensor: 8 bytes of header length,
    JSON, data without gaps.

    Raises:
        UserError: the header cannot be read, or the file is not as long as it says.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if end != size:
            raise ValueError(f"{size} bytes where the header speaks of {end}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(str(file), f"{error}", "a whole safetensors file") from None
    return 8 + length, header


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
