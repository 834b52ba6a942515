"""Tables about Megatron's arguments: what we set and why, what belongs elsewhere, what cannot work here.

docs/configuration.md shows these tables; a test keeps them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Situation:
    """What a default may depend on."""

    gpu: bool
    """Whether this process computes on a GPU."""
    transformer_engine: bool
    """Whether Transformer Engine can be used."""
    fused_gradients: bool
    """Whether apex's ``fused_weight_gradient_mlp_cuda`` is installed."""
    chosen: dict[str, Any]
    """What the user set under ``megatron``."""

    @property
    def sixteen_bits(self) -> bool:
        """Whether the model computes in bfloat16 or float16."""
        return self.gpu and (self.chosen.get("bf16", True) or self.chosen.get("fp16", False))

    @property
    def transformer_engine_layers(self) -> bool:
        """Whether the layers are Transformer Engine's."""
        return self.chosen.get("transformer_impl", self._layers()) == "transformer_engine"

    def _layers(self) -> str:
        return "transformer_engine" if self.transformer_engine and self.sixteen_bits else "local"


@dataclass(frozen=True)
class Default:
    """A value that we set where the user does not."""

    value: Any | Callable[[Situation], Any]
    shown: str
    """The value in words, for the documentation."""
    reason: str

    def resolve(self, situation: Situation) -> Any:
        return self.value(situation) if callable(self.value) else self.value


def _default(value: Any, reason: str, shown: str | None = None) -> Default:
    return Default(value, shown or (str(value).lower() if isinstance(value, bool) else str(value)), reason)


DEFAULTS: dict[str, Default] = {
    "micro_batch_size": _default(1, "the smallest; raise it until memory is full"),
    "transformer_impl": _default(
        lambda s: s._layers(),
        "the fastest layers that are installed; float32 is TF32 in Transformer Engine's",
        "transformer_engine where installed and with bf16 or fp16, else local",
    ),
    "distributed_backend": _default(
        lambda s: "nccl" if s.gpu else "gloo", "what the device can use", "nccl on a GPU, gloo on a CPU"
    ),
    "bf16": _default(
        lambda s: s.gpu and not s.chosen.get("fp16", False),
        "half the memory and several times the speed on a GPU; on a CPU neither",
        "true on a GPU unless fp16 is set, false on a CPU",
    ),
    "use_distributed_optimizer": _default(
        lambda s: s.gpu and s.chosen.get("optimizer", "adam") == "adam" and not s.chosen.get("use_torch_fsdp2", False),
        "shards optimizer state over data-parallel ranks; on for one rank too, so that a run resumes on another number",
        "true on a GPU, false on a CPU",
    ),
    "use_cpu_initialization": _default(
        lambda s: None if s.gpu else True,
        "random weights do not depend on the tensor-parallel size; costs nothing where there is no GPU",
        "Megatron's on a GPU, true on a CPU",
    ),
    "make_vocab_size_divisible_by": _default(
        lambda s: 64 if s.gpu else 1,
        "tensor cores like multiples of 64; padding never enters the softmax",
        "64 on a GPU, 1 on a CPU (times the tensor-parallel size)",
    ),
    "attention_dropout": _default(0.0, "the models trained here have none"),
    "hidden_dropout": _default(0.0, "the models trained here have none"),
    "attention_softmax_in_fp32": _default(True, "as in the Hugging Face models; no effect with fused attention"),
    "gradient_accumulation_fusion": _default(
        lambda s: (
            s.gpu and (s.fused_gradients or s.transformer_engine_layers) and not s.chosen.get("use_torch_fsdp2", False)
        ),
        "Transformer Engine's layers add weight gradients to the buffer in the product; others need apex's extension",
        "true on a GPU with Transformer Engine's layers, or with apex's extension",
    ),
    "bias_swiglu_fusion": _default(lambda s: s.gpu, "compiled, which only pays on a GPU", "true on a GPU"),
    "bias_dropout_fusion": _default(lambda s: s.gpu, "compiled, which only pays on a GPU", "true on a GPU"),
    "masked_softmax_fusion": _default(False, "its kernels are apex's, and no attention used here calls them"),
    "apply_rope_fusion": _default(
        lambda s: s.transformer_engine_layers,
        "one kernel for each of queries and keys, also of packed documents; not for multi-latent attention",
        "true with Transformer Engine",
    ),
    "overlap_grad_reduce": _default(
        lambda s: s.gpu and not s.chosen.get("use_torch_fsdp2", False),
        "gradients are reduced while the backward pass goes on",
        "true on a GPU",
    ),
    "no_persist_layer_norm": _default(
        lambda s: not s.transformer_engine_layers, "the persistent kernel is apex's", "true without Transformer Engine"
    ),
    "ckpt_format": _default("torch_dist", "the format that loads under any parallel layout"),
    "dist_ckpt_optim_fully_reshardable": _default(
        True, "optimizer state loads under another tensor- or pipeline-parallel size too"
    ),
    "distrib_optim_fully_reshardable_mem_efficient": _default(
        lambda s: s.chosen.get("use_gloo_process_groups", True),
        "one rank of a replica group collects the state to save, 12 bytes a parameter, not every rank",
        "true with Gloo process groups",
    ),
    "save_interval": _default(500, "steps between two checkpoints; the last step is always saved"),
    "eval_interval": _default(500, "steps between two evaluations; no effect without data.valid"),
    "eval_iters": _default(10, "batches of one evaluation; no effect without data.valid"),
    "dataloader_type": _default("single", "samples in the order of the blend, resumable at any step"),
    "lr_decay_style": _default("cosine", "the paper's"),
    "min_lr": _default(
        lambda s: min(1e-7, s.chosen["lr"]) if isinstance(s.chosen.get("lr"), float) else 1e-7, "the paper's", "1e-7"
    ),
    "adam_beta2": _default(0.95, "what the base models were trained with; Megatron's 0.999 suits longer averages"),
    "weight_decay": _default(0.1, "what the base models were trained with"),
    "exit_signal_handler": _default(
        True, "SIGTERM and Ctrl-C save a checkpoint before the run stops (exit code 75); a second Ctrl-C interrupts"
    ),
    "rerun_mode": _default(
        "disabled", "a suspicious loss stops the run; repeating the step would need the reference's scores again"
    ),
    "check_for_nan_in_loss_and_grad": _default(
        lambda s: s.chosen.get("rerun_mode", "disabled") != "disabled",
        "each step's loss and gradient norm are looked at anyway, by all ranks together; Megatron's check ends one",
        "false, true with rerun_mode",
    ),
    "enable_one_logger": _default(False, "reports to a service inside NVIDIA"),
}

