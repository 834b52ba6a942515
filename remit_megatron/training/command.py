"""``remit train``: from a configuration to Megatron's loop.

Read :func:`train` top to bottom; it is a run. What is refused before it is in ``prepare.py`` and ``checks.py``; what
happens inside Megatron's loop in ``engine.py`` and ``step.py``; what is changed in Megatron in ``patches/``.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import yaml

from remit_megatron.conversion.source import weights_fingerprint
from remit_megatron.run import directory as run_directory
from remit_megatron.run import resume
from remit_megatron.run.checks import check_rounds
from remit_megatron.run.configuration import RunConfig, load_config
from remit_megatron.run.events import RunEvents
from remit_megatron.run.prepare import Prepared, count_from, prepare, total_steps
from remit_megatron.run.samples import open_data
from remit_megatron.run.score_cache import RunScores, open_run_scores
from remit_megatron.runtime import checkpoints, launch, parallel, stop
from remit_megatron.runtime.errors import (
    EXIT_DO_NOT_RESTART,
    EXIT_DONE,
    EXIT_START_ME_AGAIN,
    DoNotRestart,
    StartAgain,
    UserError,
)
from remit_megatron.training.curves import resume_logs
from remit_megatron.training.health import no_update, not_finite

if TYPE_CHECKING:
    from remit_megatron.training.evaluation import RunEvaluation

logger = logging.getLogger(__name__)


# Bytes of a checkpoint per parameter, at most: weights, and in fp32 master weights and two moments.
_CHECKPOINT_BYTES_PER_PARAMETER = 16


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit train``."""
    parser.add_argument("config", metavar="CONFIG", help="run configuration (YAML)")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace the file's")
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="start N ranks on this machine (default: 1; for --dry-run as few as the layout takes)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and what follows from it"
    )


def run_train(args: argparse.Namespace) -> int:
    """Runs ``remit train``; returns the exit code."""
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from remit_megatron.run.dry_run import dry_run

        sys.stdout.write(dry_run(config, world_size=args.nproc))
        return EXIT_DONE
    if (args.nproc or 1) > 1 and not launch.under_launcher():
        # A mistake is found once, before ranks are started.
        check_rounds(prepare(config, world_size=args.nproc).arguments)
        return launch.launch(args.nproc, ["train", args.config, *args.overrides])
    return train(config)


def train(config: RunConfig) -> int:
    """Trains on this rank (start it on all ranks of the job). Returns the exit code.

    Raises:
        UserError: the input is wrong; nothing has been changed on disk that a run needs.
        DoNotRestart: the run has shown that it trains nothing.
    """
    environment = parallel.rank_environment()
    prepared = prepare(config, world_size=environment.world_size, rank=environment.rank)
    arguments = prepared.arguments
    check_rounds(arguments)
    run_dir = Path(config.run_dir or "")
    parallel.initialize(
        environment,
        timeout_minutes=arguments.distributed_timeout_minutes,
        own_stream=arguments.cuda_graph_impl == "transformer_engine",
    )

    lock = None
    with parallel.same_fate("opening the run directory"):
        if environment.rank == 0:
            lock = run_directory.RunLock(run_dir)
            Path(arguments.save).mkdir(parents=True, exist_ok=True)
    handler = run_directory.log_to_file(run_dir, environment.rank)
    events = RunEvents(run_dir, writes=environment.rank == 0)
    logging.getLogger().addHandler(events)
    refused = True
    try:
        code = _train_in(run_dir, prepared, environment, events)
        refused = False
        parallel.finish()
        return code
    except UserError:
        raise
    except BaseException:
        refused = False
        raise
    finally:
        for added in (handler, events):
            logging.getLogger().removeHandler(added)
            added.close()
        if lock is not None:
            if refused:
                lock.undo()
            lock.release()


def open_evaluation(prepared: Prepared, *, total_steps: int) -> RunEvaluation | None:
    """What scores the run's suite between its steps; None where none is asked for. The same on every rank.

    Raises:
        UserError: the suite or its requests are not there, or do not fit the run's sequences.
    """
    if prepared.config.evaluation is None:
        return None
    from remit_megatron.training.evaluation import RunEvaluation

    with parallel.same_fate("reading the evaluation's requests"):
        return RunEvaluation(prepared, total_steps=total_steps)


