"""Every true-or-false argument of Megatron that no other table has: honored, without effect here, or refused.

An argument that is accepted and then not done is the worst kind of fault. So each flag of the installed Megatron is in
exactly one table of this file or of ``megatron_keys.py``; a test fails for one that a newer Megatron brings.

Honored means that it reaches the part of Megatron that reads it, in student and loop, and nothing here stands in its
way. Most are for GPUs, and have not been run here. docs/configuration.md shows the tables of what is refused.
"""

from __future__ import annotations


def names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


HONORED = names(
    # layout and communication
    "sequence_parallel tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs",
    "tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs overlap_p2p_comm overlap_p2p_comm_warmup_flush",
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split",
    "use_tp_pp_dp_mapping use_gloo_process_groups use_sharp overlap_param_gather align_grad_reduce",
    "align_param_gather overlap_param_gather_with_optimizer_step ddp_pad_buckets_for_high_nccl_busbw",
    "ddp_reduce_scatter_with_fp32_accumulation nccl_ub disable_symmetric_registration use_torch_fsdp2",
    "torch_fsdp2_reshard_after_forward",
    # precision
    "fp16 fp32_residual_connection apply_query_key_layer_scaling disable_bf16_reduced_precision_matmul fp8_wgrad",
    "fp8_output_proj first_last_layers_bf16 fp8_param_gather fp4_param_gather grad_reduce_in_bf16",
    "accumulate_allreduce_grads_in_fp32 reuse_grad_buf_for_mxfp8_param_ag use_precision_aware_optimizer",
    "deterministic_mode batch_invariant_mode stream_ckpt_dequant",
    # layers, memory
    "fused_residual_rmsnorm use_transformer_engine_op_fuser use_te_activation_func disable_jit_fuser",
    "clone_scatter_output_in_embedding defer_embedding_wgrad_compute recompute_activations",
    "distribute_saved_activations cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading",
    "delay_offload_until_cuda_graph enable_cuda_graph external_cuda_graph te_rng_tracker",
    "enable_experimental",
    # optimizer and schedule (apply_wd_to_qk_layernorm is refused by run/checks.py)
    "qk_clip apply_wd_to_qk_layernorm muon_split_qkv muon_nesterov optimizer_cpu_offload optimizer_cuda_graph",
    "use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params",
    "override_opt_param_scheduler use_checkpoint_opt_param_scheduler",
    "check_for_large_grads",
    # loop
    "manual_gc manual_gc_eval profile",
    "use_pytorch_profiler pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack",
    "pytorch_profiler_collect_chakra record_memory_history record_shapes nvtx_ranges barrier_with_L1_time",
    "log_params_norm log_throughput log_progress log_timers_to_tensorboard log_loss_scale_to_tensorboard",
    "log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_device_memory_used log_num_zeros_in_grad",
    "log_max_attention_logit log_world_size_to_tensorboard log_energy log_straggler disable_straggler_on_startup",
    "run_workload_inspector_server",
    # checkpoints
    "ckpt_fully_parallel_save ckpt_fully_parallel_load ckpt_assume_constant_structure verify_integrity",
    "ckpt_load_validate_sharding_integrity async_save",
)

