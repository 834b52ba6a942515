"""``remit train``: from a configuration to Megatron's loop.

Read :func:`train` and :func:`prepare` top to bottom; they are a run. What happens inside Megatron's loop is in
``engine.py`` and ``step.py``; what is changed in Megatron is in ``patches/``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remit_megatron import checkpoints, launch, parallel, run_directory
from remit_megatron.config import RunConfig, load_config, load_model_description
from remit_megatron.data.tokenizer import Tokenizer, load_tokenizer
from remit_megatron.errors import EXIT_DONE, EXIT_START_ME_AGAIN, UserError
from remit_megatron.run_cache import RunScores, open_run_scores

if TYPE_CHECKING:
    from remit_megatron.models.source import ModelSource
    from remit_megatron.objectives import Objective

logger = logging.getLogger(__name__)

# Bytes of a checkpoint per parameter, at most: weights, and in fp32 master weights and two moments.
_CHECKPOINT_BYTES_PER_PARAMETER = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit train``."""
    parser.add_argument("config", metavar="CONFIG", help="run configuration (YAML)")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace the file's")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="start N ranks on this machine (default: 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and what follows from it"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``remit train``; returns the exit code."""
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from remit_megatron.dry_run import dry_run

        sys.stdout.write(dry_run(config, world_size=args.nproc))
        return EXIT_DONE
    if args.nproc > 1 and not launch.under_launcher():
        return launch.launch(args.nproc, ["train", args.config, *args.overrides])
    return train(config)


@dataclass
class Prepared:
    """A run whose input has been found right, before anything expensive happens."""

    config: RunConfig
    hf_config: dict[str, Any]
    init: ModelSource | None  # None for random weights
    reference: ModelSource | None
    tokenizer: Tokenizer
    objective_settings: dict[str, Any]
    arguments: argparse.Namespace = field(repr=False)


@dataclass
class Examined:
    """What was found right of a configuration. None stands for what is not there, which a dry run is allowed."""

    hf_config: dict[str, Any]
    init: ModelSource | None
    reference: ModelSource | None
    tokenizer: Tokenizer | None
    objective_settings: dict[str, Any]
    arguments: argparse.Namespace


def prepare(config: RunConfig, *, world_size: int, rank: int = 0) -> Prepared:
    """Checks everything that can be checked without a process group.

    Raises:
        UserError: the first thing that is wrong.
    """
    found = examine(config, world_size=world_size, rank=rank)
    assert found.tokenizer is not None
    return Prepared(
        config, found.hf_config, found.init, found.reference, found.tokenizer, found.objective_settings, found.arguments
    )


