"""From a Hugging Face ``config.json`` to Megatron arguments, model configurations, and models that only run forward."""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from remit_megatron.models.environment import check_attention_environment
from remit_megatron.models.family import Family, family_of
from remit_megatron.models.layout import check_pipeline_parallel, check_tensor_parallel
from remit_megatron.models.mapping import Shape
from remit_megatron.models.spec import LOCAL, TE, transformer_impl

# What an architecture that does not speak of these things has. Student and reference share a namespace, so what one of
# them sets must not leak into the other.
_NEUTRAL: dict[str, Any] = {
    "add_qkv_bias": False,
    "heterogeneous_layers_config_path": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "num_experts": None,
    "qk_l2_norm": False,
    "qk_layernorm": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
    "squared_relu": False,
    "quick_geglu": False,
    "use_rope_scaling": False,
}

# Values that belong to a training run, not to a checkpoint: the family proposes, a run's own arguments decide.
_CHOICES = frozenset({"attention_dropout", "hidden_dropout", "init_method_std", "max_position_embeddings"})


def megatron_arguments(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Megatron arguments, by ``dest``, that say the same as a ``config.json``.

    ``rotary_base`` is an int where the checkpoint's theta is whole, because Megatron's option parses an int; else a
    float, which only :func:`model_config` can carry.

    Raises:
        UserError: no family knows the model, or the family does not support a field's value.
    """
    return family_of(hf_config).arguments(hf_config)


def checkpoint_arguments(hf_config: dict[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says that its weights depend on: Megatron arguments by ``dest``, those of architectures
    that it does not speak of included, and without what a training run chooses for itself.

    Raises:
        UserError: as :func:`megatron_arguments`.
    """
    values = _NEUTRAL | megatron_arguments(hf_config)
    return {name: value for name, value in values.items() if name not in _CHOICES}


def machine_arguments(params_dtype: torch.dtype) -> dict[str, Any]:
    """Megatron arguments, by ``dest``, that depend on what is installed; fused parts are those of a training run.

    Args:
        params_dtype: float32 takes the local layers: Transformer Engine rounds float32 products to TF32.
    """
    from megatron.core.tensor_parallel import layers

    impl = transformer_impl(LOCAL if params_dtype == torch.float32 else TE)
    return {
        "transformer_impl": impl,
        "gradient_accumulation_fusion": bool(layers._grad_accum_fusion_available),
        "apply_rope_fusion": False,  # rounds otherwise than the Hugging Face models, and refuses latent attention
        "no_persist_layer_norm": impl == "local",
        "masked_softmax_fusion": False,
    }


def padded_vocab_size(vocab_size: int, divisor: int, tensor_model_parallel_size: int) -> int:
    """``vocab_size`` rounded up to a multiple of divisor x TP, as Megatron does."""
    multiple = divisor * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def shape_of(hf_config: dict[str, Any]) -> Shape:
    """The sizes that the tables of weights need."""
    values = megatron_arguments(hf_config)
    return Shape(
        heads=values["num_attention_heads"], groups=values["num_query_groups"], vocab_size=values["vocab_size"]
    )


def check_layout(values: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuses parallel sizes that do not divide the architecture.

    Raises:
        UserError: tensor or pipeline parallelism does not fit.
    """
    described = _NEUTRAL | values | {"transformer_impl": transformer_impl(args.transformer_impl)}
    check_tensor_parallel(described, args.tensor_model_parallel_size)
    virtual = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    check_pipeline_parallel(described, vars(args), virtual_stages=virtual)


def _layers(
    family: Family, config: GPTModelConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    from remit_megatron.models.spec import block_spec

    return block_spec(family.layer_spec(config.transformer), config.transformer, vp_stage=vp_stage, pp_rank=pp_rank)


def model_config(hf_config: dict[str, Any], args: argparse.Namespace) -> GPTModelConfig:
    """Configuration of the model that ``config.json`` describes, with the parallel layout and training choices of
    ``args``.

    Args:
        hf_config: content of ``config.json``. Everything that its weights depend on comes from here, so that a student
            and a reference that differ (theta, layers, width) can be built from the same arguments.
        args: a validated Megatron namespace, or one of :func:`default_arguments`. It is not modified.

    Raises:
        UserError: an unsupported model, or parallel sizes that do not fit it.
    """
    family = family_of(hf_config)
    values = family.arguments(hf_config)
    check_layout(values, args)
    own = argparse.Namespace(**vars(args))
    for name, value in (_NEUTRAL | values).items():
        if name not in _CHOICES or getattr(own, name, None) is None:
            setattr(own, name, value)
    own.spec, own.yaml_cfg, own.transformer_impl = None, None, transformer_impl(args.transformer_impl)
    check_attention_environment(own.attention_backend, own.transformer_impl)
    own.padded_vocab_size = padded_vocab_size(
        values["vocab_size"], args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    config = gpt_config_from_args(own)
    config.rope_scaling_factor = own.rope_scaling_factor  # gpt_config_from_args of 0.19.2 forgets it and keeps 8
    config.transformer_layer_spec = partial(_layers, family)
    return config


def default_arguments(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    sequence_parallel: bool = False,
    virtual_pipeline_model_parallel_size: int | None = None,
    params_dtype: torch.dtype = torch.float32,
    make_vocab_size_divisible_by: int = 1,
    use_cpu_initialization: bool = True,
    **others: Any,
) -> argparse.Namespace:
    """Megatron's arguments for a tool without a training run: defaults of the parser, no dropout, nothing validated.

    Args:
        make_vocab_size_divisible_by: 1 keeps the vocabulary as it is, up to a multiple of the tensor-parallel size.
        use_cpu_initialization: weights are allocated on the CPU; loading or the caller moves them.
        others: any Megatron argument by its ``dest``.

    Raises:
        ValueError: a name that is not Megatron's.
    """
    args = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args([])
    values = machine_arguments(params_dtype) | {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "context_parallel_size": context_parallel_size,
        "sequence_parallel": sequence_parallel and tensor_model_parallel_size > 1,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "use_cpu_initialization": use_cpu_initialization,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": params_dtype == torch.bfloat16,
        "fp16": params_dtype == torch.float16,
        "overlap_p2p_comm": virtual_pipeline_model_parallel_size is not None,  # as validate_args would have it
    }
    unknown = [name for name in others if not hasattr(args, name)]
    if unknown:
        raise ValueError(f"default_arguments: found {', '.join(unknown)}; expected names of Megatron arguments")
    for name, value in (values | others).items():
        setattr(args, name, value)
    args.params_dtype = params_dtype
    args.virtual_pipeline_model_parallel_size = virtual_pipeline_model_parallel_size
    return args


def build_chunks(
    config: GPTModelConfig,
    pg_collection: ProcessGroupCollection,
    *,
    mixed_precision: bool = True,
    initialize: bool = False,
) -> list[MegatronModule]:
    """This rank's part of a model that only runs forward: eval mode, no gradients, no DistributedDataParallel.

    Args:
        config: of :func:`model_config`.
        pg_collection: process groups; the sizes must be those of the configuration.
        mixed_precision: wrap 16-bit chunks in Float16Module, as the schedules expect.
        initialize: draw random weights. Without it they are left unset and no random number is used; load them.

    Returns:
        One chunk per virtual pipeline stage, in order.
    """
    own = copy.copy(config)
    object.__setattr__(own, "transformer", copy.copy(config.transformer))
    own.transformer.perform_initialization = initialize
    if isinstance(own.transformer_layer_spec, partial):
        own.transformer_layer_spec = partial(own.transformer_layer_spec, pp_rank=pg_collection.pp.rank())
    builder = GPTModelBuilder(own)
    stages = own.transformer.virtual_pipeline_model_parallel_size
    chunks: list[MegatronModule] = []
    for stage in range(stages) if stages else [None]:
        # Without gradients Transformer Engine keeps FP8 weights once: no transposed copy, no 16-bit one on the host.
        with torch.no_grad():
            chunk = builder.build_model(pg_collection, vp_stage=stage)
        chunk.requires_grad_(False)
        if not own.transformer.use_cpu_initialization:
            chunk.cuda(torch.cuda.current_device())
        if mixed_precision and (own.transformer.bf16 or own.transformer.fp16):
            chunk = Float16Module(own.transformer, chunk)
        chunks.append(chunk.eval())
    return chunks


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside wrappers (Float16Module, DistributedDataParallel)."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module  # pyright: ignore[reportAssignmentType]
    return chunk
