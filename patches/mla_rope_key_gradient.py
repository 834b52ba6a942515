"""Multi-latent attention under tensor parallelism: the gradient of the shared rotary key is summed over the ranks.

Target    megatron-core 0.19.2, megatron.core.transformer.multi_latent_attention.MLASelfAttention._qkv_down_projection
Why       All heads share one rotary key, each rank uses it for its own heads, and so each holds a part of its gradient.
          The latent next to it is summed by the up projection behind it; the rotary key has nothing behind it, and goes
          back unsummed. With Megatron's own column-parallel down projection that is so with and without sequence
          parallelism, with Transformer Engine's duplicated one without it. Logits and loss are right; the gradients of
          everything before the rotary key are wrong, and copies of weights drift apart.
Test      tests/distributed/models/test_latent.py::test_gradient_of_the_shared_rotary_key
Upstream  not reported; the code is the same on main at d98e8a6
Drop when the rotary key enters MLASelfAttention's tensor-parallel region through a copy whose backward sums

The down projection gives its whole output here. Under sequence parallelism that output is cut along the sequence, as
Transformer Engine's is, and Megatron gathers the rotary key itself, which sums its gradient. FusedMLASelfAttention has
a down projection of its own, which is left as it is; no layer of ours uses it.
"""

from __future__ import annotations

import functools

from patches import Patch


def _install() -> None:
    import torch
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_tensor_model_parallel_region,
        scatter_to_sequence_parallel_region,
    )
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.utils import get_pg_size

    original = MLASelfAttention._qkv_down_projection

    @functools.wraps(original)
    def _qkv_down_projection(self, hidden_states):
        query, key_value = original(self, hidden_states)
        if get_pg_size(self.tp_group) == 1:
            return query, key_value
        config, group = self.config, self.tp_group
        widths = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        if key_value.size(-1) != sum(widths):
            key_value = gather_from_tensor_model_parallel_region(key_value, group=group)
            if config.sequence_parallel:
                key_value = scatter_to_sequence_parallel_region(key_value, group=group)
        if config.sequence_parallel:
            return query, key_value
        latent, rope_key = key_value.split(widths, dim=-1)
        return query, torch.cat([latent, copy_to_tensor_model_parallel_region(rope_key, group=group)], dim=-1)

    MLASelfAttention._qkv_down_projection = _qkv_down_projection


PATCH = Patch(
    name="mla_rope_key_gradient",
    target="megatron.core.transformer.multi_latent_attention.MLASelfAttention._qkv_down_projection",
    package="megatron-core",
    versions=("0.19.2",),
    why="under tensor parallelism the gradient of the rotary key that all heads share is not summed over the ranks",
    test="tests/distributed/models/test_latent.py::test_gradient_of_the_shared_rotary_key",
    upstream="not reported; the code is the same on main at d98e8a6",
    drop_when="the rotary key enters the tensor-parallel region through a copy whose backward sums",
    install=_install,
    note="FusedMLASelfAttention is not reached; no layer here uses it",
)
