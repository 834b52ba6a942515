"""Every flag of Megatron is honored, without effect or refused, and said so."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import patches

patches.apply()

from remit_megatron.models.build import megatron_arguments  # noqa: E402
from remit_megatron.run.configuration import DataConfig, RunConfig, load_model_description  # noqa: E402
from remit_megatron.run.megatron_args import build_arguments  # noqa: E402
from remit_megatron.run.megatron_flags import HONORED, INERT, NEEDS, REFUSED  # noqa: E402
from remit_megatron.run.megatron_keys import ARCHITECTURE, DEFAULTS, OWNED, UNSUPPORTED  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


def run_config(**megatron: Any) -> RunConfig:
    return RunConfig(
        model={"base": "tiny_llama", "vocab_size": 301},
        data=DataConfig(train=[[1.0, "data/a"]], tokenizer="tok"),
        run_dir="runs/x",
        megatron={"seq_length": 128, "train_iters": 10, "lr": 1e-3} | megatron,
    )


def arguments(**megatron: Any) -> argparse.Namespace:
    config = run_config(**megatron)
    architecture = megatron_arguments(load_model_description(config.model))
    return build_arguments(config, architecture, world_size=1, rank=0, gpu=False)


def test_every_flag_of_megatron_is_in_one_table():
    """A flag that a newer Megatron brings is accepted, and perhaps not done: it must be looked at."""
    from remit_megatron.run.megatron_args import _FLAGS, _known_arguments

    tables = [HONORED, *INERT.values(), REFUSED, OWNED, UNSUPPORTED, ARCHITECTURE, DEFAULTS]
    actions, _ = _known_arguments()
    flags = {name for name, action in actions.items() if isinstance(action, _FLAGS)} - {"help"}
    assert sorted(name for name in flags if not any(name in table for table in tables)) == []
    classified = [name for table in tables[:-4] for name in table] + list(REFUSED)
    assert sorted(set(classified) - flags) == []
    assert sorted(name for name in classified if sum(name in table for table in tables) != 1) == []


def test_flags_without_effect_and_harmful_ones_are_in_the_documentation():
    text = (ROOT / "docs/configuration.md").read_text()
    for name, expected in REFUSED.items():
        assert f"| `{name}` | {expected} |" in text, name
    for name, switches in NEEDS.items():
        assert f"| `{name}` | {', '.join(f'`{switch}`' for switch in switches)} |" in text, name
    for reason, names in INERT.items():
        assert f"| {reason} | {', '.join(f'`{name}`' for name in sorted(names))} |" in text, reason


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("init_model_with_meta_device", True, "false: the run would train from uninitialized memory"),
        ("no-load-optim", True, "nothing; another run_dir"),
        ("perform_initialization", False, "true: a model without init"),
        ("moe_grouped_gemm", True, "no such key: it has no effect, the model has no experts"),
        ("cuda_graph_impl", "full_iteration", "none, local or transformer_engine"),
        ("gradient_accumulation_fusion", True, "false: Megatron's own layers need apex's"),
        # Accepted before, and read by nothing.
        ("exit_signal_handler_for_dataloader", True, "no such key: it has no effect, the data are read"),
        ("nccl_all_reduce_for_prefill", True, "no such key: it has no effect, nothing is generated"),
        ("dist_ckpt_save_pre_mcore_014", True, "no such key: it has no effect, Megatron no longer reads it"),
        ("gradient_reduce_div_fusion", False, "no such key: it has no effect, it belongs to Megatron-FSDP"),
        ("bias_gelu_fusion", False, "no such key: it has no effect, the feed-forward parts are SwiGLU"),
        ("use_ring_exchange_p2p", True, "false: torch as it is published"),
        ("use_kitchen_attention", True, "false: no family here has layers of Kitchen"),
        ("tensor_parallel_num_weight_shards", 2, "nothing: no sample is drawn"),
        # It would leave with exit code 0 in the middle of a run.
        ("exit_signal_handler_for_training", True, "false: a signal would end a run that is not done"),
    ],
)
def test_what_would_be_accepted_and_not_done_is_refused(key, value, expected):
    with pytest.raises(UserError) as caught:
        arguments(**{key: value})
    assert expected in caught.value.expected
    if key in ("init_model_with_meta_device", "moe_grouped_gemm"):
        arguments(**{key: not value})  # Megatron's own value is no mistake


def test_float32_on_a_gpu_is_no_tf32(monkeypatch):
    """Transformer Engine multiplies float32 in TF32, whatever torch is told."""
    monkeypatch.setattr("remit_megatron.models.spec.transformer_engine_usable", lambda: True)
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(f"megatron.core.models.common.embeddings.rope_utils.{name}", lambda *_: None)

    def built(**megatron: Any) -> argparse.Namespace:
        config = run_config(**megatron)
        architecture = megatron_arguments(load_model_description(config.model))
        return build_arguments(config, architecture, world_size=1, rank=0, gpu=True)

    args = built(bf16=False)
    assert (args.transformer_impl, args.no_persist_layer_norm) == ("local", True)
    assert not args.apply_rope_fusion and built().apply_rope_fusion
    assert built().gradient_accumulation_fusion and not args.gradient_accumulation_fusion
    with pytest.raises(UserError, match="defer_embedding_wgrad_compute: found true; expected false: the output layer"):
        built(defer_embedding_wgrad_compute=True)
    assert built(bf16=False, fp16=True).transformer_impl == built().transformer_impl == "transformer_engine"
    with pytest.raises(UserError, match="found transformer_engine without bf16 and fp16; expected local: "):
        built(bf16=False, transformer_impl="transformer_engine")


def test_a_process_with_one_connection_is_too_late_for_fsdp2(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(UserError, match="CUDA_DEVICE_MAX_CONNECTIONS: found 1; expected 8, say"):
        arguments(use_torch_fsdp2=True)
