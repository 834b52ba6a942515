"""From a configuration to a run whose input has been found right, before anything expensive happens.

The training run, the scoring job, the dry run and the planner all begin here. Rules on single settings are in
``checks.py``.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remit_megatron.data.tokenizer import Tokenizer, load_tokenizer
from remit_megatron.run import checks
from remit_megatron.run.configuration import RunConfig, load_model_description
from remit_megatron.runtime import checkpoints
from remit_megatron.runtime.errors import UserError

if TYPE_CHECKING:
    from remit_megatron.conversion.source import ModelSource


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
    goes_on: bool = False  # whether init is a checkpoint of the run itself, in place of what the configuration names


@dataclass
class Examined:
    """What was found right of a configuration. None stands for what is not there, which a dry run is allowed."""

    hf_config: dict[str, Any]
    init: ModelSource | None
    reference: ModelSource | None
    tokenizer: Tokenizer | None
    objective_settings: dict[str, Any]
    arguments: argparse.Namespace
    goes_on: bool = False  # as in `Prepared`


def prepare(config: RunConfig, *, world_size: int, rank: int = 0) -> Prepared:
    """Checks everything that can be checked without a process group.

    Raises:
        UserError: the first thing that is wrong.
    """
    found = examine(config, world_size=world_size, rank=rank)
    assert found.tokenizer is not None
    return Prepared(
        config,
        found.hf_config,
        found.init,
        found.reference,
        found.tokenizer,
        found.objective_settings,
        found.arguments,
        found.goes_on,
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
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.build import megatron_arguments
    from remit_megatron.models.fp8 import frozen_arguments
    from remit_megatron.objectives import build_objective
    from remit_megatron.run.megatron_args import build_arguments

    settings = objective_settings(config)
    objective = build_objective(config.objective.name, **settings)
    checks.check_reference_use(config, objective)
    if config.run_dir is None:
        raise UserError("run_dir", "nothing", "the directory of the run")
    # A run that goes on is what its checkpoints are: init has no effect then, and need not be there any more.
    init = own = _own_checkpoint(config)
    # Without `model` the architecture comes from init, which then has to be there.
    init_absent = absent if config.model is not None else None
    if own is None and config.init is not None and not _is_absent("init", config.init, init_absent):
        init = resolve(config.init, field="init")
    if config.model is not None:
        hf_config = load_model_description(config.model)
    elif init is not None:
        hf_config = init.hf_config
    else:
        raise UserError("init", "nothing", "a checkpoint or a Hugging Face directory, or `model` for random weights")
    if init is not None and config.model is not None:
        _same_architecture(hf_config, init.hf_config, field="init" if own is None else "run_dir")
    architecture = megatron_arguments(hf_config)
    tokenizer = _tokenizer(config, init, absent)
    # What transformers appends (a padding token, say) may have no row: no data has it, or `samples` finds it there.
    if tokenizer is not None and tokenizer.own_vocab_size > hf_config["vocab_size"]:
        raise UserError(
            "data.tokenizer", f"{tokenizer.own_vocab_size} entries", f"at most the model's {hf_config['vocab_size']}"
        )
    arguments = build_arguments(config, architecture, world_size=world_size, rank=rank)
    checks.check_supported(config, arguments)
    checks.check_layers(hf_config, arguments)
    checks.check_document_mask(config, arguments)
    if absent is None or (config.evaluation is not None and Path(config.evaluation.data or ".").exists()):
        checks.check_evaluation(config, arguments)
    elif config.evaluation is not None:
        absent.append(f"evaluation.data {config.evaluation.data}")
    if objective.needs_global_batch:
        checks.check_dropout(config, arguments)
    if config.loss.linear:
        checks.check_linear_loss(config, arguments, objective)
    reference = None
    if objective.reference_signal != "none":
        if config.reference is None or config.reference.checkpoint is None:
            raise UserError("reference.checkpoint", "nothing", f"a model; objective {config.objective.name} needs one")
        if not _is_absent("reference.checkpoint", config.reference.checkpoint, absent):
            reference = resolve(config.reference.checkpoint, field="reference.checkpoint")
            checks.check_layers(reference.hf_config, frozen_arguments(arguments))
            if tokenizer is not None:
                checks.check_reference(
                    hf_config,
                    reference.hf_config,
                    tokenizer,
                    reference.tokenizer,
                    arguments,
                    student_tokenizer=None if init is None else init.tokenizer,
                )
        checks.check_reference_settings(config, arguments, signal=objective.reference_signal)
        # A reference that is not there is taken to be of the student's own shape.
        described = hf_config if reference is None else reference.hf_config
        checks.check_reference_precision(config, described, arguments, signal=objective.reference_signal)
    return Examined(hf_config, init, reference, tokenizer, settings, arguments, goes_on=own is not None)


def _own_checkpoint(config: RunConfig) -> ModelSource | None:
    """The newest checkpoint of the run's own that is complete by its files' sizes, or None."""
    from remit_megatron.conversion.source import resolve

    if config.checkpoint.resume == "never":
        return None
    root = config.checkpoints_dir
    for iteration in checkpoints.iterations(root):
        with contextlib.suppress(UserError):  # half a checkpoint is reported, and set aside, when the run starts
            return resolve(checkpoints.iteration_directory(root, iteration), field="run_dir")
    return None


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


def _same_architecture(described: dict[str, Any], found: dict[str, Any], *, field: str) -> None:
    from remit_megatron.models.build import checkpoint_arguments

    wanted, existing = checkpoint_arguments(described), checkpoint_arguments(found)
    for name, value in wanted.items():
        if existing.get(name) != value:
            raise UserError(field, f"a checkpoint with {name} {existing.get(name)}", f"{value}, as `model` says")


def total_steps(arguments: argparse.Namespace) -> int:
    """Iterations of the whole run; its length is given in iterations or in samples.

    Samples are counted from where the run goes on (`count_from`): those before may have come in other batches.
    """
    if arguments.train_samples is None:
        return arguments.train_iters
    step, consumed = getattr(arguments, "counted_from", (0, 0))
    return step + max(arguments.train_samples - consumed, 0) // arguments.global_batch_size


def count_from(arguments: argparse.Namespace, *, step: int, consumed: int) -> int:
    """Notes where a run goes on; the number of samples that it has read when it is done.

    Args:
        arguments: of the run; `total_steps` goes by what is noted.
        step: that it has come to.
        consumed: samples that it has been trained on. 0 where that is not known: then as many as its batches hold now.
    """
    consumed = consumed or step * arguments.global_batch_size
    arguments.counted_from = (step, consumed)
    return consumed + max(total_steps(arguments) - step, 0) * arguments.global_batch_size