def examine(config: RunConfig, *, world_size: int, rank: int = 0, absent: list[str] | None = None) -> Examined:
    """`prepare`, which can go on without files that the machine does not have.

    Args:
        absent: receives a line for each of ``init``, ``data.tokenizer`` and ``reference.checkpoint`` where nothing is;
            what depends on it is not checked. None, as in a run, refuses it.

    Raises:
        UserError: the first thing that is wrong. What is there and damaged is wrong in a dry run, too.
    """
    import patches

    patches.apply()
    from remit_megatron.megatron_args import build_arguments
    from remit_megatron.models.build import megatron_arguments
    from remit_megatron.models.source import resolve
    from remit_megatron.objectives import build_objective

    settings = objective_settings(config)
    objective = build_objective(config.objective.name, **settings)
    if config.run_dir is None:
        raise UserError("run_dir", "nothing", "the directory of the run")
    # Without `model` the architecture comes from init, which then has to be there.
    init_absent = absent if config.model is not None else None
    init = None
    if config.init is not None and not _is_absent("init", config.init, init_absent):
        init = resolve(config.init, field="init")
    if config.model is not None:
        hf_config = load_model_description(config.model)
    elif init is not None:
        hf_config = init.hf_config
    else:
        raise UserError("init", "nothing", "a checkpoint or a Hugging Face directory, or `model` for random weights")
    if init is not None and config.model is not None:
        _same_architecture(hf_config, init.hf_config)
    tokenizer = _tokenizer(config, init, absent)
    if tokenizer is not None and tokenizer.vocab_size > hf_config["vocab_size"]:
        raise UserError(
            "data.tokenizer", f"{tokenizer.vocab_size} entries", f"at most the model's {hf_config['vocab_size']}"
        )
    arguments = build_arguments(config, megatron_arguments(hf_config), world_size=world_size, rank=rank)
    check_supported(config, arguments)
    check_document_mask(config, arguments)
    if objective.needs_global_batch:
        check_dropout(config, arguments)
    if config.loss.linear:
        check_linear_loss(config, arguments, objective)
    reference = None
    if objective.reference_signal != "none":
        if config.reference is None or config.reference.checkpoint is None:
            raise UserError("reference.checkpoint", "nothing", f"a model; objective {config.objective.name} needs one")
        if not _is_absent("reference.checkpoint", config.reference.checkpoint, absent):
            reference = resolve(config.reference.checkpoint, field="reference.checkpoint")
            if tokenizer is not None:
                check_reference(hf_config, reference.hf_config, tokenizer, reference.tokenizer, arguments)
        check_reference_settings(config, arguments, signal=objective.reference_signal)
        # A reference that is not there is taken to be of the student's own shape.
        described = hf_config if reference is None else reference.hf_config
        check_reference_precision(config, described, arguments, signal=objective.reference_signal)
    return Examined(hf_config, init, reference, tokenizer, settings, arguments)


def _is_absent(key: str, path: str, absent: list[str] | None) -> bool:
    """Whether nothing is at ``path`` and that is allowed; noted in ``absent``."""
    if absent is None or Path(path).exists():
        return False
    absent.append(f"{key} {path}")
    return True


