"""`transformer_engine_torch` without a compiler: its types, for Transformer Engine's Python to run on.

The library's Python comes from PyPI as it is; its compiled part has to be built for each torch, which takes an hour on
two cores. On a machine without a GPU nothing of that part can run but its enumerations, so that this module holds them
and the functions of tests/te/kernels.py, and stands for the rest: any other kernel that is called raises.
Where the compiled part is installed (./scripts/te_on_cpu.sh DIR --compiled) it is used, and this file is not.
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import sys
import warnings
from types import ModuleType
from typing import Any

from tests.te.kernels import KERNELS

# Enumerations and their members, in the order of transformer_engine.h, fused_attn.h and comm_gemm_overlap.h.
_ENUMERATIONS = {
    "DType": "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK "
    "NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTE_QKV_Format": "NVTE_BSHD NVTE_SBHD NVTE_THD NVTE_SBHD_2BSHD NVTE_BSHD_2SBHD NVTE_THD_2BSHD NVTE_THD_2SBHD "
    "NVTE_BHSD NVTE_QKV_Format_NOT_SET",
    "NVTE_QKV_Layout": "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD "
    "NVTE_BSH3D NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D "
    "NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD "
    "NVTE_Paged_KV_BSHD_BSHD_BSHD NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD "
    "NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD "
    "NVTE_QKV_Layout_NOT_SET",
    "NVTE_Fused_Attn_Backend": "NVTE_F16_arbitrary_seqlen NVTE_FP8 NVTE_No_Backend",
    "NVTEScalingMode": "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D NVTE_BLOCK_SCALING_2D "
    "NVTE_NVFP4_1D_SCALING NVTE_INVALID_SCALING",
    "NVTERoutingMapFormat": "BYTEMAP BITMAP_U8",
    "NVTEQBHistogramMode": "TWO_KERNEL FUSED_ATOMIC",
    "Float8BlockScaleTensorFormat": "GEMM_READY COMPACT INVALID",
    "CommOverlapType": "RS AG",
    "CommOverlapAlgo": "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS "
    "SPLIT_PIPELINED_RS_P2P ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG",
    "FP8FwdTensors": "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT "
    "GEMM3_WEIGHT GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
}
_CLASSES = ("FP8TensorMeta", "CommOverlapHelper", "CommOverlap", "CommOverlapP2P", "CommOverlapCore")
# What is asked while the library is imported: cuDNN 9.20, no user buffers.
_ANSWERS = {"get_cudnn_version": 92000, "ubuf_built_with_mpi": False, "device_supports_multicast": False}


class _Extension(ModuleType):
    """A module in which every other name is a kernel that cannot run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"transformer_engine_torch.{name}: found a machine without a GPU")

        kernel.__name__ = kernel.__qualname__ = name
        setattr(self, name, kernel)
        return kernel


def make() -> ModuleType:
    """The module."""
    module: Any = _Extension("transformer_engine_torch", __doc__)
    for name, members in _ENUMERATIONS.items():
        setattr(module, name, enum.IntEnum(name, members.split(), start=0))
    for name in _CLASSES:
        setattr(module, name, type(name, (), {}))
    for name, answer in _ANSWERS.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    for name, function in KERNELS.items():  # with the import: the library takes all names of this module
        setattr(module, name, function)
    return module


def compiled() -> bool:
    """Whether the library's own compiled part is installed."""
    try:
        importlib.metadata.version("transformer-engine-torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load() -> None:
    """Imports Transformer Engine on this module, in a process that has not imported it."""
    if compiled():
        return
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the library's own word for: load no CUDA library while importing
    sys.modules["transformer_engine_torch"] = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that there is no compiled part
        import transformer_engine.common as common  # type: ignore[import-not-found]
    common.load_framework_extension = lambda framework: None
