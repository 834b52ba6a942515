"""Megatron on a machine without a GPU.

Target    torch 2.13: torch.cuda, tensor factories, Tensor.to/.cuda/.type
Why       Megatron asks CUDA for its device, streams, events, random state and memory, and names "cuda" in factories.
          Here each of these questions is answered by the CPU, so that the same training loop runs, is tested and is
          learned on any machine. It is not a simulation of speed.
Test      tests/distributed/training/test_training.py::test_ntp_equals_megatron_loss
Upstream  not reported; Megatron-Core states that it needs CUDA
Drop when Megatron takes its device from torch.accelerator

Only on machines without a GPU. What is redirected, symbol by symbol:

  torch.cuda.current_device / set_device / synchronize / empty_cache / ...   answered or ignored (see ``_ANSWERS``)
  torch.cuda.is_available / device_count     "yes, one" when Megatron asks; the truth for everybody else, because
                                             torch and transformers choose code paths by them
  torch.cuda.Stream / Event / stream / current_stream / default_stream / set_stream    order is program order on a CPU
  torch.cuda random state                    the CPU generator's (see also cpu_random)
  tensor factories, Tensor.to/.cuda/.new_*, Module.cuda/.to      device "cuda" (or an index) means the CPU
  pin_memory                                 no: there is no device that would read past the CPU
  Tensor.type()                              Megatron's optimizers compare it with "torch.cuda.FloatTensor"
  torch.compile (torch._dynamo)              off: no compiler is needed for correctness, and starting one takes longer
                                             than the runs that this device is for
  CUDA_DEVICE_MAX_CONNECTIONS=1              validated by Megatron with tensor parallelism; without meaning here

Wrapping the factories costs nothing on other calls; a TorchFunctionMode would add a Python frame to every tensor
operation and is thread-local, so that a checkpointing or data thread would not see it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections import defaultdict
from typing import Any

import torch

from patches import Patch

_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    """Whether a device argument means "the GPU": an index, "cuda...", torch.device("cuda", ...)."""
    if isinstance(device, bool) or device is None:
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _keyword_device(function):
    """A factory whose ``device`` keyword is redirected."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # there is no device that would read it past the CPU
        return function(*args, **kwargs)

    return wrapper


def _any_device(function):
    """``.to``-like: the device may also come first. An index there is a device only for ``.to`` and ``.cuda``."""

    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(self, *args, **kwargs)

    return wrapper


def _tensor_cuda(self, device=None, non_blocking=False, **_):
    return self


def _module_cuda(self, device=None):
    return self


class _Stream:
    """A CUDA stream on a machine that has none: everything is in program order already."""

    cuda_stream = 0
    device = _CPU
    device_index = 0

    def __init__(self, *_, **__): ...

    @classmethod
    def priority_range(cls):
        return (0, 0)

    def synchronize(self): ...
    def wait_stream(self, stream): ...
    def wait_event(self, event): ...
    def query(self):
        return True

    def record_event(self, event=None):
        event = event or _Event()
        event.record()
        return event

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class _Event:
    """A CUDA event: remembers when it was recorded."""

    def __init__(self, *_, **__):
        self._time = 0.0

    def record(self, stream=None):
        self._time = time.perf_counter()

    def elapsed_time(self, other) -> float:
        """Milliseconds, as CUDA events give them."""
        return 1000 * (other._time - self._time)

    def synchronize(self): ...
    def wait(self, stream=None): ...
    def query(self):
        return True


class _Properties:
    """What Megatron reads of a device's properties."""

    name = "cpu"
    major, minor = 0, 0
    multi_processor_count = os.cpu_count() or 1
    total_memory = 0


_STREAM = _Stream()


def _asked_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.")


def _available(truth=torch.cuda.is_available) -> bool:
    return True if _asked_by_megatron() else truth()


def _count(truth=torch.cuda.device_count) -> int:
    return 1 if _asked_by_megatron() else truth()


def _get_rng_state(device=None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state, device=None, graph_safe=False) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed) -> None:
    # torch.manual_seed also seeds CUDA: calling it here would recurse.
    torch.default_generator.manual_seed(int(seed))


_ANSWERS = {
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "device_memory_used": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_stats": lambda device=None: defaultdict(int),
    "mem_get_info": lambda device=None: (0, 0),
    "get_device_properties": lambda device=None: _Properties(),
    "get_device_name": lambda device=None: "cpu",
    "get_device_capability": lambda device=None: (0, 0),
    "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM,
    "set_stream": lambda stream: None,
    "stream": lambda stream=None: contextlib.nullcontext(),
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": _manual_seed,
    "manual_seed_all": _manual_seed,
    "_lazy_init": lambda: None,
    "Stream": _Stream,
    "Event": _Event,
    "is_available": _available,
    "device_count": _count,
}


def _redirect_cuda_module() -> None:
    for name, answer in _ANSWERS.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.random.set_rng_state = _set_rng_state
    torch.cuda.random.manual_seed = _manual_seed


def _redirect_factories() -> None:
    from torch.utils._device import _device_constructors

    for constructor in _device_constructors():
        owner = getattr(torch, constructor.__name__, None)
        if owner is constructor:
            setattr(torch, constructor.__name__, _keyword_device(constructor))
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"):
        setattr(torch, name, _keyword_device(getattr(torch, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(torch.Tensor, name, _keyword_device(getattr(torch.Tensor, name)))
    torch.Tensor.to = _any_device(torch.Tensor.to)
    torch.Tensor.cuda = _tensor_cuda
    torch.Tensor.pin_memory = _tensor_cuda
    torch.nn.Module.to = _any_device(torch.nn.Module.to)
    torch.nn.Module.cuda = _module_cuda

    original_type = torch.Tensor.type

    def tensor_type(self, dtype=None, non_blocking=False, **kwargs):
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.", 1)
        return original_type(self, dtype, non_blocking, **kwargs)

    torch.Tensor.type = tensor_type


def _install() -> None:
    # Before anything that imports it: torch.compile decorates Megatron's functions at import.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _redirect_cuda_module()
    _redirect_factories()


def _no_gpu() -> bool:
    return not torch.cuda.is_available()


PATCH = Patch(
    name="cpu_device",
    target="torch.cuda, tensor factories, Tensor.to/.cuda/.type",
    package="torch",
    versions=("2.13",),
    why="Megatron names CUDA wherever it needs a device; without a GPU the CPU answers",
    test="tests/distributed/training/test_training.py::test_ntp_equals_megatron_loss",
    upstream="not reported: Megatron-Core states that it needs CUDA",
    drop_when="Megatron takes its device from torch.accelerator",
    install=_install,
    needed=_no_gpu,
    note="not a simulation of speed; CUDA graphs, NCCL and fused kernels are out of its reach",
)
