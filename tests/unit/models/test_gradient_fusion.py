"""Weight gradients that Transformer Engine's layers add to the buffer: what is left for the output layer. That the
layers do it is in tests/te/test_step.py."""

from __future__ import annotations

import pytest
import torch

import patches

patches.apply()

from megatron.core.tensor_parallel import layers  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from remit_megatron.conversion.processes import process_groups  # noqa: E402


@pytest.mark.skipif(layers._grad_accum_fusion_available, reason="apex's extension is installed")
def test_the_output_layer_goes_without():
    config = TransformerConfig(
        num_layers=1,
        hidden_size=4,
        num_attention_heads=1,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=True,
    )
    build = layers.ColumnParallelLinear.__init__.__wrapped__  # type: ignore[attr-defined]
    with process_groups(alone=True) as groups:
        arguments = {"config": config, "init_method": torch.nn.init.normal_, "bias": False, "tp_group": groups.tp}
        with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
            build(layers.ColumnParallelLinear.__new__(layers.ColumnParallelLinear), 4, 6, **arguments)
        layer = layers.ColumnParallelLinear(4, 6, **arguments)
        assert layer.gradient_accumulation_fusion is False and config.gradient_accumulation_fusion is True
        assert layers._grad_accum_fusion_available is False
        layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.zeros(6, 4), False
        x = torch.randn(3, 1, 4, requires_grad=True)
        layer(x)[0].sum().backward()
        expected = x.detach().sum((0, 1)).expand(6, 4)
        assert torch.allclose(layer.weight.grad, expected) and not layer.weight.main_grad.any()
        assert not layer.weight.grad_added_to_main_grad
