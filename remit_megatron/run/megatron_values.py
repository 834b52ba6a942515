"""Every argument of Megatron that takes a value and no other table has: honored, without effect here, or refused.

As ``megatron_flags.py`` for flags: a setting that is accepted and then not done is the worst kind of fault, and one
that a run dies of an hour later is the next. Each such argument of the installed Megatron is in exactly one table; a
test fails for one that a newer Megatron brings. Of those that are honored Megatron's parser takes any number:
:func:`check_values` refuses what no run can have. tests/fuzz/test_arguments_sweep.py looks for what it lets pass.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from remit_megatron.run.megatron_flags import NEEDS, names
from remit_megatron.runtime.errors import UserError, show

HONORED_VALUES = names(
    # length, batches, layout
    "seq_length train_iters train_samples global_batch_size eval_global_batch_size eval_micro_batch_size",
    "start_eval_at_iter tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size cp_comm_type",
    "hierarchical_context_parallel_sizes pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank microbatch_group_size_per_vp_stage num_distributed_optimizer_instances",
    # communication
    "ddp_bucket_size ddp_num_buckets ddp_param_name_patterns_for_fp32_local_accumulation high_priority_stream_groups",
    "nccl_communicator_config_path pipeline_model_parallel_comm_backend sharp_enabled_group tp_comm_bootstrap_backend",
    "tp_comm_overlap_cfg distributed_timeout_minutes distributed_timeout_seconds_after_init",
    # precision
    "fp8 fp8_recipe fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_quantizer_factory fp4",
    "fp4_recipe fp4_quantizer_factory num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 te_precision_config_file",
    "loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis main_grads_dtype main_params_dtype",
    "exp_avg_dtype exp_avg_sq_dtype",
    # layers, memory
    "attention_backend flash_attention_version init_method_std embedding_init_method_std",
    "recompute_granularity recompute_method recompute_modules recompute_num_layers cpu_offloading_num_layers",
    "offload_modules activation_offload_fraction delta_offload_bytes_across_pp_ranks min_offloaded_tensor_size",
    "fine_grained_offloading_max_inflight_offloads optimizer_offload_fraction cuda_graph_impl cuda_graph_modules",
    "cuda_graph_scope_deprecated cuda_graph_warmup_steps mlp_chunks_for_training wgrad_deferral_limit",
    "empty_unused_memory_level",
    # optimizer and schedule
    "optimizer lr lr_decay_iters lr_decay_samples lr_warmup_fraction lr_warmup_init lr_warmup_iters lr_warmup_samples",
    "lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style decoupled_lr decoupled_min_lr start_weight_decay",
    "end_weight_decay weight_decay_incr_style no_weight_decay_cond_type clip_grad adam_beta1 adam_eps sgd_momentum",
    "lion_beta1 lion_beta2 muon_coefficient_type muon_extra_scale_factor muon_fp32_matmul_prec muon_momentum",
    "muon_num_ns_steps muon_scalar_optimizer muon_scale_mode muon_tp_mode qk_clip_alpha qk_clip_threshold",
    "dump_param_to_param_group_map",
    # loop
    "exit_duration_in_mins exit_interval exit_signal iterations_to_skip result_rejected_tracker_filename",
    "manual_gc_interval train_sync_interval check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval",
    "profile_ranks profile_step_start profile_step_end memory_snapshot_path log_memory_interval logging_level",
    "tensorboard_log_interval tensorboard_queue_size timing_log_level timing_log_option straggler_ctrlr_port",
    "straggler_minmax_count save_activations_interval save_dgrads_interval save_params_interval save_wgrads_interval",
    # checkpoints
    "ckpt_fully_parallel_load_exchange_algo ckpt_fully_parallel_load_process_group dist_ckpt_strictness",
    "ckpt_fully_parallel_save_process_group dist_ckpt_workers",
    # refused by run/checks.py
    "step_batch_size_schedule non_persistent_save_interval",
)

# Reason -> beginnings of names, ending in _, and names that nothing reads in a run of these models.
INERT_VALUES: dict[str, frozenset[str]] = {
    "the model has no experts": names("moe_ expert_ save_tokens_per_expert_interval"),
    "the model has no multi-token prediction": names("mtp_"),
    "the model has no sparse attention of that kind": names("dsa_"),
    "the model is no hybrid, BERT, retriever, vision or audio model": names(
        "mamba_ bert_ dino_ ict_ indexer_ retriever_ vision_ swin_backbone_type biencoder_projection_dim head_lr_mult",
        "block_data_path embedding_path evidence_data_path titles_data_path classes_fraction data_per_class_fraction",
        "iter_per_epoch img_h img_w mask_factor mask_prob mask_type num_channels num_classes patch_dim",
        "query_in_block_prob relative_attention_max_distance relative_attention_num_buckets sample_rate",
        "short_seq_prob decoder_seq_length encoder_seq_length",
    ),
    "nothing is generated in a run": names(
        "inference_ max_tokens_to_oom mlp_chunks_for_prefill num_speculative_tokens symmetric_ar_type"
    ),
    "a run trains on data, not on what it generates (remit posttrain does)": names(
        "rl_ grpo_ langrl_env_config refit_method"
    ),
    "the data are read by this project's own loader (data.*)": names(
        "fim_ null_tokenizer_ chat_template sft_tokenizer_prompt_format max_seqlen_per_dp_cp_rank",
        "mid_level_dataset_surplus num_dataset_builder_threads object_storage_cache_path per_dataset_sequences_path",
    ),
    "it belongs to Megatron-FSDP, which is not used": names(
        "megatron_fsdp_ data_parallel_sharding_strategy outer_dp_sharding_strategy suggested_communication_unit_size"
    ),
    "the process group is made before Megatron's own start, which alone reads it": names("flight_recorder_"),
    "Megatron no longer reads it": names("dist_ckpt_format_deprecated onnx_safe"),
    "it reports to a service inside NVIDIA": names("adlr_autoresume_interval app_tag_ ft_num_warmup_iters one_logger_"),
    "the reference's scores take the place of saved logits": names("logits_load_ logits_save_"),
    "no family here has layers of Kitchen": names("kitchen_attention_backend"),
    "it belongs to inprocess_restart, which is refused": names("inprocess_"),
    "checkpoints are files that stay": names(
        "non_persistent_ckpt_type non_persistent_global_ckpt_dir non_persistent_local_ckpt_algo",
        "non_persistent_local_ckpt_dir replication_factor replication_jump",
    ),
}

# Beginnings of names and names -> what to expect; refused at any value but Megatron's default.
REFUSED_VALUES: dict[str, str] = {
    "ckpt_step": "nothing: a run goes on from its newest checkpoint that is whole; init names any other",
    "override_ckpt_iteration": "nothing: steps are counted on from the checkpoint",
    "ckpt_convert_format": "nothing: remit import and remit export convert",
    "ckpt_convert_save": "nothing: remit import and remit export convert",
    "config_logger_dir": "nothing: Megatron 0.19 fails on a configuration with process groups",
    "error_injection_": "Megatron's default: a result would be made wrong on purpose",
    "fault_injector_": "nothing: ranks would be made to fail on purpose",
    "phase_transition_iterations": "megatron.exit_interval: at a transition the samples would begin again",
    "tensor_parallel_num_weight_shards": "nothing: no sample is drawn, and nothing is exported, for an axis of its own",
    "validation_set_names": "one blend in data.valid in its place",
}


def value_refusal(name: str) -> str | None:
    """What to expect of an argument that may not be set to another value than Megatron's; None where it may."""
    if name in HONORED_VALUES:
        return None
    for known, expected in REFUSED_VALUES.items():
        if _covers(known, name):
            return expected
    for reason, covered in INERT_VALUES.items():
        if any(_covers(known, name) for known in covered):
            return f"no such key: it has no effect, {reason}"
    return None