# Keys of Megatron that another key of ours sets: (key of Megatron) -> (where it belongs).
OWNED: dict[str, str] = {
    "data_path": "data.train",
    "train_data_path": "data.train",
    "valid_data_path": "data.valid",
    "test_data_path": "data.valid",
    "data_args_path": "data.train",
    "per_split_data_args_path": "data.train and data.valid",
    "split": "data.valid",
    "data_cache_path": "data.cache_dir",
    "num_workers": "data.num_workers",
    "eod_mask_loss": "data.mask_eod_loss",
    "reset_attention_mask": "data.document_mask",
    "reset_position_ids": "data.document_mask",
    "dataloader_inter_document_masking": "data.document_mask",
    "create_attention_mask_in_dataloader": "data.document_mask",
    "tokenizer_type": "data.tokenizer",
    "tokenizer_model": "data.tokenizer",
    "metadata_path": "data.tokenizer",
    "special_tokens": "data.tokenizer",
    "trust_remote_code": "data.tokenizer",
    "tiktoken_pattern": "data.tokenizer",
    "tiktoken_num_special_tokens": "data.tokenizer",
    "vocab_file": "data.tokenizer",
    "merge_file": "data.tokenizer",
    "vocab_extra_ids": "data.tokenizer",
    "vocab_size": "model.vocab_size",
    "padded_vocab_size": "model.vocab_size and megatron.make_vocab_size_divisible_by",
    "pad_vocab_size": "megatron.make_vocab_size_divisible_by",
    "spec": "model (its family brings the layers)",
    "save": "run_dir (checkpoints go to run_dir/checkpoints)",
    "load": "run_dir (a run goes on from run_dir/checkpoints) or init",
    "pretrained_checkpoint": "init",
    "finetune": "init",
    "save_retain_interval": "checkpoint.keep",
    "seed": "seed",
    "log_interval": "logging.interval",
    "tensorboard_dir": "logging.tensorboard",
    "wandb_project": "logging.wandb.project",
    "wandb_exp_name": "logging.wandb.name",
    "wandb_entity": "logging.wandb.entity",
    "wandb_save_dir": "logging.wandb",
    "calculate_per_token_loss": "nowhere: it is always on, because losses are averaged over tokens",
    "cross_entropy_loss_fusion": "nowhere: the objective brings its own loss",
    "cross_entropy_fusion_impl": "nowhere: the objective brings its own loss",
    "fp16_lm_cross_entropy": "nowhere: the loss is computed in float32",
    "logits_load_dir": "objective and reference",
    "logits_save_dir": "objective and reference",
    "local_rank": "the environment (LOCAL_RANK)",
    "async_strategy": "nowhere: with async_save a thread of each rank writes",
    "async_ckpt_cpu_priority": "nowhere: with async_save a thread of each rank writes",
    "async_ckpt_io_priority": "nowhere: with async_save a thread of each rank writes",
}