def _train_in(run_dir: Path, prepared: Prepared, environment: parallel.RankEnvironment, events: RunEvents) -> int:
    """What :func:`train` does while it holds the run's directory."""
    config, rank = prepared.config, environment.rank
    # What the checkpoints are compared with; Megatron fills in some of the values later.
    settings = resume.training_settings(vars(prepared.arguments), config)
    resumed_at, before = _resume(prepared, environment, settings)
    if prepared.goes_on and not resumed_at:  # its checkpoints were damaged: from the beginning, with what init names
        prepared = prepare(config, world_size=environment.world_size, rank=rank)
        prepared.arguments.load = None
    arguments = prepared.arguments
    # Not the product with the batch size, which may be another one now. 0 where the checkpoint does not say.
    consumed = int(before.get("consumed_samples", 0))
    samples = count_from(arguments, step=resumed_at, consumed=consumed)
    if resumed_at >= total_steps(arguments):
        if before.get("updates", 1) == 0:
            raise DoNotRestart(no_update(resumed_at))
        if rank == 0:
            another = run_directory.read_config(run_dir) not in (None, config.to_yaml())
            note = "; the configuration is not the one in config.yaml, and was not used" if another else ""
            sys.stdout.write(f"nothing to do: step {resumed_at} of {total_steps(arguments)} is done{note}\n")
        return EXIT_DONE
    train_samples, valid_samples = open_data(prepared, environment, samples=samples)
    datasets = [(dataset.prefix, dataset.identity) for dataset in train_samples.datasets]
    length = arguments.seq_length
    data = resume.data_record(datasets, train_samples.order.weights, config, sequence_length=length)
    minimised = _minimised(prepared, rank)
    in_force = resume.settings_in_force(settings, before, arguments)
    changed = [resume.batch_change(before.get("settings") or {}, in_force, consumed=consumed)]
    if "objective" in before:
        changed.append(resume.objective_change(before["objective"], minimised, step=resumed_at))
    if "data" in before:
        changed.append(resume.check_data(before["data"], data, config, consumed=consumed))
    if rank == 0:
        sys.stdout.write("".join(f"{line}\n" for line in changed if line))
    evaluation = open_evaluation(prepared, total_steps=total_steps(arguments))
    scores = open_run_scores(prepared, train_samples, rank=rank, consumed=consumed)
    if scores.cache is not None and scores.reads:
        from remit_megatron.reference.cached import ScoredSamples

        train_samples = ScoredSamples(train_samples, scores.cache)
    trained_with = run_directory.read_config(run_dir) if rank == 0 else None
    with parallel.same_fate("writing the configuration"):
        if rank == 0:
            run_directory.write_config(run_dir, config.to_yaml())
    stop.hold()  # from here on the run has begun, and says how it ends
    record = {"settings": in_force, "data": data, "objective": minimised}
    progress = Progress(resumed_at, int(before.get("updates", resumed_at)), record, spikes=before.get("spikes"))
    events.start(step=resumed_at, ranks=environment.world_size)
    reached = partial(getattr, arguments, "curr_iteration", resumed_at - 1)
    try:
        with _megatron_started(prepared, environment, progress):
            code = _train(prepared, environment, progress, (train_samples, valid_samples), scores, evaluation, events)
    except BaseException as error:
        if isinstance(error, UserError) and trained_with is not None and reached() < resumed_at:
            run_directory.write_config(run_dir, trained_with)  # what was refused has trained nothing
        _note_end(events, error, step=reached() + 1)
        raise
    events.end(step=reached() + 1, code=code)
    return code


def _minimised(prepared: Prepared, rank: int) -> dict[str, Any]:
    """`resume.objective_record` of the run, the same on every rank."""
    source = prepared.reference
    if source is None:
        return resume.objective_record(prepared.config, prepared.objective_settings, None)
    fingerprint = None
    with parallel.same_fate("reading the reference"):
        if rank == 0:
            fingerprint = weights_fingerprint(source)
    fingerprint = parallel.broadcast_object(fingerprint)
    return resume.objective_record(prepared.config, prepared.objective_settings, source.path, fingerprint)


