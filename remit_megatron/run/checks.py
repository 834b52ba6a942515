"""What is refused at the start: settings that contradict each other, or that would be accepted and then not done."""

from __future__ import annotations

import argparse
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from remit_megatron.data.tokenizer import Tokenizer, load_tokenizer
from remit_megatron.evaluation.requests import RequestSuite, is_request_suite, read_request_suite
from remit_megatron.run.configuration import EvaluationConfig, RunConfig
from remit_megatron.runtime.errors import UserError, did_you_mean, show
from remit_megatron.runtime.installed import config_names, find_config

if TYPE_CHECKING:
    from remit_megatron.objectives import Objective

logger = logging.getLogger(__name__)

# Arguments that Megatron's parser knows and this loop does not honor.
_NOT_HONORED = {
    # Megatron knows norms of queries and keys by names that these models' do not have.
    "apply_wd_to_qk_layernorm": "optimizer.decay_norms",
    "step_batch_size_schedule": "megatron.global_batch_size",
    "non_persistent_save_interval": "megatron.save_interval",
}
# Read by Transformer Engine's layers of every family; a family's own `layer_flags` come to them.
_TRANSFORMER_ENGINE_LAYERS = (
    "attention_backend",
    "flash_attention_version",
    "batch_invariant_mode",
    "cp_comm_type",
    "hierarchical_context_parallel_sizes",
    "log_max_attention_logit",
    "te_precision_config_file",
    "tp_comm_overlap",
)
# Written beside the figures of TensorBoard, or not at all.
_TO_TENSORBOARD = (
    "log_memory_to_tensorboard",
    "log_timers_to_tensorboard",
    "log_validation_ppl_to_tensorboard",
    "log_world_size_to_tensorboard",
)


