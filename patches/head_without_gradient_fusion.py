"""Weight gradients fused into the buffer by Transformer Engine's layers, where the output layer cannot.

Target    megatron-core 0.19.2, megatron.core.tensor_parallel.layers.ColumnParallelLinear.__init__
Why       With `gradient_accumulation_fusion` Transformer Engine's layers add each weight's gradient to the float32
          buffer inside the matrix product: no 16-bit gradient is written, read and added. They need nothing for it.
          The output layer, Megatron's own, needs an extension of apex, and raises where that is not installed: the
          whole model then goes without.
Test      tests/unit/models/test_gradient_fusion.py::test_the_output_layer_goes_without
Upstream  not reported; the code is the same on main at d98e8a6
Drop when ColumnParallelLinear falls back to the plain gradient where the extension is missing

Such a layer is built as if the fusion were off; its gradient reaches the buffer by DistributedDataParallel's hook, as
that of a norm does. A run of the local layers, which are all of this kind, is refused with the setting
(remit_megatron/run/megatron_args.py), so that it is never accepted and not done.
"""

from __future__ import annotations

import functools

from patches import Patch


def _install() -> None:
    from megatron.core.tensor_parallel import layers

    original = layers.ColumnParallelLinear.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        available = layers._grad_accum_fusion_available
        layers._grad_accum_fusion_available = True  # or it raises
        try:
            original(self, *args, **kwargs)
        finally:
            layers._grad_accum_fusion_available = available
        if not available:
            self.gradient_accumulation_fusion = False

    layers.ColumnParallelLinear.__init__ = __init__


PATCH = Patch(
    name="head_without_gradient_fusion",
    target="megatron.core.tensor_parallel.layers.ColumnParallelLinear.__init__",
    package="megatron-core",
    versions=("0.19.2",),
    why="the output layer refuses the fusion of weight gradients that Transformer Engine's layers do",
    test="tests/unit/models/test_gradient_fusion.py::test_the_output_layer_goes_without",
    upstream="not reported; the code is the same on main at d98e8a6",
    drop_when="ColumnParallelLinear falls back to the plain gradient where the extension is missing",
    install=_install,
)
