"""What follows from a configuration: the numbers that ``remit train --dry-run`` prints.

Nothing is built. Parameters are counted from the architecture's sizes, and the learning rate is asked from Megatron's
own scheduler.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from remit_megatron.run.configuration import RunConfig
from remit_megatron.run.optimization import scheduler
from remit_megatron.runtime.progress import format_count


@dataclass(frozen=True)
class PlanNumbers:
    """Derived numbers of a run; samples, tokens and parameters are counts, learning rates are per step."""

    world_size: int
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    data_parallel: int
    sequence_length: int
    micro_batch_size: int
    microbatches: int
    samples_per_step: int
    tokens_per_step: int
    steps: int
    total_tokens: int
    warmup_steps: float
    first_learning_rate: float
    peak_learning_rate: float
    last_learning_rate: float
    parameters: int
    parameters_by_stage: tuple[int, ...]
    vocab_size: int
    padded_vocab_size: int


# Parameters of a layer that no argument of Megatron tells of: (sharded over tensor-parallel ranks, held by each). What
# Family.unlisted_parameters says; most families have none.
Unlisted = tuple[int, int]


def plan_numbers(args: argparse.Namespace, *, unlisted: Unlisted = (0, 0)) -> PlanNumbers:
    """Derives the numbers from a validated namespace.

    With ``step_batch_size_schedule`` the batch changes during the run: numbers of a step are those of its first one,
    steps count the whole run.

    Args:
        args: Megatron's namespace from :func:`remit_megatron.run.megatron_args.build_arguments`.
        unlisted: the family's further parameters of a layer (:data:`Unlisted`).
    """
    data_parallel = args.data_parallel_size
    batch, steps, samples = _length(args)
    warmup, first, last = _learning_rates(args, batch=batch, samples=samples, steps=steps)
    return PlanNumbers(
        world_size=args.world_size,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        context_parallel=args.context_parallel_size,
        data_parallel=data_parallel,
        sequence_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        microbatches=batch // (args.micro_batch_size * data_parallel),
        samples_per_step=batch,
        tokens_per_step=batch * args.seq_length,
        steps=steps,
        total_tokens=samples * args.seq_length,
        warmup_steps=warmup,
        first_learning_rate=first,
        peak_learning_rate=args.lr,
        last_learning_rate=last,
        parameters=count_parameters(args, unlisted=unlisted),
        parameters_by_stage=tuple(
            parameters_on_rank(args, stage, unlisted=unlisted) for stage in range(args.pipeline_model_parallel_size)
        ),
        vocab_size=args.vocab_size,
        padded_vocab_size=args.padded_vocab_size,
    )


def describe(config: RunConfig, args: argparse.Namespace, *, unlisted: Unlisted = (0, 0)) -> str:
    """The numbers as an aligned table, one per line, ending with a newline.

    Args:
        config: the run.
        args: Megatron's namespace from :func:`remit_megatron.run.megatron_args.build_arguments`.
        unlisted: the family's further parameters of a layer (:data:`Unlisted`).
    """
    plan = plan_numbers(args, unlisted=unlisted)
    axes = f"tensor {plan.tensor_parallel} x pipeline {plan.pipeline_parallel} x context {plan.context_parallel}"
    by_stage = plan.parameters_by_stage
    per_rank = " | ".join(format_count(count) for count in by_stage) + (
        " by pipeline stage" if len(by_stage) > 1 else ""
    )
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    if args.fp8:
        precision += f" with fp8 ({args.fp8}, {getattr(args.fp8_recipe, 'value', args.fp8_recipe)})"
    evaluation = f"every {args.eval_interval} steps, {args.eval_iters} batches" if args.eval_iters else "none"
    kept = "all" if config.checkpoint.keep is None else f"newest {config.checkpoint.keep}"
    batch = f"{plan.samples_per_step:,} samples = {plan.tokens_per_step:,} tokens"
    if args.step_batch_size_schedule is not None:
        batch += f" at first, then by schedule ({args.step_batch_size_schedule})"
    rate = f"{plan.first_learning_rate:.3g} at the first step, {plan.peak_learning_rate:.3g} at the peak"
    rows = [
        ("objective", config.objective.name),
        ("parameters", f"{plan.parameters:,} ({format_count(plan.parameters)})"),
        ("parameters per rank", f"{per_rank}, {precision}, {args.transformer_impl} layers"),
        ("vocabulary", f"{plan.vocab_size:,}, padded to {plan.padded_vocab_size:,}"),
        ("ranks", f"{plan.world_size} = {axes} x data {plan.data_parallel}"),
        ("sequence length", f"{plan.sequence_length:,} tokens"),
        ("batch", batch),
        ("microbatches per step", f"{plan.microbatches} of {plan.micro_batch_size} on each data-parallel rank"),
        ("steps", f"{plan.steps:,}"),
        ("tokens in all", f"{plan.total_tokens:,} ({format_count(plan.total_tokens)})"),
        ("learning rate", f"{rate}, {plan.last_learning_rate:.3g} at the last step ({args.lr_decay_style})"),
        ("warm-up", f"{plan.warmup_steps:g} steps"),
        ("evaluation", evaluation),
        ("checkpoints", f"every {args.save_interval} steps and at the end, {kept} kept, in {args.save}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in rows)


def count_parameters(args: argparse.Namespace, *, unlisted: Unlisted = (0, 0)) -> int:
    """Parameters of the model without vocabulary padding: what its Hugging Face form has."""
    tables = 2 if args.untie_embeddings_and_output_weights else 1
    layer = sum(_layer(args)) + sum(unlisted)
    return tables * args.vocab_size * args.hidden_size + args.num_layers * layer + _norm(args)


def parameters_on_rank(args: argparse.Namespace, stage: int, *, unlisted: Unlisted = (0, 0)) -> int:
    """Parameters on a rank of pipeline stage ``stage``, with vocabulary padding and copies of tied embeddings."""
    tp, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    sharded, replicated = (known + further for known, further in zip(_layer(args), unlisted, strict=True))
    count = layers_of_stage(args, stage) * (sharded // tp + replicated)
    table = args.padded_vocab_size // tp * args.hidden_size
    if stage == 0:
        count += table
    if stage == stages - 1:
        # Tied embeddings on one stage are one tensor; over several stages the last one holds a copy.
        count += _norm(args) + (table if args.untie_embeddings_and_output_weights or stages > 1 else 0)
    return count


def layers_of_stage(args: argparse.Namespace, stage: int) -> int:
    """Transformer layers on one pipeline stage, all its virtual stages together."""
    stages, last = args.pipeline_model_parallel_size, args.pipeline_model_parallel_size - 1
    if stages == 1:
        return args.num_layers
    if args.pipeline_model_parallel_layout is not None:
        return _layers_of_layout(args, stage)
    at_first, at_last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if at_first is None and at_last is None:
        embedding, loss = args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split
        share = (args.num_layers + bool(embedding) + bool(loss)) // stages
        return share - (bool(embedding) and stage == 0) - (bool(loss) and stage == last)
    if stage == 0 and at_first is not None:
        return at_first
    if stage == last and at_last is not None:
        return at_last
    fixed = [count for count in (at_first, at_last) if count is not None]
    return (args.num_layers - sum(fixed)) // (stages - len(fixed))


def _layers_of_layout(args: argparse.Namespace, stage: int) -> int:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = args.pipeline_model_parallel_layout
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    return sum(kinds.count(LayerType.decoder) for kinds in layout.layout[stage])


def _norm(args: argparse.Namespace) -> int:
    return args.hidden_size * (2 if args.normalization == "LayerNorm" else 1)


def _layer(args: argparse.Namespace) -> tuple[int, int]:
    """Parameters of one layer: (sharded over tensor-parallel ranks, held by each of them)."""
    hidden, heads = args.hidden_size, args.num_attention_heads
    gated = 2 if args.swiglu or args.quick_geglu else 1
    sharded = (gated + 1) * hidden * args.ffn_hidden_size
    replicated = 2 * _norm(args)
    if args.multi_latent_attention:
        attention, norms = _latent_attention(args)
        sharded, replicated = sharded + attention, replicated + norms
    else:
        groups = args.num_query_groups if args.group_query_attention else heads
        projected = (heads + 2 * groups) * args.kv_channels
        sharded += hidden * projected + heads * args.kv_channels * hidden
        if args.add_bias_linear or args.add_qkv_bias:
            sharded += projected
        if args.qk_layernorm:
            replicated += 2 * args.kv_channels * (2 if args.normalization == "LayerNorm" else 1)
    if args.add_bias_linear:
        sharded += gated * args.ffn_hidden_size
        replicated += 2 * hidden  # row-parallel layers add their bias after the reduction
    return sharded, replicated


def _latent_attention(args: argparse.Namespace) -> tuple[int, int]:
    """Parameters of multi-latent attention in one layer: (sharded over tensor-parallel ranks, held by each of them)."""
    hidden, heads, query_rank = args.hidden_size, args.num_attention_heads, args.q_lora_rank
    query = heads * (args.qk_head_dim + args.qk_pos_emb_head_dim)
    sharded = hidden * query if query_rank is None else query_rank * query
    sharded += args.kv_lora_rank * heads * (args.qk_head_dim + args.v_head_dim) + heads * args.v_head_dim * hidden
    down = hidden * ((query_rank or 0) + args.kv_lora_rank + args.qk_pos_emb_head_dim)
    norms = (query_rank or 0) + args.kv_lora_rank if args.qk_layernorm else 0
    # Transformer Engine's layers keep the down projections whole, the local ones shard them.
    return (sharded, down + norms) if args.transformer_impl == "transformer_engine" else (sharded + down, norms)


def _length(args: argparse.Namespace) -> tuple[int, int, int]:
    """(samples of the first step, steps, samples in all)."""
    if args.step_batch_size_schedule is None:
        # As Megatron counts: samples that do not fill a last batch are not trained on.
        steps = args.train_iters or args.train_samples // args.global_batch_size
        return args.global_batch_size, steps, steps * args.global_batch_size
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    calculator = StepBatchsizeNumMicroBatchesCalculator(
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
        decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
        rank=args.rank,
        schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    samples = steps = first = 0
    while (steps < args.train_iters) if args.train_iters else (samples < args.train_samples):
        calculator.update(samples, consistency_check=False)
        batch = calculator.get_current_global_batch_size()
        first, samples, steps = first or batch, samples + batch, steps + 1
    return first, steps, samples


def _learning_rates(args: argparse.Namespace, *, batch: int, samples: int, steps: int) -> tuple[float, float, float]:
    """(warm-up steps, learning rate of the first step, of the last step)."""
    schedule = scheduler(args)
    (group,) = schedule.optimizer.param_groups
    first = schedule.get_lr(group)
    schedule.num_steps = max(samples - samples // max(steps, 1), 0)  # the last step is taken before its samples count
    return schedule.lr_warmup_steps / batch, first, schedule.get_lr(group)