def _note_end(events: RunEvents, error: BaseException, *, step: int) -> None:
    """Says in the run's events what ended it. A stop is no fault."""
    if isinstance(error, StartAgain):
        events.end(step=step, code=EXIT_START_ME_AGAIN)
        return
    code = {"code": EXIT_DO_NOT_RESTART} if isinstance(error, DoNotRestart) else {}
    events.end(step=step, reason=" ".join(f"{type(error).__name__}: {error}".split())[:500], **code)


def _resume(
    prepared: Prepared, environment: parallel.RankEnvironment, settings: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Points Megatron at the newest whole checkpoint of this run; returns its iteration and what its manifest says of
    the run, 0 and nothing for a new one."""
    config, arguments = prepared.config, prepared.arguments
    root = Path(arguments.save)
    arguments.load = None
    found = run_directory.newest_verified(root, rank=environment.rank, world_size=environment.world_size)
    if config.checkpoint.resume == "never":
        if found is not None:
            raise UserError(
                "checkpoint.resume", f"never, with checkpoint {found} in {root}", "auto, or another run_dir"
            )
        return 0, {}
    if found is None:
        return 0, {}
    properties: dict[str, Any] = {}
    with parallel.same_fate("comparing the configuration with the run's"):
        if environment.rank == 0:
            properties = checkpoints.read_manifest(checkpoints.iteration_directory(root, found)).properties
            _compare(properties, prepared, settings)
    properties = parallel.broadcast_object(properties)
    with parallel.same_fate("moving the checkpoint pointer"):
        if environment.rank == 0:
            checkpoints.point_to(root, found)
            logger.info("resuming at step %d", found)
            sys.stdout.write(f"resuming at step {found} from {root}\n")
    arguments.load = str(root)
    return found, properties


def _compare(properties: dict[str, Any], prepared: Prepared, settings: dict[str, Any]) -> None:
    """Refuses what a run may not change when it goes on.

    Args:
        properties: what the checkpoint's manifest says.
        settings: of :func:`resume.training_settings`.
    """
    config = prepared.config
    text = run_directory.read_config(Path(config.run_dir or ""))
    resume.compare_settings(properties, settings, config, prepared.arguments, text=text)
    if text is None:
        return
    content = yaml.safe_load(text) or {}
    if config.init is not None and content.get("init") not in (None, config.init):
        logger.warning("init %s has no effect: the run goes on from its own checkpoints", config.init)
    if "data" not in properties and (content.get("data") or {}).get("train") != config.data.train:
        logger.warning("data.train is not the one in config.yaml, and the checkpoints do not say what theirs was")


@dataclass(frozen=True)
class Progress:
    """How far a run has come before this start.

    Attributes:
        iteration: of the checkpoint that it goes on from; 0 for a new run.
        updates: of its weights.
        record: what the next checkpoints say of how it is trained.
        spikes: what the checkpoint knows of loss spikes, where they are looked for.
    """

    iteration: int
    updates: int
    record: dict[str, Any]
    spikes: dict[str, Any] | None = None


@contextmanager
def _megatron_started(prepared: Prepared, environment: parallel.RankEnvironment, progress: Progress) -> Iterator[None]:
    """Megatron's globals and its handler of one signal; the others do what that does.

    The ranks take this long differently (one opens tensorboard), and begin to handle signals together.
    """
    from megatron.training import global_vars

    arguments = prepared.arguments
    if environment.rank == environment.world_size - 1:  # which writes both
        resume_logs(prepared.config, resumed_at=progress.iteration)
    saves, arguments.exit_signal_handler = arguments.exit_signal_handler, False
    global_vars.set_global_variables(arguments, build_tokenizer=False)
    arguments.exit_signal_handler = saves
    parallel.leave_set_up_together()
    if saves:
        global_vars._set_signal_handler(arguments.exit_signal)
    with _others_as(arguments.exit_signal) if saves else stop.handled_by({}):
        yield


def _train(
    prepared: Prepared,
    environment: parallel.RankEnvironment,
    progress: Progress,
    datasets: tuple[Any, Any],
    scores: RunScores,
    evaluation: RunEvaluation | None,
    events: RunEvents,
) -> int:
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from patches.quiet_megatron import redirect
    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.models.build import model_config
    from remit_megatron.training.engine import Engine
    from remit_megatron.training.metrics import RunRecorder

    arguments, config = prepared.arguments, prepared.config
    student = model_config(prepared.hf_config, arguments)
    resumed_at = progress.iteration
    engine = Engine(
        prepared,
        environment,
        scores,
        samples=datasets[0],
        events=events,
        updates=progress.updates,
        spikes=progress.spikes,
        record=progress.record,
    )

    def before_wrapping(chunks: list) -> list:
        # Between construction and DDP: the optimizer's master weights are copied from what is loaded here.
        broken: dict[str, int] = {}
        with parallel.same_fate("loading the weights"):
            if prepared.init is not None and not resumed_at:
                load_weights(chunks, prepared.init)
                broken = not_finite(chunks)
            if environment.rank == 0:
                _require_space(arguments, chunks, environment.world_size)
        _warn_of_weights(broken)
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
    engine.connect(recorder, evaluation)
    redirect()

    def provider(_samples, vp_stage=None):
        # After the schedule is made of train_samples, and before the loop, which counts steps: Megatron's number of
        # them takes the batch size to have been the same all along.
        arguments.train_iters = total_steps(arguments)
        return (*datasets, None)

    provider.is_distributed = True  # type: ignore[attr-defined]  # every rank reads its own microbatches
    try:
        _pretrain(arguments, container, provider, engine.step.forward_step)
    finally:
        engine.close()
        if recorder is not None:
            recorder.close()
    code = _exit_code(arguments)
    if code == EXIT_START_ME_AGAIN and environment.rank == 0:
        step, total = arguments.curr_iteration + 1, total_steps(arguments)
        sys.stdout.write(f"stopped at step {step} of {total}, which is saved; start it again to go on\n")
    if code == EXIT_DONE and not engine.updates:
        raise DoNotRestart(no_update(total_steps(arguments)))
    return code


def _warn_of_weights(broken: dict[str, int]) -> None:
    """Says that weights of init are not finite; a run may never use them. Collective.

    Args:
        broken: of `not_finite` on this rank.
    """
    parts = [part for part in parallel.gather_objects(broken) if part]
    if parts:  # the log of every rank has it, the terminal rank 0's
        count, name = sum(sum(part.values()) for part in parts), next(iter(parts[0]))
        logger.warning("init: %d of its numbers are not finite, in %s first; they stay so", count, name)


def _pretrain(arguments: argparse.Namespace, container: Any, provider: Any, forward_step: Any) -> None:
    """Megatron's loop; what it ends with, in terms of this program."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        pretrain(container, provider, ModelType.encoder_or_decoder, forward_step)
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise
    except CheckpointException as error:
        raise checkpoints.write_error(error, arguments.save) from None
    except RuntimeError as error:
        if "Unexpected result" not in str(error):  # of megatron.check_for_nan_in_loss_and_grad, where it was asked for
            raise
        raise DoNotRestart(" ".join(str(error).split()), alone=True) from None


@contextmanager
def _others_as(number: signal.Signals) -> Iterator[None]:
    """Ctrl-C and the other stop signals do what Megatron's exit signal does: the step is finished and saved. The second
    Ctrl-C interrupts."""

    interrupted = signal.getsignal(signal.SIGINT)

    def pass_on(received: int, _: FrameType | None) -> None:
        if received == signal.SIGINT:
            signal.signal(received, interrupted)
        os.kill(os.getpid(), number)

    handlers = dict.fromkeys({signal.SIGINT, *stop.stop_signals()} - {number}, pass_on)
    with stop.handled_by(handlers, to_the_end=True):
        yield


def _require_space(arguments: argparse.Namespace, chunks: list, world_size: int) -> None:
    replicas = arguments.data_parallel_size * arguments.context_parallel_size
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters()) * world_size / replicas
    needed = parameters * _CHECKPOINT_BYTES_PER_PARAMETER
    run_directory.require_space(Path(arguments.save), needed, what="one checkpoint")


def _exit_code(arguments: argparse.Namespace) -> int:
    """0 where the run is done; 75 where it stopped on purpose before (a signal, an exit interval), having saved."""
    done = arguments.curr_iteration + 1 >= total_steps(arguments)
    return EXIT_DONE if done else EXIT_START_ME_AGAIN
