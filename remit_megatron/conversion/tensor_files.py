"""safetensors files, a tensor at a time in both directions.

The format: length of the header (8 bytes, little endian), a JSON header (name -> dtype, shape, first and last byte
counted from the header's end), the bytes of the tensors without gaps.

Files are read, not mapped: pages of a mapped file count as memory of the process for as long as a tensor may use them,
and parallel file systems serve page faults slowly.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remit_megatron.conversion.weight_files import read_header, tensor_files
from remit_megatron.runtime.errors import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Also read, to be compared: no weight of a model that is trained here.
_READABLE = DTYPES | {"F64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class LazyTensor:
    """A tensor in a safetensors file; indexing by slices reads the rows that are asked for into memory of its own.

    Args:
        path: the file.
        name: for messages.
        start: where the header ends.
        entry: what the header says of the tensor.

    Attributes:
        zero_row: a row that reads as zeros, whatever the file holds; None for none.

    Raises:
        UserError: a dtype that weights do not have, or a shape that is not as large as its bytes.
    """

    def __init__(self, path: Path, name: str, start: int, entry: Mapping[str, Any]):
        if entry["dtype"] not in _READABLE:
            raise UserError(f"{path} {name}", f"dtype {entry['dtype']}", f"one of {', '.join(DTYPES)}")
        self.dtype = _READABLE[entry["dtype"]]
        self.shape: tuple[int, ...] = tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if first < 0 or last - first != self.nbytes:
            raise UserError(f"{path} {name}", f"{last - first} bytes at {first}", f"{self.nbytes}, for {self.shape}")
        self._path, self._start = path, start + first
        self.zero_row: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Tensor:
        rows, *others = index if isinstance(index, tuple) else (index,)
        first, last, step = rows.indices(self.shape[0])
        assert step == 1, "rows are read in one piece"
        part = torch.empty((max(0, last - first), *self.shape[1:]), dtype=self.dtype)
        if part.numel():
            self._fill(_bytes_of(part), self._start + first * (self.nbytes // self.shape[0]))
        if self.zero_row is not None and first <= self.zero_row < last:
            part[self.zero_row - first] = 0
        return part[(slice(None), *others)]

    def _fill(self, target: memoryview, position: int) -> None:
        with open(self._path, "rb", buffering=0) as file:
            while target:
                read = os.preadv(file.fileno(), [target], position)
                if not read:
                    raise UserError(str(self._path), f"no byte {position}", "a file that does not change while read")
                target, position = target[read:], position + read


class TensorFiles:
    """All tensors of a Hugging Face directory by name."""

    def __init__(self, directory: Path):
        self._paths = tensor_files(directory)
        self._headers = {path: read_header(path) for path in set(self._paths.values())}

    def names(self) -> set[str]:
        return set(self._paths)

    def __getitem__(self, name: str) -> LazyTensor:
        path = self._paths.get(name)
        if path is None:
            raise UserError("Hugging Face weights", f"no tensor {name}", "every weight that config.json implies")
        start, header = self._headers[path]
        return LazyTensor(path, name, start, header[name])


class TensorFileWriter:
    """One safetensors file whose tensors come one after the other, in any order, and go straight to their place.

    The bytes are those that ``safetensors.torch.save_file`` writes of the same tensors. A context manager: leaving it
    without an exception takes all tensors to have been written. Making the file durable is left to the caller.

    Args:
        path: must not exist.
        shapes: of every tensor by name.
        dtype: of all of them; float32, bfloat16 or float16.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], *, dtype: torch.dtype):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shapes):
            begin, end = end, end + torch.Size(shapes[name]).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._dtype, self._header, self._start = dtype, header, 8 + len(text)
        self._missing = set(shapes)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._put(memoryview(struct.pack("<Q", len(text)) + text), 0)
        os.truncate(self._descriptor, self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Rounds ``tensor`` to the file's dtype and writes it."""
        entry = self._header[name]
        assert name in self._missing and list(tensor.shape) == entry["shape"], name
        data = tensor.detach().to("cpu", self._dtype).contiguous()
        self._put(_bytes_of(data), self._start + entry["data_offsets"][0])
        self._missing.discard(name)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        os.close(self._descriptor)
        assert kind is not None or not self._missing, f"not written: {sorted(self._missing)[:3]}"

    def _put(self, data: memoryview, position: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, position)
            data, position = data[written:], position + written


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
