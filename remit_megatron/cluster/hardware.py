"""GPUs that a plan can be made for."""

from __future__ import annotations

from dataclasses import dataclass

from remit_megatron.runtime.errors import UserError, did_you_mean
from remit_megatron.training.metrics import peak_flops

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, as its data sheet has it.

    Attributes:
        name: as in the table of peaks.
        flops: dense bf16 peak, FLOP/s.
        memory: bytes.
        link: bytes a second to the other GPUs of the node, in one direction.
        network: bytes a second to other nodes; a network card of its own for every GPU.
    """

    name: str
    flops: float
    memory: int
    link: float
    network: float


# name: memory in GiB, NVLink GB/s in one direction, network GB/s (200, 400 or 800 Gb/s).
_GPUS = {
    "H100": (80, 450, 50),
    "H200": (140, 450, 50),
    "H800": (80, 200, 50),
    "GH200": (94, 450, 50),
    "A100": (80, 300, 25),
    "B200": (178, 900, 50),
}


def gpu_named(name: str, *, memory_gib: float | None = None) -> Gpu:
    """A GPU of the table, with another amount of memory where one is given.

    Raises:
        UserError: no such GPU, or no memory.
    """
    key = name.upper()
    if key not in _GPUS:
        raise UserError("--gpu", name, f"one of {', '.join(sorted(_GPUS))}{did_you_mean(key, list(_GPUS))}")
    memory, link, network = _GPUS[key]
    if memory_gib is not None:
        if not memory_gib > 0:
            raise UserError("--gpu-memory", memory_gib, "GiB, more than 0")
        memory = memory_gib
    flops = peak_flops(key)
    assert flops is not None
    return Gpu(key, flops, int(memory * GIB), link * 1e9, network * 1e9)