def check_supported(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Refuses what would be accepted and then not done.

    Raises:
        UserError: naming the setting.
    """
    for name, instead in _NOT_HONORED.items():
        if value := getattr(arguments, name):
            raise UserError(f"megatron.{name}", value, f"{instead} in its place")
    if arguments.dataloader_type != "single":
        raise UserError("megatron.dataloader_type", arguments.dataloader_type, "single; data.* says what is read")
    if arguments.iterations_to_skip and arguments.tensor_model_parallel_size > 1:
        # Megatron passes over samples on the first rank of a tensor-parallel group alone, and each rank reads its own.
        expected = "none with tensor_model_parallel_size > 1, whose ranks would read different samples afterwards"
        raise UserError("megatron.iterations_to_skip", arguments.iterations_to_skip, expected)
    steps = arguments.train_iters or arguments.train_samples // arguments.global_batch_size
    if outside := [step for step in arguments.iterations_to_skip if not 1 <= step < steps]:
        raise UserError("megatron.iterations_to_skip", outside[0], f"steps from 1 to before the last, {steps}")
    if arguments.profile and arguments.use_pytorch_profiler and not config.logging.tensorboard:
        raise UserError("logging.tensorboard", "false", "true with megatron.use_pytorch_profiler, which writes there")
    if arguments.masked_softmax_fusion:
        raise UserError("megatron.masked_softmax_fusion", "true", "false: no attention used here calls its kernels")
    for name in _TO_TENSORBOARD:
        if getattr(arguments, name) and not config.logging.tensorboard:
            raise UserError("logging.tensorboard", "false", f"true with megatron.{name}, which writes there")
    if config.spikes is not None and arguments.optimizer_cuda_graph:
        raise UserError("megatron.optimizer_cuda_graph", "true", "false with spikes: a graph leaves no update out")
    if config.spikes is not None and config.spikes.action == "rollback" and arguments.use_torch_fsdp2:
        raise UserError("spikes.action", "rollback with megatron.use_torch_fsdp2", "skip")
    if config.logging.wandb is not None and not config.logging.tensorboard:
        raise UserError(
            "logging.tensorboard", "false beside logging.wandb", "true: Megatron logs to wandb beside it only"
        )


def check_layers(hf_config: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Refuses settings that a model's layers do not read: the local ones, or Transformer Engine's of its family.

    Args:
        hf_config: of the student or of the reference.
        arguments: Megatron's, validated; a reference's are those of ``models.fp8.frozen_arguments``.

    Raises:
        UserError: naming the setting.
    """
    from remit_megatron.models.family import families, family_of

    family = family_of(hf_config)
    of_some = frozenset[str]().union(*(other.layer_flags for other in families().values()))
    for name in (*_TRANSFORMER_ENGINE_LAYERS, *sorted(of_some)):
        value = getattr(arguments, name)
        value = getattr(value, "name", value)  # of an enumeration
        if value in (None, False, "auto", ["p2p"], ["all_gather"]):
            continue
        found = "true" if value is True else show(value)
        if arguments.transformer_impl != "transformer_engine":
            expected = "nothing with local layers: Transformer Engine's alone read it"
            raise UserError(f"megatron.{name}", found, expected)
        if name in of_some - family.layer_flags:
            raise UserError(f"megatron.{name}", found, f"false: the layers of {family.name} do not take it")


def check_rounds(args: argparse.Namespace) -> None:
    """Refuses what Megatron's interleaved schedule raises on at the first step.

    Raises:
        UserError: naming the global batch.
    """
    stages, group = args.pipeline_model_parallel_size, getattr(args, "microbatch_group_size_per_vp_stage", None)
    if args.virtual_pipeline_model_parallel_size is None or stages == 1:
        return
    microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    group = stages if group is None else group
    if not stages <= group <= microbatches or 0 < microbatches % group < stages:
        found = f"{args.global_batch_size} ({microbatches} microbatches on each data-parallel rank)"
        expected = f"microbatches in whole rounds of the {stages} pipeline stages, as virtual stages take them"
        raise UserError("megatron.global_batch_size", found, expected)


def check_dropout(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Refuses dropout beside a selection from the global batch, which is made in a forward pass of its own.

    Raises:
        UserError: the two passes would see different losses.
    """
    for name in ("hidden_dropout", "attention_dropout"):
        if value := getattr(arguments, name):
            expected = f"0 with objective.scope {config.objective.scope}, which runs the student twice in a step"
            raise UserError(f"megatron.{name}", value, expected)


def check_linear_loss(config: RunConfig, arguments: argparse.Namespace, objective: Objective) -> None:
    """Refuses what cannot be computed without a microbatch's logits.

    Raises:
        UserError: the objective needs more than whole sequences one after the other, the dtype needs a loss scale
            before backward, or Megatron would compute the output weight's gradient or its FP8 product itself.
    """
    if not objective.by_sequence:
        name = config.objective.name
        raise UserError("loss.linear", "true", f"false with objective {name}, which needs more than single sequences")
    if arguments.fp16:
        raise UserError("loss.linear", "true", "false with megatron.fp16, whose gradients need the loss scale")
    if arguments.defer_embedding_wgrad_compute:
        raise UserError("megatron.defer_embedding_wgrad_compute", "true", "false with loss.linear")
    if arguments.fp8_output_proj:
        raise UserError("megatron.fp8_output_proj", "true", "false with loss.linear, which reads the weight itself")


def check_evaluation(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Refuses an evaluation during training whose suite is not there, or that cannot see the weights as they are.

    Raises:
        UserError: naming the setting.
    """
    settings = config.evaluation
    if settings is None:
        return
    if arguments.reuse_grad_buf_for_mxfp8_param_ag and arguments.overlap_param_gather:
        expected = "false with evaluation: between steps such parameters are in no buffer"
        raise UserError("megatron.reuse_grad_buf_for_mxfp8_param_ag", "true with overlap_param_gather", expected)
    read_suite(settings)


def read_suite(settings: EvaluationConfig) -> RequestSuite:
    """The requests of a run's suite.

    Raises:
        UserError: the suite or its requests are not there, or not of their form.
    """
    path = find_config(settings.suite)
    if not path.is_file():
        path = find_config(Path("configs/suites") / f"{settings.suite}.yaml", announce=False)
    if not path.is_file():
        files = {name: find_config(f"configs/suites/{name}.yaml", announce=False) for name in config_names("suites")}
        known = [name for name, file in files.items() if is_request_suite(file)]
        expected = f"a file, or one of {', '.join(known)}{did_you_mean(settings.suite, known)}"
        raise UserError("evaluation.suite", show(settings.suite), expected)
    return _read_once(path, settings.data, settings.limit)


@functools.cache
def _read_once(path: Path, data: str | None, limit: int | None) -> RequestSuite:
    return read_request_suite(path, data, limit=limit)  # checked before the run is opened, used after


def check_document_mask(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Refuses what packed sequences, Transformer Engine's form of document masks, cannot do.

    Raises:
        UserError: document masks with Transformer Engine and context parallelism, or with pipeline stages whose
            microbatches hold several sequences (the stages exchange [s, b, h], packed sequences are [s * b, 1, h]).
    """
    if not config.data.document_mask or arguments.transformer_impl != "transformer_engine":
        return
    if arguments.context_parallel_size > 1:
        raise UserError(
            "data.document_mask", "true with context_parallel_size > 1", "false, or megatron.transformer_impl=local"
        )
    sizes = {"megatron.micro_batch_size": arguments.micro_batch_size}
    if config.reference is not None:
        sizes["reference.micro_batch_size"] = config.reference.micro_batch_size or 1
    for name, size in sizes.items():
        if arguments.pipeline_model_parallel_size > 1 and size > 1:
            found = f"{size} with data.document_mask and pipeline stages"
            raise UserError(name, found, "1, or megatron.transformer_impl=local")


def check_reference_use(config: RunConfig, objective: Objective) -> None:
    """Refuses a run as its own reference; warns of scores that nobody makes.

    Raises:
        UserError: the reference would be another one at every start, the newest checkpoint of the run.
    """
    settings = config.reference
    if settings is None:
        return
    own = {Path(config.run_dir or "").resolve(), config.checkpoints_dir.resolve()}
    if objective.reference_signal != "none" and settings.checkpoint and Path(settings.checkpoint).resolve() in own:
        expected = "another model: the newest checkpoint of this run is another one at every start"
        raise UserError("reference.checkpoint", f"{settings.checkpoint}, the run itself", expected)
    if objective.reference_signal == "none" and settings.write_cache:
        logger.warning("reference.write_cache has no effect: objective %s asks no reference", config.objective.name)


def check_reference_settings(config: RunConfig, arguments: argparse.Namespace, *, signal: str) -> None:
    """Refuses settings of the reference that the objective or the layout cannot use.

    Args:
        signal: what the objective wants to know of the reference.

    Raises:
        UserError: naming the setting.
    """
    settings = config.reference
    assert settings is not None
    size, student_size = settings.micro_batch_size, arguments.micro_batch_size
    if size is not None and size % student_size:
        expected = f"a multiple of megatron.micro_batch_size {student_size}"
        raise UserError("reference.micro_batch_size", size, expected)
    _check_placement(config, arguments, signal=signal)
    if signal != "loss":
        expected = f"{{}}: {config.objective.name} needs whole distributions, which no cache holds"
        if settings.source == "cache":
            raise UserError("reference.source", "cache", expected.format("live"))
        if settings.write_cache:
            raise UserError("reference.write_cache", "true", expected.format("false"))


def _check_placement(config: RunConfig, arguments: argparse.Namespace, *, signal: str) -> None:
    settings = config.reference
    assert settings is not None
    if settings.placement != "replicated" or settings.source != "live" or arguments.pipeline_model_parallel_size == 1:
        return
    reason = None
    if signal != "loss":
        reason = f"{config.objective.name} needs whole distributions, not one number per token"
    elif settings.fp8 is not None:
        reason = "reference.fp8 compares two references in the pipeline"
    elif arguments.rerun_mode != "disabled":
        reason = f"megatron.rerun_mode {arguments.rerun_mode} repeats steps, and samples are read a step ahead"
    if reason is not None:
        raise UserError("reference.placement", "replicated", f"pipeline: {reason}")


# What Megatron compares with a checkpoint's, or finds its optimizer's parameters by: rates always, the others unless
# megatron.override_opt_param_scheduler takes the new ones.
_RATES = ("lr", "min_lr")
_SCHEDULE = (
    "lr_decay_style",
    "lr_warmup_init",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_fraction",
    "weight_decay",
    "weight_decay_incr_style",
    "start_weight_decay",
    "end_weight_decay",
)


def check_resumed_schedule(before: str, config: RunConfig) -> None:
    """Refuses to resume with a learning rate or schedule that is not the checkpoints', which Megatron fails on.

    Args:
        before: the configuration that the run was trained with, as YAML.

    Raises:
        UserError: naming the key, with both values.
    """
    now = config.megatron
    was = (yaml.safe_load(before) or {}).get("megatron") or {}
    keys: list[str] = [*_RATES]
    if not (now.get("override_opt_param_scheduler") or now.get("use_checkpoint_opt_param_scheduler")):
        keys += _SCHEDULE
        # The decay is as long as the run where nothing else is said.
        keys += ["lr_decay_iters"] if now.get("lr_decay_iters") else ["lr_decay_iters", "train_iters"]
        keys += ["lr_decay_samples"] if now.get("lr_decay_samples") else ["lr_decay_samples", "train_samples"]
        if not now.get("train_samples"):  # the length of the decay is kept in samples
            keys.append("global_batch_size")
    for key in keys:
        if was.get(key) != now.get(key):
            expected = f"{was.get(key)}, as the checkpoints in {config.run_dir} have it, or another run_dir"
            raise UserError(f"megatron.{key}", now.get(key), expected)


def check_reference(
    student: dict[str, Any],
    reference: dict[str, Any],
    tokenizer: Tokenizer,
    reference_tokenizer: str | Path | None,
    arguments: argparse.Namespace,
    *,
    student_tokenizer: str | Path | None = None,
) -> None:
    """Refuses a reference whose scores would mean something else, or that cannot be sharded like the student.

    Raises:
        UserError: naming the property, with both values.
    """
    from remit_megatron.models.build import check_layout, megatron_arguments

    if reference["vocab_size"] != student["vocab_size"]:
        raise UserError(
            "reference.checkpoint", f"vocab_size {reference['vocab_size']}", f"{student['vocab_size']}, the student's"
        )
    if reference_tokenizer is not None:
        digest = load_tokenizer(reference_tokenizer).digest
        if digest != tokenizer.digest:
            if student_tokenizer is not None and load_tokenizer(student_tokenizer).digest == digest:
                raise UserError(
                    "data.tokenizer", f"digest {tokenizer.digest[:16]}", f"{digest[:16]}, of both init and reference"
                )
            raise UserError(
                "reference.checkpoint", f"tokenizer digest {digest[:16]}", f"{tokenizer.digest[:16]}, the student's"
            )
    else:
        logger.warning("the reference brings no tokenizer: nothing says that it counts tokens as the student does")
    try:
        check_layout(megatron_arguments(reference), arguments)
    except UserError as error:
        expected = f"one that the student's {error.field} {error.found} fits: {error.expected}"
        raise UserError("reference.checkpoint", "a model", expected) from None
    if arguments.seq_length > reference.get("max_position_embeddings", arguments.seq_length):
        raise UserError(
            "reference.checkpoint",
            f"max_position_embeddings {reference['max_position_embeddings']}",
            f"at least megatron.seq_length {arguments.seq_length}",
        )


def check_reference_precision(
    config: RunConfig, reference: dict[str, Any], arguments: argparse.Namespace, *, signal: str
) -> None:
    """Refuses an FP8 reference that cannot run here, or whose effect the gate could not measure.

    Raises:
        UserError: naming the setting.
    """
    from remit_megatron.models.build import megatron_arguments
    from remit_megatron.models.fp8 import check_frozen

    assert config.reference is not None
    if config.reference.fp8 is None:
        return
    if signal == "hidden":
        expected = f"null with objective {config.objective.name}: it has no weights whose error could be measured"
        raise UserError("reference.fp8", config.reference.fp8, expected)
    check_frozen(config.reference.fp8, config.reference.fp8_recipe, megatron_arguments(reference), arguments)
