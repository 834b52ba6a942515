"""A process that answers Transformer Engine and Megatron as one with an H100 would, and computes on the CPU."""

from __future__ import annotations

import os
import sys
from types import FrameType, SimpleNamespace
from typing import Any

# Who is told that there is a GPU: those who would not build Transformer Engine's layers without one. Everybody else
# (torch, our own choice of a device) gets the truth.
_TOLD = ("megatron.", "transformer_engine.", "remit_megatron.models.spec")
_done = False


def _asks(frame: FrameType, *modules: str) -> bool:
    """Whether the code that runs in a frame belongs to one of these modules."""
    return frame.f_globals.get("__name__", "").startswith(modules)


def activate() -> None:
    """Applies the patches, stands in for the device and for its kernels; once for a process.

    What an earlier model has told Transformer Engine about its attention, in the environment, is forgotten.
    """
    global _done
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    if _done:
        return
    os.environ |= {"NVTE_MASKED_SOFTMAX_FUSION": "0", "NVTE_TORCH_COMPILE": "0"}
    import patches
    from tests.te import extension

    extension.load()  # before Megatron imports it
    patches.apply()
    import torch
    import transformer_engine.pytorch  # type: ignore[import-not-found]  # noqa: F401

    truth = torch.cuda.is_available

    def is_available() -> bool:
        return truth() or _asks(sys._getframe(1), *_TOLD)

    answers: dict[str, Any] = {
        "is_available": is_available,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="NVIDIA H100, stood in for", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
        ),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    on_gpu: Any = torch.Tensor.is_cuda
    # What it is asked for by Transformer Engine's modules of their inputs.
    torch.Tensor.is_cuda = property(  # type: ignore[assignment]
        lambda tensor: on_gpu.__get__(tensor) or _asks(sys._getframe(1), "transformer_engine.")
    )

    from tests.te import kernels

    kernels.install()
    _done = True
