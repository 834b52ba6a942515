"""The embedded engine: a stage by TRL, on this machine or as ranks of a job.

Read :func:`run` top to bottom; it is a run. Nothing is written before everything that can be refused has been looked
at.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from remit_megatron.posttrain.chat import load_tokenizer, require_template, template_error
from remit_megatron.posttrain.checkpoints import newest_whole
from remit_megatron.posttrain.configuration import NO_TEMPLATE, PosttrainSettings, check_keep, dump
from remit_megatron.posttrain.examples import Example, as_text, digest_of, for_template, read_examples
from remit_megatron.posttrain.quiet import logs_in
from remit_megatron.posttrain.results import COMPLETE, compare_identity, write_model
from remit_megatron.posttrain.rewards import VerifiedReward
from remit_megatron.posttrain.token_ids import check_ids
from remit_megatron.posttrain.trl_arguments import REFUSALS, build_arguments, check_amount, resolved_arguments
from remit_megatron.runtime import parallel
from remit_megatron.runtime.errors import EXIT_DONE, EXIT_START_ME_AGAIN, DoNotRestart, UserError
from remit_megatron.runtime.exported import huggingface_model
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.float32 import exact_float32
from remit_megatron.runtime.locks import DirectoryLock
from remit_megatron.runtime.settings_files import first_line
from remit_megatron.runtime.whole_model import check_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against.

    Attributes:
        settings: as the configuration says.
        model: the Hugging Face directory that it starts from.
        tokenizer: transformers', with the template in force.
        template: whether strings and messages go through the tokenizer's template.
        examples: lines of ``data.train``, then those of ``data.valid``.
        train: how many of them are for training.
        reward: rlvr only.
        arguments: TRL's configuration object.
        identity: what a run that goes on must have in common with the one that was stopped.
    """

    settings: PosttrainSettings
    model: Path
    tokenizer: Any
    template: bool
    examples: list[Example]
    train: int
    reward: VerifiedReward | None
    arguments: Any
    identity: dict[str, Any]


def run(settings: PosttrainSettings) -> int:
    """Runs a stage, or goes on with it, on this rank (start it on all ranks of the job). Returns the exit code.

    May be called in a process that has imported TRL already, and again: nothing of it is left behind.

    Raises:
        UserError: the input is wrong; nothing has been changed on disk that a run needs.
    """
    with _ranks() as environment:
        prepared = prepare(settings)
        run_dir = Path(settings.run_dir)
        lock = None
        with parallel.same_fate("opening the run directory"):
            if environment.rank == 0:
                lock = DirectoryLock(run_dir)
        try:
            with logs_in(run_dir, environment.rank):
                return _run_in(run_dir, prepared, environment.rank)
        finally:
            if lock is not None:
                lock.release()


def describe(settings: PosttrainSettings) -> str:
    """The configuration as it would be used, every value of it checked; nothing is written.

    Raises:
        UserError: as :func:`run`.
    """
    with _ranks():
        return resolved(prepare(settings))


def prepare(settings: PosttrainSettings) -> Prepared:
    """Reads what the settings name and refuses what cannot be done; writes nothing.

    Raises:
        UserError: the input is wrong.
    """
    examples = read_examples(settings.data.train, stage=settings.stage, field="data.train")
    train = len(examples)
    if settings.data.valid:
        examples += read_examples(settings.data.valid, stage=settings.stage, field="data.valid")
    reward = VerifiedReward(examples, settings.verifier) if settings.stage == "rlvr" else None
    with parallel.same_fate("reading the model"):
        source = huggingface_model(settings.model, field="model")
        check_whole(source.path, field="model")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    tokenizer = load_tokenizer(source.path, settings.chat_template)
    require_template(tokenizer, examples, stage=settings.stage, model=source.path, chat_template=settings.chat_template)
    template = tokenizer.chat_template is not None
    check_ids(examples, tokenizer, model=source.path, stage=settings.stage, template=template)
    arguments = build_arguments(settings, has_valid=bool(settings.data.valid))
    check_amount(arguments, stage=settings.stage, records=train)
    if arguments.max_steps > 0:
        check_keep(settings.keep, arguments.max_steps)
    identity = {
        "stage": settings.stage,
        "model": source.digest,
        "data": digest_of(examples[:train]),
        "chat_template": _digest(tokenizer.chat_template) if template else NO_TEMPLATE,
        "verifier": settings.verifier,
        "seed": settings.seed,
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "trl": resolved_arguments(arguments),
    }
    return Prepared(settings, source.path, tokenizer, template, examples, train, reward, arguments, identity)