# Keys of Megatron that would break a run here: (key) -> (what to do instead).
UNSUPPORTED: dict[str, str] = {
    "yaml_cfg": "this file",
    "batch_size": "megatron.micro_batch_size",
    "warmup": "megatron.lr_warmup_fraction",
    "model_parallel_size": "megatron.tensor_model_parallel_size",
    "checkpoint_activations": "megatron.recompute_granularity",
    "mock_data": "data.train",
    "skip_train": "a run that trains",
    "perform_rl_step": "a post-trained model as reference (post-training is not in this version)",
    "sft": "a post-trained model as reference (post-training is not in this version)",
    "rampup_batch_size": "megatron.global_batch_size (Megatron 0.19 ignores this argument)",
    "use_checkpoint_args": "model, or init alone, which brings its architecture",
    "mtp_num_layers": "a model without multi-token prediction",
    "hybrid_layer_pattern": "a transformer model",
    "hybrid_override_pattern": "a transformer model",
    "is_hybrid_model": "a transformer model",
    "heterogeneous_layers_config_path": "a model of equal layers",
    "heterogeneous_layers_config_encoded_json": "a model of equal layers",
    "use_megatron_fsdp": "megatron.use_distributed_optimizer (checkpoints are torch_dist)",
}

# Architecture that only the model's description may give, whether it mentions the key or not.
ARCHITECTURE = frozenset(
    [
        "num_layers",
        "encoder_num_layers",
        "decoder_num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "group_query_attention",
        "kv_channels",
        "normalization",
        "layernorm_epsilon",
        "layernorm_zero_centered_gamma",
        "swiglu",
        "squared_relu",
        "quick_geglu",
        "openai_gelu",
        "add_bias_linear",
        "add_qkv_bias",
        "position_embedding_type",
        "add_position_embedding",
        "use_rotary_position_embeddings",
        "rotary_base",
        "rotary_percent",
        "rotary_interleaved",
        "use_rope_scaling",
        "rope_scaling_factor",
        "no_rope_freq",
        "rope_type",
        "untie_embeddings_and_output_weights",
        "multi_latent_attention",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
        "rotary_scaling_factor",
        "mscale",
        "mscale_all_dim",
        "mla_down_proj_fusion",
        "cache_mla_latents",
        "qk_layernorm",
        "qk_l2_norm",
        "num_experts",
        "max_position_embeddings",
        "window_size",
        "window_attn_skip_freq",
        "softmax_type",
        "apply_residual_connection_post_layernorm",
        "activation_func_clamp_value",
        "glu_linear_offset",
        "rotary_seq_len_interpolation_factor",
        "mrope_section",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "yarn_original_max_position_embeddings",
        "experimental_attention_variant",
        "linear_attention_freq",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_value_head_dim",
        "mup_attn_scale_power",
        "mup_base_head_dim",
        "mup_base_hidden_size",
        "mup_embedding_mult",
        "mup_output_mult",
        "mup_width_mult",
    ]
)