def objective_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of the objective section that the objective of that name takes."""
    from remit_megatron.objectives import settings_of

    return {name: getattr(config.objective, name) for name in settings_of(config.objective.name)}


def _tokenizer(config: RunConfig, init: ModelSource | None, absent: list[str] | None) -> Tokenizer | None:
    directory = config.data.tokenizer or (init.tokenizer if init is not None else None)
    if config.data.tokenizer and _is_absent("data.tokenizer", config.data.tokenizer, absent):
        return None
    if directory is None and absent and config.init:
        return None  # it would be the one beside init, which is noted already
    if directory is None:
        raise UserError("data.tokenizer", "nothing", "a directory with tokenizer.json")
    return load_tokenizer(directory)


def _same_architecture(described: dict[str, Any], found: dict[str, Any]) -> None:
    from remit_megatron.models.build import megatron_arguments

    wanted, existing = megatron_arguments(described), megatron_arguments(found)
    for name, value in wanted.items():
        # A longer context is a legitimate thing to train for.
        if name != "max_position_embeddings" and existing.get(name) != value:
            raise UserError("init", f"a checkpoint with {name} {existing.get(name)}", f"{value}, as `model` says")


# Arguments that Megatron's parser knows and this loop does not honor.
_NOT_HONORED = {
    "step_batch_size_schedule": "megatron.global_batch_size",
    "full_validation": "megatron.eval_iters",
    "multiple_validation_sets": "one blend in data.valid",
    "non_persistent_save_interval": "megatron.save_interval",
}


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
    if config.logging.wandb is not None and not config.logging.tensorboard:
        raise UserError(
            "logging.tensorboard", "false beside logging.wandb", "true: Megatron logs to wandb beside it only"
        )


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


def check_reference(
    student: dict[str, Any],
    reference: dict[str, Any],
    tokenizer: Tokenizer,
    reference_tokenizer: str | Path | None,
    arguments: argparse.Namespace,
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


def train(config: RunConfig) -> int:
    """Trains on this rank (start it on all ranks of the job). Returns the exit code.

    Raises:
        UserError: the input is wrong; nothing has been changed on disk that a run needs.
    """
    environment = parallel.rank_environment()
    prepared = prepare(config, world_size=environment.world_size, rank=environment.rank)
    arguments = prepared.arguments
    run_dir = Path(config.run_dir or "")
    parallel.initialize(environment, timeout_minutes=arguments.distributed_timeout_minutes)

    lock = None
    with parallel.same_fate("opening the run directory"):
        if environment.rank == 0:
            lock = run_directory.RunLock(run_dir)
            run_directory.write_config(run_dir, config.to_yaml())
            Path(arguments.save).mkdir(parents=True, exist_ok=True)
    handler = run_directory.log_to_file(run_dir, environment.rank)
    try:
        resumed_at = _resume(config, arguments, environment)
        if resumed_at >= total_steps(arguments):
            if environment.rank == 0:
                sys.stdout.write(f"nothing to do: step {resumed_at} of {total_steps(arguments)} is done\n")
            return EXIT_DONE
        train_samples, valid_samples = _open_data(prepared, environment)
        consumed = consumed_samples(arguments, resumed_at)
        scores = open_run_scores(prepared, train_samples, rank=environment.rank, consumed=consumed)
        if scores.cache is not None and scores.reads:
            from remit_megatron.reference.cached import ScoredSamples

            train_samples = ScoredSamples(train_samples, scores.cache)
        return _train(prepared, environment, resumed_at, (train_samples, valid_samples), scores)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        if lock is not None:
            lock.release()


def _resume(config: RunConfig, arguments: argparse.Namespace, environment: parallel.RankEnvironment) -> int:
    """Points Megatron at the newest whole checkpoint of this run; returns its iteration, 0 for a new run."""
    root = Path(arguments.save)
    arguments.load = None
    found = run_directory.newest_verified(root, rank=environment.rank, world_size=environment.world_size)
    if config.checkpoint.resume == "never":
        if found is not None:
            raise UserError(
                "checkpoint.resume", f"never, with checkpoint {found} in {root}", "auto, or another run_dir"
            )
        return 0
    if found is None:
        return 0
    with parallel.same_fate("moving the checkpoint pointer"):
        if environment.rank == 0:
            checkpoints.point_to(root, found)
            logger.info("resuming at step %d", found)
            sys.stdout.write(f"resuming at step {found} from {root}\n")
    arguments.load = str(root)
    return found


def total_steps(arguments: argparse.Namespace) -> int:
    """Iterations of the whole run; its length is given in iterations or in samples."""
    return arguments.train_iters or arguments.train_samples // arguments.global_batch_size


def consumed_samples(arguments: argparse.Namespace, iteration: int) -> int:
    """A lower bound of the samples that a run has trained on after ``iteration`` steps (exact without a ramp-up)."""
    start = arguments.global_batch_size if arguments.rampup_batch_size is None else int(arguments.rampup_batch_size[0])
    return iteration * start


def _open_data(prepared: Prepared, environment: parallel.RankEnvironment) -> tuple[Any, Any]:
    """Opens the training and validation samples: rank 0 first, which builds the index that the others map."""
    arguments = prepared.arguments
    samples = total_steps(arguments) * arguments.global_batch_size
    train = valid = None
    for turn in (environment.rank == 0, environment.rank != 0):
        with parallel.same_fate("opening the data"):
            if turn:
                train, valid = open_datasets(prepared, samples)
    return train, valid


def open_datasets(prepared: Prepared, train_samples: int) -> tuple[Any, Any]:
    """The run's training samples, and its validation samples or None."""
    from remit_megatron.data.blend import open_blend, parse_blend

    config, arguments = prepared.config, prepared.arguments
    common: dict[str, Any] = dict(
        sequence_length=arguments.seq_length,
        packing_seed=config.data.packing_seed,
        cache_dir=config.data_cache_dir,
        tokenizer_digest=prepared.tokenizer.digest,
        eod_id=prepared.tokenizer.eod_id,
        mask_eod_loss=config.data.mask_eod_loss,
    )
    if not config.data.train:
        raise UserError("data.train", "nothing", "a list of [weight, prefix] pairs")
    train = open_blend(
        parse_blend(config.data.train, field="data.train"), num_samples=train_samples, seed=config.seed, **common
    )
    if not config.data.valid:
        return train, None
    # The same samples at every validation, so that its losses compare.
    valid_samples = arguments.eval_iters * arguments.eval_global_batch_size
    valid = open_blend(
        parse_blend(config.data.valid, field="data.valid"), num_samples=valid_samples, seed=config.seed, **common
    )
    return train, RepeatedSamples(valid)


