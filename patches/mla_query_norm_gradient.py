"""Multi-latent attention under tensor parallelism: the gradient of the query norm is not multiplied by the ranks.

Target    megatron-core 0.19.2,
          megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads
Why       With ``qk_layernorm``, gradients of parameters whose names hold ``q_layernorm`` or ``k_layernorm`` are summed
          over tensor-parallel ranks. That is right where each rank norms its own heads. The query norm of multi-latent
          attention has the same name and norms the latent, which all ranks hold whole: the column-parallel projection
          behind it has summed its gradient already, and the sum multiplies it by the number of ranks. Under sequence
          parallelism a rank sees a part of the tokens and the sum is right; the parameter is marked for it, as the
          norm of keys and values is, whose name does not match.
Test      tests/distributed/models/test_latent.py::test_gradient_of_the_query_norm
Upstream  not reported; the code is the same on main at d98e8a6
Drop when finalize_model_grads tells norms of heads from norms of a latent by something else than the name
"""

from __future__ import annotations

import copy
import functools
import importlib

from patches import Patch


def _install() -> None:
    # The package has a function of the module's name; only the import system still knows the module.
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    original = module._allreduce_non_tensor_model_parallel_grads

    @functools.wraps(original)
    def _allreduce_non_tensor_model_parallel_grads(model, config, tp_group=None):
        if config.multi_latent_attention and config.qk_layernorm:
            config = copy.copy(config)
            config.qk_layernorm = False  # read for the rule by name only; the marks on parameters stay in force
        return original(model, config, tp_group)

    module._allreduce_non_tensor_model_parallel_grads = _allreduce_non_tensor_model_parallel_grads


PATCH = Patch(
    name="mla_query_norm_gradient",
    target="megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads",
    package="megatron-core",
    versions=("0.19.2",),
    why="the query norm of multi-latent attention is taken for a norm of heads by its name: TP times its gradient",
    test="tests/distributed/models/test_latent.py::test_gradient_of_the_query_norm",
    upstream="not reported; the code is the same on main at d98e8a6",
    drop_when="norms of heads are told from norms of a latent by something else than the name",
    install=_install,
)