# Reason -> flags that nothing reads in a run of these models. One that is set is refused, with the reason.
INERT: dict[str, frozenset[str]] = {
    "the model has no experts": names(
        "overlap_moe_expert_parallel_comm overlap_dispatch_backward_with_experts_wgrad use_fused_weighted_squared_relu",
        "ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream use_grouped_gemm_for_shared_expert",
        "use_grouped_gemm_for_dense_mlp moe_shared_expert_gate moe_shared_expert_overlap moe_enable_routing_replay",
        "moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_pre_softmax",
        "moe_router_enable_expert_bias moe_router_force_load_balancing moe_grouped_gemm moe_single_grouped_weight",
        "moe_single_grouped_bias moe_enable_deepep moe_permute_fusion_into_hybridep moe_per_layer_logging",
        "moe_hybridep_pad_uneven_dispatch_inputs moe_pad_expert_input_to_capacity moe_layer_recompute",
        "moe_pad_experts_for_cuda_graph_inference moe_permute_fusion moe_router_fusion moe_apply_probs_on_input",
        "moe_ncclep_static_shape moe_ncclep_zero_copy moe_paged_stash moe_use_upcycling delay_wgrad_compute",
        "moe_routing_trace_capture_logits moe_routing_trace_capture_hidden_states moe_routing_trace_dump_weights",
    ),
    "the model has no multi-token prediction": names("mtp_standalone mtp_use_repeated_layer mtp_detach_heads"),
    "the model has no sparse attention of that kind": names(
        "dsa_indexer_use_sparse_loss dsa_indexer_rope_interleaved dsa_indexer_rotate_activation",
        "dsa_indexer_scoring_relu dsa_indexer_k_norm_fp32 yarn_correction_range_round_to_int",
    ),
    "the model is no hybrid, BERT, retriever or vision model": names(
        "use_mamba_mem_eff_path bert_binary_head biencoder_shared_query_context_model use_one_sent_docs",
        "retriever_score_scaling vision_pretraining dino_norm_last_layer output_bert_embeddings",
    ),
    "nothing is generated in a run": names(
        "flash_decode inference_fuse_tp_communication inference_disable_triton_nvls_kernels use_legacy_static_engine",
        "inference_moe_disable_fused_quant_kernels inference_dynamic_batching inference_rng_tracker",
        "inference_dynamic_batching_track_paused_request_events decode_only_cuda_graphs enable_chunked_prefill",
        "inference_dynamic_batching_track_generated_token_events inference_cuda_graph_all_prefills",
        "inference_dynamic_batching_enable_prefix_caching offset_sampling_seed_by_dp_rank",
        "inference_text_gen_server_logging inference_wandb_logging inference_use_synchronous_zmq_collectives",
        "inference_disable_ep_consensus nccl_all_reduce_for_prefill",
    ),
    "a run trains on data, not on what it generates (remit posttrain does)": names(
        "grpo_filter_groups_with_same_reward rl_offload_optimizer_during_inference rl_persist_cuda_graphs",
        "rl_partial_rollouts rl_inference_logprobs_is_correction rl_use_sequence_packing rl_training_cuda_graphs",
        "rl_offload_inference_model_weights_when_idle rl_verify_model_weights_swap rl_skip_bos_token rl_profile",
    ),
    "the data are read by this project's own loader (data.*)": names(
        "dataloader_fast_cache_load dataloader_defer_npy_index_mmap mmap_bin_files fim_data allow_ambiguous_pad_tokens",
        "tokenizer_sentencepiece_legacy tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast",
        "tokenizer_hf_no_include_special_tokens data_sharding exit_signal_handler_for_dataloader",
    ),
    "it belongs to Megatron-FSDP, which is not used": names(
        "fsdp_manual_registration fsdp_double_buffer keep_fp8_transpose_cache enable_full_sharding_in_hsdp",
        "strict_fsdp_dtensor_load megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer",
        "fsdp_db_use_persist_buf_on_alloc_fail create_all_gather_group gradient_reduce_div_fusion",
    ),
    "the process group is made before Megatron's own start, which alone reads it": names(
        "flight_recorder_dump_on_timeout flight_recorder_include_stack_trace flight_recorder_include_only_active",
        "flight_recorder_extra_dump_on_exec",
    ),
    "Megatron no longer reads it": names(
        "deprecated_use_mcore_models use_dist_ckpt_deprecated ckpt_fully_parallel_save_deprecated",
        "disable_msc_deprecated check_for_spiky_loss use_flash_attn dist_ckpt_save_pre_mcore_014",
    ),
    "Megatron's builder of models does not read it": names("use_layer_wise_param_layout"),
    "the feed-forward parts are SwiGLU": names("bias_gelu_fusion"),
    "it compares norms that no model here has": names("test_mode"),
    "it reports to a service inside NVIDIA": names(
        "one_logger_async enable_ft_package calc_ft_timeouts adlr_autoresume"
    ),
    "the reference's scores take the place of saved logits": names("logits_load_ignore_errors"),
}