def _covers(known: str, name: str) -> bool:
    return name == known or (known.endswith("_") and name.startswith(known))


# What honored numbers have to be, where Megatron looks late or never.
_WHOLE_FROM_1 = names(
    "eval_global_batch_size eval_micro_batch_size mlp_chunks_for_training microbatch_group_size_per_vp_stage",
    "check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval log_memory_interval save_params_interval",
    "save_activations_interval save_dgrads_interval save_wgrads_interval tensorboard_log_interval recompute_num_layers",
    "tensorboard_queue_size distributed_timeout_minutes distributed_timeout_seconds_after_init straggler_minmax_count",
    "dist_ckpt_workers ddp_bucket_size ddp_num_buckets",
)
_FROM_0 = names(
    "eval_iters start_eval_at_iter exit_interval exit_duration_in_mins train_sync_interval manual_gc_interval",
    "profile_step_start profile_step_end cpu_offloading_num_layers init_method_std embedding_init_method_std",
    "wgrad_deferral_limit num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 cuda_graph_warmup_steps",
)
_SHARES = names("attention_dropout hidden_dropout")

# Value -> why not, of arguments whose parser offers more than a run here can have.
_NOT_OFFERED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "ckpt_format": (lambda value: value == "torch_dist", "torch_dist: no other is verified, resharded and exported"),
    "rerun_mode": (
        lambda value: value in ("disabled", "validate_results"),
        "disabled or validate_results: Megatron 0.19 has no other",
    ),
    "dist_ckpt_strictness": (
        lambda value: not value.startswith("return_"),
        "one that logs, raises or ignores: what is returned a run does not look at",
    ),
    "exit_signal": (
        lambda value: getattr(value, "name", value) not in _NO_EXIT_SIGNALS,
        "a signal that asks a process to end, as SIGTERM or SIGUSR1",
    ),
    "recompute_modules": (
        lambda value: not set(value) & {"moe", "moe_act", "shared_experts", "gdn_norm_out"},
        "modules of the model, which has no experts: core_attn, mlp, layernorm or mla_up_proj",
    ),
    "cp_comm_type": (
        lambda value: set(value) <= {"p2p", "all_gather", "a2a", "a2a+p2p"},
        "p2p, all_gather, a2a or a2a+p2p",
    ),
}
_NO_EXIT_SIGNALS = names("SIGKILL SIGSTOP SIGCHLD SIGCLD SIGSEGV SIGBUS SIGFPE SIGILL SIGABRT SIGIOT")

