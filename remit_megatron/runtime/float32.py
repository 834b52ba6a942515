"""Float32 products that are float32: NVIDIA's image lets torch round their operands to the 10 bits of TF32.

The one place that says so, without importing torch: every command passes it first (``cli.py``), and every rank again
when it joins its job. Transformer Engine rounds so on its own; float32 models are made of the local layers.
"""

from __future__ import annotations

import os
import sys

_SWITCH = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"


def exact_float32() -> None:
    """Switches TF32 off in this process and in those that it starts, whether they have imported torch or will.

    What a user asks TRL or torch for later (``tf32: true`` of a post-training file) still counts. Convolutions, which
    no variable speaks of, are switched off where torch is there.
    """
    os.environ[_SWITCH] = "0"  # read by torch when it is loaded
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