# Flags that would be accepted and then do harm; refused at any value but Megatron's default.
REFUSED: dict[str, str] = {
    "init_model_with_meta_device": "false: the run would train from uninitialized memory",
    "perform_initialization": "true: a model without init would train from uninitialized memory",
    "lazy_mpu_init": "false: the run would go on without process groups",
    "fake_process_group": "false: no rank would hear of another (remit plan --simulate needs no ranks)",
    "freeze_all_layers": "false: nothing would be trained",
    "data_parallel_random_init": "false: replicas of one model begin alike",
    "attention_output_gate": "false: no family here has such a gate, and its weights would not be in any checkpoint",
    "use_mup": "false: its factors are in the forward pass, and an exported model would compute without them",
    "use_ring_exchange_p2p": "false: torch as it is published has no ring_exchange",
    "use_kitchen_attention": "false: no family here has layers of Kitchen",
    "exit_signal_handler_for_training": "false: a signal would end a run that is not done with exit code 0",
    "hybrid_context_parallel": "false: its data loader is not this project's",
    "inprocess_restart": "false: what runs beside the training would not start again (exit code 75 is how runs go on)",
    "inprocess_empty_cuda_cache": "false, with inprocess_restart",
    "use_persistent_ckpt_worker": "false: with async_save a thread of each rank writes",
    "async_ckpt_use_cpu_shm": "false: with async_save a thread of each rank writes",
    "enable_msc": "false: checkpoints are verified as files",
    "replication": "false: local checkpoints have no manifest",
    "auto_detect_ckpt_format": "false: checkpoints are torch_dist",
    "ckpt_convert_update_legacy_dist_opt_format": "false: checkpoints are torch_dist",
    "load_main_params_from_ckpt": "false: master weights start from the loaded ones, or from the run's own",
    "no_save_optim": "nothing: a run could not go on from its checkpoint",
    "no_save_rng": "nothing: a run could not go on from its checkpoint",
    "no_load_optim": "nothing; another run_dir with init at this run's checkpoint begins with a new optimizer",
    "no_load_rng": "nothing; another run_dir with init at this run's checkpoint begins with new random states",
    "use_mp_args_from_checkpoint_args": "false: the layout is this file's",
    "use_tokenizer_model_from_checkpoint_args": "true, which has no effect: data.tokenizer is read",
    "decrease_batch_size_if_needed": "false: length and schedule would count samples that no step has",
    "ddp_average_in_collective": "false: losses are averaged over tokens, after the reduction",
    "init_method_xavier_uniform": "false: Megatron 0.19 fails on it; megatron.init_method_std in its place",
    "exit_on_missing_checkpoint": "false: a run without a checkpoint begins, one with a damaged one says so",
    "full_validation": "megatron.eval_iters in its place",
    "multiple_validation_sets": "one blend in data.valid in its place",
}


# Flag -> those of which one must be on (or have a value): without it, nothing reads the flag.
NEEDS: dict[str, tuple[str, ...]] = {
    "first_last_layers_bf16": ("fp8", "fp4"),
    "fp8_param_gather": ("fp8",),
    "reuse_grad_buf_for_mxfp8_param_ag": ("fp8",),
    "tp_comm_overlap_rs_dgrad": ("tp_comm_overlap",),
    "cpu_offloading_retain_pinned_cpu_buffers": ("cpu_offloading_num_layers",),
    "delay_offload_until_cuda_graph": ("fine_grained_activation_offloading",),
    "use_torch_optimizer_for_cpu_offload": ("optimizer_cpu_offload",),
    "overlap_cpu_optimizer_d2h_h2d": ("optimizer_cpu_offload",),
    "ddp_pad_buckets_for_high_nccl_busbw": ("use_distributed_optimizer",),
    "ddp_reduce_scatter_with_fp32_accumulation": ("use_distributed_optimizer",),
    "grad_reduce_in_bf16": ("bf16",),
    "use_pytorch_profiler": ("profile",),
    "record_shapes": ("profile",),
    "pytorch_profiler_collect_shapes": ("use_pytorch_profiler",),
    "pytorch_profiler_collect_callstack": ("use_pytorch_profiler",),
    "pytorch_profiler_collect_chakra": ("use_pytorch_profiler",),
}


def refusal(name: str) -> str | None:
    """What to expect of a flag that may not be set: None where it is honored."""
    if name in REFUSED:
        return REFUSED[name]
    for reason, names in INERT.items():
        if name in names:
            return f"no such key: it has no effect, {reason}"
    return None
