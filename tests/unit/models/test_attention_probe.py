"""The question a run asks of its attention before the first step, with attentions that are right and wrong."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch.nn.functional import scaled_dot_product_attention

from remit_megatron.models.attention_probe import LENGTHS, PARTS, packed_attention_errors, packed_attention_fault


class Distorted(torch.autograd.Function):
    """The same, with gradients multiplied for tokens from the second document on, as a kernel with wrong offsets."""

    @staticmethod
    def forward(ctx, tensor, first, factor):
        ctx.first, ctx.factor = first, factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, incoming):
        outgoing = incoming.clone()
        outgoing[ctx.first :] *= ctx.factor
        return outgoing, None, None


def stand_in(base: type = Attention, *, groups: int = 2, dtype: torch.dtype = torch.float32, **changes):
    """A Megatron attention with 4 heads of 24 channels, and torch's kernel for each document alone."""

    class StandIn(base):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = SimpleNamespace(
                attention_dropout=changes.get("dropout", 0.0),
                params_dtype=dtype,
                softmax_scale=None,
                v_head_dim=16,
                num_attention_heads=16,
                tensor_model_parallel_size=4,
            )
            # As Megatron has them for fewer groups than ranks, where a rank later takes its own of a group's heads.
            self.num_attention_heads_per_partition, self.num_query_groups_per_partition = 8, groups
            self.core_attention = torch.nn.Module()
            self.core_attention.current_max_attn_logits = torch.full((4,), 1.5)
            self.hidden_size_per_attention_head = self.q_head_dim = 24
            self.attn_mask_type = AttnMaskType.causal
            if base is MultiLatentAttention:
                self.softmax_scale = 0.31
            self.calls = 0

        def _run_core_attention(self, query, key, value, mask, *, attn_mask_type, packed_seq_params):
            assert mask is None and attn_mask_type == AttnMaskType.causal
            self.calls += 1
            torch.rand(1)  # as a kernel that takes a random state
            self.core_attention.current_max_attn_logits = torch.full((4,), 9.0)  # as with qk_clip
            starts = packed_seq_params.cu_seqlens_q.tolist()
            factors = changes.get("factors", {}) if self.calls >= changes.get("from_call", 1) else {}
            distorted = [
                Distorted.apply(t, starts[1], factors.get(n, 1.0))
                for n, t in zip("qkv", (query, key, value), strict=True)
            ]
            lengths = [after - before for before, after in pairwise(starts)]
            documents = zip(*(t.split(lengths) for t in distorted), strict=True)
            scale = changes.get("scale", getattr(self, "softmax_scale", None))
            outputs = [
                scaled_dot_product_attention(
                    *(t.transpose(0, 1).unsqueeze(0) for t in document), is_causal=True, scale=scale, enable_gqa=True
                )[0].transpose(0, 1)
                for document in documents
            ]
            return torch.cat(outputs).flatten(1)  # [t, heads * channels], as Transformer Engine

        get_query_key_value_tensors = None  # abstract, and not asked for

    return StandIn()


@pytest.mark.parametrize("base", [Attention, MultiLatentAttention])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_that_is_right_passes(base, dtype, largest):
    settings = {"groups": 4 if base is MultiLatentAttention else 2, "dtype": dtype}
    attention = stand_in(base, **settings)
    errors = packed_attention_errors(stand_in(base, **settings), LENGTHS[0], seed=1)
    assert tuple(errors) == PARTS and 0 < max(errors.values()) < largest
    chunks = [torch.nn.Linear(1, 1), torch.nn.Sequential(attention)]  # a stage may have no layer
    state = torch.get_rng_state()
    assert packed_attention_fault(chunks) is None
    assert attention.calls == len(LENGTHS)
    assert torch.equal(torch.get_rng_state(), state)
    assert attention.core_attention.current_max_attn_logits.eq(1.5).all()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"factors": {"q": 0.8}}, "gradient of queries"),
        ({"factors": {"k": 1.1}}, "gradient of keys"),
        ({"factors": {"v": 0.0}}, "gradient of values"),
        ({"factors": {"k": math.nan}}, "gradient of keys"),
        ({"factors": {"k": 0.8}, "from_call": 2}, "gradient of keys"),  # by what the first call has left behind
        ({"scale": 0.3}, "gradient of"),
    ],
)
def test_attention_that_is_wrong_is_named(changes, part):
    fault = packed_attention_fault([stand_in(**changes)])
    assert fault is not None and fault.startswith("data.document_mask: the ") and part in fault
    assert "4 heads of 24 and 24 channels" in fault and "megatron.transformer_impl=local" in fault and "\n" not in fault


def test_dropout_has_nothing_to_compare_with():
    attention = stand_in(dropout=0.1, factors={"q": 0.0})
    assert packed_attention_fault([attention]) is None and attention.calls == 0
