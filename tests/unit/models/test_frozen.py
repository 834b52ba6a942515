"""What belongs to the student's step does not reach the frozen reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import patches

patches.apply()

from remit_megatron.models.build import default_arguments, megatron_arguments, model_config  # noqa: E402
from remit_megatron.models.fp8 import frozen_arguments  # noqa: E402
from remit_megatron.models.frozen import STUDENT_STEP  # noqa: E402
from remit_megatron.run.configuration import DataConfig, RunConfig, load_model_description  # noqa: E402
from remit_megatron.run.megatron_args import build_arguments  # noqa: E402

TINY: dict[str, Any] = {"base": "tiny_llama", "vocab_size": 301}
# As a student would set them, together where Megatron wants them together.
STUDENTS: dict[str, dict[str, Any]] = {
    "graphs": {"cuda_graph_impl": "local"},
    "graphs of modules": {"cuda_graph_impl": "local", "cuda_graph_modules": ["attn"]},
    "recomputed layers": {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 4,
    },
    "recomputed modules": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}  # fmt: skip


def different(first: Any, second: Any) -> list[str]:
    drawn = ("init_method", "output_layer_init_method", "embedding_init_method")
    fields = (field.name for field in dataclasses.fields(first) if field.name not in drawn)
    return [name for name in fields if getattr(first, name) != getattr(second, name)]


def run_arguments(**megatron: Any):
    settings = {"seq_length": 128, "train_iters": 10, "lr": 1e-3} | megatron
    config = RunConfig(
        model=TINY, data=DataConfig(train=[[1.0, "data/a"]], tokenizer="tok"), run_dir="runs/x", megatron=settings
    )
    architecture = megatron_arguments(load_model_description(config.model))
    return build_arguments(config, architecture, world_size=1, rank=0, gpu=True)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_students_step_leaves_its_reference_as_it_would_be_without(name, monkeypatch):
    """On a GPU, where alone there are graphs; the layers are the local ones."""
    monkeypatch.setattr("remit_megatron.models.spec.transformer_engine_usable", lambda: False)
    description = load_model_description(TINY)
    args = run_arguments(**STUDENTS[name])
    plain = model_config(description, frozen_arguments(run_arguments())).transformer
    assert different(model_config(description, frozen_arguments(args)).transformer, plain) == []
    assert different(model_config(description, args).transformer, plain), "the student keeps it"


def test_what_needs_a_gpu_to_be_accepted_is_switched_off_too():
    args = default_arguments()
    for key, value in STUDENT_STEP.items():
        setattr(args, key, {bool: True, int: 3, list: ["attn"]}.get(type(value), "something"))
    own = frozen_arguments(args)
    assert {key: getattr(own, key) for key in STUDENT_STEP} == STUDENT_STEP
    own.cuda_graph_modules.append("attn")
    assert STUDENT_STEP["cuda_graph_modules"] == []


def test_every_argument_of_these_kinds_is_known():
    """A newer Megatron's further argument of a kind that belongs to a step must be looked at."""
    words = ("cuda_graph", "recompute", "offload", "wgrad", "tp_comm")
    elsewhere = {
        # have no effect without those that are switched off
        "tp_comm_bulk_wgrad", "tp_comm_bulk_dgrad", "tp_comm_overlap_ag", "tp_comm_overlap_rs", "tp_comm_split_ag",
        "tp_comm_overlap_rs_dgrad", "tp_comm_split_rs", "tp_comm_overlap_cfg", "tp_comm_bootstrap_backend",
        "tp_comm_overlap_disable_qkv", "tp_comm_overlap_disable_fc1", "cuda_graph_warmup_steps",
        "cpu_offloading_retain_pinned_cpu_buffers", "min_offloaded_tensor_size", "delta_offload_bytes_across_pp_ranks",
        "activation_offload_fraction", "fine_grained_offloading_max_inflight_offloads",
        # mapped by validate_args to cuda_graph_impl and recompute_granularity
        "enable_cuda_graph", "external_cuda_graph", "cuda_graph_scope_deprecated", "recompute_activations",
        # of the optimizer, of experts, of generation, of low precision
        "optimizer_cpu_offload", "optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload",
        "optimizer_cuda_graph", "moe_layer_recompute", "overlap_dispatch_backward_with_experts_wgrad",
        "moe_pad_experts_for_cuda_graph_inference", "inference_fuse_tp_communication", "decode_only_cuda_graphs",
        "fp8_wgrad", "save_wgrads_interval", "inference_cuda_graph_all_prefills", "cuda_graph_impl_for_inference",
    }  # fmt: skip
    found = {name for name in vars(default_arguments()) if any(word in name for word in words)}
    found -= {name for name in found if name.startswith(("rl_", "inference_", "moe_paged_stash"))}
    assert sorted(found - elsewhere - set(STUDENT_STEP)) == []
