"""Megatron's optimizer on a machine without a GPU that has Transformer Engine or apex.

Target    megatron-core 0.19.2, megatron.core.optimizer (.clip_grads, .optimizer, .distrib_optimizer),
          megatron.training.utils.common_utils
Why       Where one of the two is installed, Megatron takes its fused Adam and its kernels for norms and scaling, which
          work on GPUs only: NVIDIA's image without a GPU, or with its GPUs hidden, could not train on the CPU.
Test      tests/te/test_cpu_training.py::test_a_run_on_the_cpu_beside_transformer_engine
Upstream  not reported; see cpu_device
Drop when cpu_device is dropped

They become what Megatron takes where neither is installed: torch's optimizers and its own local functions.
"""

from __future__ import annotations

import importlib.util

import torch

from patches import Patch


def _install() -> None:
    import megatron.core.optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.training.utils import common_utils

    optimizers.Adam, optimizers.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizers.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None
    common_utils.multi_tensor_l2norm = utils.local_multi_tensor_l2_norm
    for module in (clip_grads, optimizer, common_utils):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
    for module in (clip_grads, optimizer):
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def _fused_without_a_gpu() -> bool:
    if torch.cuda.is_available():
        return False
    return any(importlib.util.find_spec(name) is not None for name in ("transformer_engine", "apex"))


PATCH = Patch(
    name="cpu_optimizer",
    target="megatron.core.optimizer, megatron.training.utils.common_utils",
    package="megatron-core",
    versions=("0.19.2",),
    why="the optimizers of Transformer Engine and apex, which Megatron takes where it finds them, need a GPU",
    test="tests/te/test_cpu_training.py::test_a_run_on_the_cpu_beside_transformer_engine",
    upstream="not reported; see cpu_device",
    drop_when="cpu_device is dropped",
    install=_install,
    needed=_fused_without_a_gpu,
)