def resolved(prepared: Prepared) -> str:
    """config.yaml: the settings with every argument of TRL as it is used."""
    plain = prepared.settings.to_plain()
    trl = dict(prepared.identity["trl"])
    if "save_total_limit" in prepared.settings.trl:
        trl["save_total_limit"] = prepared.settings.trl["save_total_limit"]
    stage = {"stage": plain.pop("stage")}
    plain["chat_template"] = prepared.settings.chat_template or (None if prepared.template else NO_TEMPLATE)
    return dump({**stage, **plain, "trl": trl})


def _run_in(run_dir: Path, prepared: Prepared, rank: int) -> int:
    with parallel.same_fate("looking for what is done"):
        complete = run_dir / COMPLETE
        if complete.exists():
            record = json.loads(complete.read_text())
            compare_identity(record["identity"], prepared.identity, run_dir)
            if rank == 0:
                sys.stdout.write(f"nothing to do: {run_dir / 'model'} is written, after step {record['step']}\n")
            return EXIT_DONE
    checkpoint, step = None, 0
    with parallel.same_fate("looking for a checkpoint"):
        found = newest_whole(run_dir / "checkpoints", remove=True) if rank == 0 else None
        if found is not None:
            compare_identity(found[1].properties, prepared.identity, run_dir)
            checkpoint, step = str(found[0]), found[1].properties["iteration"]
    checkpoint, step = parallel.broadcast_object((checkpoint, step))
    with parallel.same_fate("writing the configuration"):
        if rank == 0:
            write_atomic(run_dir / "config.yaml", resolved(prepared))
            if checkpoint:
                sys.stdout.write(f"resuming at step {step} from {run_dir / 'checkpoints'}\n")
                sys.stdout.flush()
    return _train(run_dir, prepared, rank, checkpoint, step)


def _train(run_dir: Path, prepared: Prepared, rank: int, checkpoint: str | None, step: int) -> int:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from remit_megatron.posttrain.trl_callbacks import (
        MetricsWriter,
        ModelKeeper,
        StopOnSignal,
        StopWhereNotFinite,
        learnt_nothing,
    )

    settings, stopper = prepared.settings, StopOnSignal()
    trainer = _trainer(prepared)
    untied = _has_own_head(trainer.model)
    with stopper.listening():
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.remit_identity = prepared.identity
        trainer.remit_keep = settings.trl.get("save_total_limit")
        trainer.remit_keep_models = settings.keep
        if rank == 0:
            trainer.add_callback(MetricsWriter(run_dir, label=settings.stage, start=step))
            sys.stdout.write("".join(f"{cut.line()}\n" for cut in trainer.remit_cut))
            sys.stdout.flush()
        trainer.add_callback(StopWhereNotFinite())

        def write(model: Any, directory: Path) -> None:
            with parallel.same_fate("writing a model"):
                if rank == 0:
                    unwrapped = trainer.accelerator.unwrap_model(model)
                    template = prepared.tokenizer.chat_template if settings.chat_template else None
                    write_model(unwrapped, directory, source=prepared.model, chat_template=template, untied=untied)

        if settings.keep.every:
            models = run_dir / "models"
            keeper = ModelKeeper(settings.keep.every, lambda model, at: write(model, models / f"step-{at}"))
            trainer.add_callback(keeper)
        trainer.add_callback(stopper)
        with _generating(), _one_line(settings, until_step=lambda: trainer.state.global_step <= step):
            trainer.train(resume_from_checkpoint=checkpoint)
        if stopper.stopped:
            if rank == 0:
                sys.stderr.write(f"stopped after step {trainer.state.global_step}, which is saved: start it again\n")
            return EXIT_START_ME_AGAIN
        done, steps = trainer.state.global_step, trainer.state.max_steps
        if done < steps:
            raise DoNotRestart(f"{run_dir}: found an end after step {done}; expected one after step {steps}")
        entropy = settings.stage == "rlvr" and bool(trainer.args.entropy_coef or trainer.args.use_adaptive_entropy)
        nothing = parallel.broadcast_object(learnt_nothing(run_dir, entropy=entropy) if rank == 0 else None)
        if nothing is not None:
            raise DoNotRestart(f"{run_dir}: nothing was learnt, and no model is written: found {nothing}")
        write(trainer.model, run_dir / "model")
    if rank == 0:
        record = {"step": trainer.state.global_step, "identity": prepared.identity}
        write_atomic(run_dir / COMPLETE, json.dumps(record) + "\n")
        sys.stdout.write(f"{run_dir / 'model'}: the model after step {trainer.state.global_step}\n")
        sys.stdout.flush()
    return EXIT_DONE


