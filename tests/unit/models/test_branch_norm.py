"""OLMo 2's layer: what it is made of, with the local modules and with Transformer Engine's, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patches

patches.apply()

from megatron.core.extensions import transformer_engine as te  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402

from remit_megatron.conversion.processes import process_groups  # noqa: E402
from remit_megatron.models.attention import ScaledDotProductAttention  # noqa: E402
from remit_megatron.models.branch_norm import branch_norm_layer  # noqa: E402
from remit_megatron.models.build import build_chunks, default_arguments, model_config, unwrap  # noqa: E402
from remit_megatron.models.family import family_of  # noqa: E402
from remit_megatron.models.norm import RMSNorm  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.families import hf_values  # noqa: E402

VALUES = hf_values("olmo2-gqa_6_2_tied")


class Column(ColumnParallelLinear):
    """Stands for Transformer Engine's; takes what Megatron's local one takes."""


class Row(RowParallelLinear):
    """Stands for Transformer Engine's."""


class Attention(ScaledDotProductAttention):
    """Stands for Transformer Engine's."""


class Norm(RMSNorm):
    """Stands for Transformer Engine's."""


@pytest.fixture
def stubs(monkeypatch):
    """Transformer Engine's modules, where it is not installed."""
    names = {
        "TEColumnParallelLinear": Column,
        "TERowParallelLinear": Row,
        "TEDotProductAttention": Attention,
        "TENorm": Norm,
    }
    for name, stub in names.items():
        assert hasattr(te, name)
        monkeypatch.setattr(te, name, stub)


def configuration(**changes: Any) -> Any:
    config = model_config(VALUES, default_arguments()).transformer
    for name, value in changes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


def test_the_layer_of_transformer_engine(stubs):
    config = configuration(transformer_impl="transformer_engine")
    with process_groups(alone=True) as groups:
        layer = build_module(branch_norm_layer(config), config=config, pg_collection=groups)
        kinds = {name: type(module) for name, module in layer.named_modules()}
    expected = {
        "input_layernorm": IdentityOp,
        "self_attention.linear_qkv": Column,
        "self_attention.core_attention": Attention,
        "self_attention.linear_proj": Row,
        "self_attention.post_norm": Norm,
        "pre_mlp_layernorm": IdentityOp,
        "mlp.linear_fc1": Column,
        "mlp.linear_fc2": Row,
        "mlp.post_norm": Norm,
    }
    assert {name: kinds[name] for name in expected} == expected
    # A new module of ours would need a name in the table of weights.
    table = family_of(VALUES).names(VALUES)
    assert {name for name, _ in layer.named_parameters()} == {weight.te for weight in table.layer}


def test_names_and_shapes_of_the_local_model():
    with process_groups(alone=True) as groups:
        (chunk,) = build_chunks(model_config(VALUES, default_arguments()), groups)
        parameters = dict(unwrap(chunk).decoder.layers[0].named_parameters())
    table = family_of(VALUES).names(VALUES)
    assert parameters.keys() == {weight.local for weight in table.layer}
    assert parameters["self_attention.q_norm.weight"].shape == (6 * 8,)
    assert parameters["self_attention.k_norm.weight"].shape == (2 * 8,), "as many as key heads have, not query heads"
    # Megatron sums gradients of parameters with these names over tensor-parallel ranks; ours are sharded.
    assert not [name for name in parameters if "q_layernorm" in name or "k_layernorm" in name]


def test_an_evaluation_keeps_nothing():
    """Megatron adds residuals with gradients enabled, in an evaluation too; the norms must not be part of that."""
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with process_groups(alone=True) as groups:
        (chunk,) = build_chunks(model_config(VALUES, default_arguments()), groups, initialize=True)
        chunk.train().requires_grad_(True)
        ids, positions = torch.arange(12)[None], torch.arange(12)[None]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.no_grad():
                chunk(ids, positions, None)
            assert kept == []
            chunk(ids, positions, None)
        assert len(kept) > 10, "with gradients there is something to keep"


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"tensor_model_parallel_size": 4}, "tensor_model_parallel_size"), ({"tensor_model_parallel_size": 3}, "tensor_")],
)
def test_ranks_that_share_a_key_head_are_refused(changes, field):
    with pytest.raises(UserError, match="divisor of the 2 key/value heads") as caught:
        branch_norm_layer(configuration(**changes))
    assert field in caught.value.field


@pytest.mark.parametrize("name", ["qk_layernorm", "fused_single_qkv_rope", "attention_output_gate"])
def test_parts_that_leave_no_place_for_the_norms_are_refused(name):
    config = configuration(**{name: True})
    with process_groups(alone=True) as groups, pytest.raises(ValueError, match=f"{name}: found True"):
        build_module(branch_norm_layer(config), config=config, pg_collection=groups)