# Settings that this machine must have something for: where it has not, the run would die of them.
_ON_A_GPU = names(
    "cuda_graph_impl enable_cuda_graph external_cuda_graph nccl_ub use_sharp record_memory_history",
    "optimizer_cuda_graph pipeline_model_parallel_comm_backend gpu_sniff_test_interval log_straggler",
)
_WITH_TRANSFORMER_ENGINE = names("cpu_offloading_num_layers save_activations_interval save_dgrads_interval")


def check_values(values: Mapping[str, Any], chosen: Mapping[str, Any], *, gpu: bool) -> None:
    """Refuses numbers that no run can have, and settings that need what is not here.

    Args:
        values: Megatron's arguments by name, before ``validate_args``.
        chosen: those that the configuration sets.
        gpu: whether the run computes on GPUs.

    Raises:
        UserError: naming the argument.
    """
    for name, value in chosen.items():
        if value is None:
            continue
        if name in _WHOLE_FROM_1 and value < 1:
            raise UserError(f"megatron.{name}", value, "1 or more")
        if name in _FROM_0 and not 0 <= value < math.inf:
            raise UserError(f"megatron.{name}", value, "0 or more")
        if name in _SHARES and not 0 <= value < 1:
            raise UserError(f"megatron.{name}", value, "a share from 0 to below 1")
        if name in _NOT_OFFERED and not _NOT_OFFERED[name][0](value):
            raise UserError(f"megatron.{name}", getattr(value, "name", value), _NOT_OFFERED[name][1])
    _check_what_is_needed(values, chosen, gpu=gpu)
    _check_files(values)


def _check_what_is_needed(values: Mapping[str, Any], chosen: Mapping[str, Any], *, gpu: bool) -> None:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    off, layers = (None, False, "none", 0), values["transformer_impl"] == "transformer_engine"
    for name in chosen:
        if name in _ON_A_GPU and values[name] not in off and not gpu:
            raise UserError(f"megatron.{name}", show(values[name]), "no such setting without a GPU")
        if name in _WITH_TRANSFORMER_ENGINE and values[name] not in off and not layers:
            raise UserError(f"megatron.{name}", show(values[name]), "no such setting without Transformer Engine")
        if name in NEEDS and values[name] and not any(values[switch] for switch in NEEDS[name]):
            switches = " or ".join(f"megatron.{switch}" for switch in NEEDS[name])
            raise UserError(f"megatron.{name}", "true", f"false without {switches}, with which alone it is read")
    if "recompute_modules" in chosen and not HAVE_TE:  # Megatron's recomputation of an output asks it about FP8
        for module in sorted({"layernorm", "mla_up_proj"} & set(values["recompute_modules"] or ())):
            raise UserError("megatron.recompute_modules", module, "core_attn or mlp without Transformer Engine")
    if values["profile"] and not values["use_pytorch_profiler"] and not gpu:
        expected = "true with megatron.profile without a GPU, whose profiler is Nsight"
        raise UserError("megatron.use_pytorch_profiler", "false", expected)
    if values["hierarchical_context_parallel_sizes"] and importlib.util.find_spec("einops") is None:
        expected = "nothing: it needs the package einops, which is not installed"
        raise UserError(
            "megatron.hierarchical_context_parallel_sizes", values["hierarchical_context_parallel_sizes"], expected
        )
    if values["sharp_enabled_group"] is not None and not values["use_sharp"]:
        raise UserError("megatron.sharp_enabled_group", values["sharp_enabled_group"], "nothing without use_sharp")
    if getattr(values["attention_backend"], "name", values["attention_backend"]) == "local":
        expected = "auto: which layers there are, megatron.transformer_impl says"
        raise UserError("megatron.attention_backend", "local", expected)


def _check_files(values: Mapping[str, Any]) -> None:
    name = values["result_rejected_tracker_filename"]
    if name is not None and (Path(name).is_dir() or not os.path.isdir(os.path.dirname(name) or ".")):
        expected = "a file in a directory that is there"
        raise UserError("megatron.result_rejected_tracker_filename", name, expected)
