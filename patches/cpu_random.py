"""Megatron's random states on a machine without a GPU.

Target    megatron-core 0.19.2, megatron.core.tensor_parallel.random._set_cuda_rng_state, ._get_cuda_rng_state
Why       They reach past torch.cuda's functions into torch.cuda.default_generators, which is empty without a GPU. The
          tracker also warns that "CPU RNG state changed within GPU RNG context", which is the point here.
Test      tests/unit/test_patches.py::test_random_states_fork_on_the_cpu
Upstream  not reported; see cpu_device
Drop when cpu_device is dropped
"""

from __future__ import annotations

import logging

import torch

from patches import Patch


def _install() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def set_cuda_rng_state(new_state, device=-1, graph_safe=False) -> None:
        torch.set_rng_state(new_state)

    def get_cuda_rng_state(device="cuda", clone=False, graph_safe=False) -> torch.Tensor:
        return torch.get_rng_state()

    megatron_random._set_cuda_rng_state = set_cuda_rng_state
    megatron_random._get_cuda_rng_state = get_cuda_rng_state
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


def _no_gpu() -> bool:
    # cpu_device is in force by now, and tells this module the truth.
    return not torch.cuda.is_available()


PATCH = Patch(
    name="cpu_random",
    target="megatron.core.tensor_parallel.random._set_cuda_rng_state, ._get_cuda_rng_state",
    package="megatron-core",
    versions=("0.19.2",),
    why="they use torch.cuda.default_generators, which is empty without a GPU",
    test="tests/unit/test_patches.py::test_random_states_fork_on_the_cpu",
    upstream="not reported",
    drop_when="cpu_device is dropped",
    install=_install,
    needed=_no_gpu,
)