def _trainer(prepared: Prepared) -> Any:
    from datasets import Dataset

    from remit_megatron.posttrain.trl_trainers import TRAINERS

    stage = prepared.settings.stage

    def dataset(begin: int, end: int) -> Dataset:
        rows: list[dict[str, Any]] = []
        for index in range(begin, end):
            example = prepared.examples[index]
            row: dict[str, Any] = dict(for_template(example, stage) if prepared.template else as_text(example, stage))
            rows.append(row | ({"example": index} if stage == "rlvr" else {}))
        return Dataset.from_list(rows)

    more = {"reward_funcs": prepared.reward} if stage == "rlvr" else {}
    total = len(prepared.examples)
    if prepared.tokenizer.padding_side != "left" and stage == "rlvr":
        prepared.tokenizer.padding_side = "left"
    with _one_line(prepared.settings):
        return TRAINERS[stage](
            model=str(prepared.model),
            args=prepared.arguments,
            train_dataset=dataset(0, prepared.train),
            eval_dataset=dataset(prepared.train, total) if total > prepared.train else None,
            processing_class=prepared.tokenizer,
            **more,
        )
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _one_line(settings: PosttrainSettings, *, until_step: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Makes one line of what the libraries raise where arguments or data are wrong; its traceback is in the logs.

    Args:
        until_step: whether the first step is still to be done; what is raised after it is a fault.
    """
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        logger.info("the template failed", exc_info=True)
        raise template_error(error, settings.chat_template, "of every line of data") from error
    except REFUSALS as error:
        if not until_step():
            raise
        logger.info("TRL refused the run", exc_info=True)
        raise UserError("trl", first_line(error), "arguments and data that TRL takes together") from error


def _has_own_head(model: Any) -> bool:
    """Whether transformers has not tied the head of a model although config.json says so: its files hold another."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    return bool(tied and head is not None and head.weight is not embedding.weight)


@contextlib.contextmanager
def _generating() -> Iterator[None]:
    """What torch raises where a completion is drawn from numbers that are none."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        found = "found probabilities of the next token that are not finite"
        expected = "finite ones: model (its weights may not be finite), trl.learning_rate"
        raise DoNotRestart(f"{found}; expected {expected}", alone=True) from error


def _digest(text: Any) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()


@contextlib.contextmanager
def _ranks() -> Iterator[parallel.RankEnvironment]:
    """Joins the job where there is one; accelerate, which keeps what it finds in globals, forgets it at the end."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    exact_float32()
    environment = parallel.rank_environment()
    started = environment.world_size > 1 and not dist.is_initialized()
    if started:
        parallel.initialize(environment)
    state = (torch.get_rng_state(), torch.is_grad_enabled())
    try:
        yield environment
    finally:
        torch.set_rng_state(state[0])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        if started and dist.is_initialized():
            dist.destroy_process_group()