class RepeatedSamples:
    """A data set gone through again and again, always in the same order. Its length is Megatron's idea of enough."""

    def __init__(self, samples: Any):
        from megatron.core.datasets.utils import Split

        self._samples = samples
        self.split = Split.valid  # Megatron's loader takes the validation batch sizes by it

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, index: int) -> Any:
        return self._samples[index % len(self._samples)]


def _train(
    prepared: Prepared,
    environment: parallel.RankEnvironment,
    resumed_at: int,
    datasets: tuple[Any, Any],
    scores: RunScores,
) -> int:
    from megatron.core.enums import ModelType
    from megatron.training import global_vars, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from patches.quiet_megatron import redirect
    from remit_megatron.engine import Engine
    from remit_megatron.metrics import RunRecorder
    from remit_megatron.models.build import model_config
    from remit_megatron.models.convert import load_weights

    arguments, config = prepared.arguments, prepared.config
    global_vars.set_global_variables(arguments, build_tokenizer=False)
    student = model_config(prepared.hf_config, arguments)
    engine = Engine(prepared, environment, scores)

    def before_wrapping(chunks: list) -> list:
        # Between construction and DDP: the optimizer's master weights are copied from what is loaded here.
        with parallel.same_fate("loading the weights"):
            if prepared.init is not None and not resumed_at:
                load_weights(chunks, prepared.init)
            if environment.rank == 0:
                _require_space(arguments, chunks, environment.world_size)
        with parallel.same_fate("loading the reference"):
            engine.build_reference()
        return chunks

    student.pre_wrap_hooks.append(before_wrapping)
    container = pretrain_cfg_container_from_args(arguments, student)
    recorder = None
    with parallel.same_fate("opening the files of the run"):
        if environment.rank == environment.world_size - 1:  # the last pipeline stage, where the losses are
            recorder = RunRecorder(
                config.run_dir or "",
                total_steps=total_steps(arguments),
                resumed_at=resumed_at,
                interval=config.logging.interval,
            )
    engine.connect(recorder)
    redirect()

    def provider(_samples, vp_stage=None):
        return (*datasets, None)

    provider.is_distributed = True  # type: ignore[attr-defined]  # every rank reads its own microbatches
    try:
        pretrain(container, provider, ModelType.encoder_or_decoder, engine.step.forward_step)
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise
    finally:
        engine.close()
        if recorder is not None:
            recorder.close()
    return _exit_code(arguments)


def _require_space(arguments: argparse.Namespace, chunks: list, world_size: int) -> None:
    replicas = arguments.data_parallel_size * arguments.context_parallel_size
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters()) * world_size / replicas
    needed = parameters * _CHECKPOINT_BYTES_PER_PARAMETER
    run_directory.require_space(Path(arguments.save), needed, what="one checkpoint")


def _exit_code(arguments: argparse.Namespace) -> int:
    """0 where the run is done; 75 where it stopped on purpose before (a signal, an exit interval), having saved."""
    done = arguments.curr_iteration + 1 >= total_steps(arguments)
    return EXIT_DONE if done else EXIT_START_ME_AGAIN
