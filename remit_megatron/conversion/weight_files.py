"""Which files of a Hugging Face directory hold its weights: those that transformers takes, in its order.

That order (``_get_resolved_checkpoint_files`` of transformers 5): the file that config.json names as
``transformers_weights``, model.safetensors, the shards of model.safetensors.index.json, pickled weights. Of an index it
takes the names of the files only; what is in these is loaded, the last file first in right where two hold one name.
Where it finds nothing, and a single other safetensors file is there, that one is taken here.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.files import parse_json
from remit_megatron.runtime.whole_model import refuse_adapter

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
# Buffers that old files hold and that the architecture implies.
IMPLIED = re.compile(r"rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)$")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Beside a model's weights in many directories, and not the model: adapters, and the same weights under other names.
_BESIDE = ("adapter_model*.safetensors", "consolidated*.safetensors")


def tensor_files(directory: Path, field: str = "checkpoint") -> dict[str, Path]:
    """Name of every tensor in a Hugging Face directory -> the safetensors file that holds it.

    Headers and sizes of all files are checked, so a download that broke off is found before any work starts.

    Raises:
        UserError: no safetensors, a file of the index is missing, a file is damaged, or there is an adapter.
    """
    refuse_adapter(directory, field=field)
    named = _named_in_config(directory)
    if named is not None:
        return _indexed(named) if named.name.endswith(".index.json") else _held([named])
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        if index.is_file():
            _warn_of_stale(index)
        return _held([single])
    if index.is_file():
        return _indexed(index)
    return _held([_only_file(directory, field)])


def _named_in_config(directory: Path) -> Path | None:
    """The file that ``transformers_weights`` of config.json names."""
    path = directory / "config.json"
    try:
        name = parse_json(path.read_bytes()).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None  # whoever reads the configuration says so
    if name is None:
        return None
    expected = "a safetensors file or index in the directory"
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{path} transformers_weights", repr(name), expected)
    file = directory / name
    # By its name, as there: the files of a hub's cache are links that lead out of the folder.
    inside = os.path.abspath(file).startswith(os.path.join(os.path.abspath(directory), ""))
    if not inside or not file.is_file():
        raise UserError(f"{path} transformers_weights", f"{name}, which is not there", expected)
    return file


@cache
def _warn_of_stale(index: Path) -> None:
    """Once for each; an index of that one file is none of another model's."""
    try:
        files = {str(name) for name in parse_json(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        files = set()
    if files != {SINGLE}:
        logger.warning("%s is passed over, with its files: %s beside it comes first", index, SINGLE)


def _only_file(directory: Path, field: str) -> Path:
    pickled = [name for name in _PICKLED if (directory / name).is_file()]
    everything = sorted(directory.glob("*.safetensors"))
    beside = {path for pattern in _BESIDE for path in directory.glob(pattern)}
    files = [path for path in everything if path not in beside]
    if pickled:
        before = f", which transformers takes before {files[0].name}" if files else ""
        expected = f"{SINGLE} (pickled weights are not read: they can run code)"
        raise UserError(field, f"only {pickled[0]}{before} in {directory}", expected)
    if len(files) == 1:
        return files[0]
    if files:
        found = f"{len(files)} safetensors files and no {INDEX} in {directory}"
        raise UserError(field, found, f"{SINGLE}, or one file, or the index")
    legacy = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    names = [path.name for path in everything] or legacy
    found = f"only {', '.join(names)}" if names else "no weights"
    expected = f"{SINGLE}, or {INDEX} with its files" if everything else "*.safetensors"
    raise UserError(field, f"{found} in {directory}", f"{expected} (pickled weights are not read: they can run code)")


def _held(files: Iterable[Path]) -> dict[str, Path]:
    return {name: file for file in files for name in read_header(file)[1]}


def _indexed(index: Path) -> dict[str, Path]:
    try:
        weight_map = parse_json(index.read_bytes())["weight_map"]
        wanted = {name: index.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(index), f"{type(error).__name__}: {error}", "JSON with a weight_map") from None
    files = sorted(set(wanted.values()))
    for file in files:
        try:
            there = file.is_file()
        except OSError:  # a name that is too long, or a folder that may not be entered
            there = False
        if not there:
            name = file.name if len(file.name) <= 80 else show(file.name)
            raise UserError(str(index), f"{name}, which is not there", "every file that the index names")
    held = _held(files)
    for name, file in sorted(wanted.items()):
        # An index may be older than its files: a buffer is not needed, nor is the head of a tied model.
        if name not in held and name != HEAD and not IMPLIED.search(name):
            raise UserError(str(file), f"no tensor {name}", "the tensors that the index puts there")
    return held


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file starts, and the header's entry of every tensor: 8 bytes of header length,
    JSON, data without gaps.

    Raises:
        UserError: the header cannot be read or says what none can, or the file is not as long as it says.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = parse_json(stream.read(length), object_pairs_hook=_each_once)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # to the library, null is none
        if any(not isinstance(text, str) for text in metadata.values()):
            raise ValueError(f"__metadata__ {show(metadata)}")
        end = 8 + length + _check_entries(header)
        if end != size:
            raise ValueError(f"{size} bytes where the header speaks of {end}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(str(file), f"{error}", "a whole safetensors file") from None
    return 8 + length, header


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which the library takes no name twice and Python the last of them."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError(f"a name twice in {show([name for name, _ in pairs])}")
    return content


def _check_entries(header: dict[str, Any]) -> int:
    """Bytes of all tensors, which lie one behind the other. The rules are those of the safetensors library.

    Raises:
        ValueError: an entry that is none, or tensors with a gap or an overlap between them.
    """
    places = []
    for name, entry in header.items():
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            raise ValueError(f"dtype {show(dtype)} of {name}")
        # A negative offset is refused by name where the tensor is read.
        for what, numbers, lowest in (("shape", shape, 0), ("data_offsets", offsets, -(2**63))):
            whole = isinstance(numbers, list) and all(type(n) is int and lowest <= n < 2**63 for n in numbers)
            if not whole or (what == "data_offsets" and len(numbers) != 2):
                raise ValueError(f"{what} {show(numbers)} of {name}")
        places.append((*offsets, name))
    end = 0
    for first, last, name in sorted(places):
        if 0 <= first != end or last < first:
            raise ValueError(f"{name} in bytes {first} to {last} where byte {end} comes next")
        end = last
    return end
