"""What runs inside Megatron's loop: the step, the frozen reference, and what is done after a step and around a save.

The places in the loop are opened by ``patches/``; :meth:`Engine.connect` says what stands there.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import multiprocessing
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from remit_megatron.models.attention_probe import packed_attention_fault
from remit_megatron.models.forward import ModelForward
from remit_megatron.objectives import SelectingObjective, build_objective
from remit_megatron.objectives.kd import Distillation
from remit_megatron.reference.idle import IdleFiller
from remit_megatron.reference.source import ScoreSource
from remit_megatron.run import directory as run_directory
from remit_megatron.run.prepare import total_steps
from remit_megatron.run.score_cache import RunScores
from remit_megatron.runtime import checkpoints, parallel
from remit_megatron.runtime.errors import DoNotRestart
from remit_megatron.runtime.files import HF_SUBFOLDER
from remit_megatron.runtime.parallel import RankEnvironment
from remit_megatron.training.first_look import FirstLook, nothing_to_distill
from remit_megatron.training.health import StepOutcome, StepWatch, dropped_share
from remit_megatron.training.metrics import RunRecorder, peak_flops, step_statistics, token_counts
from remit_megatron.training.scores import ScoreParts, build_score_source
from remit_megatron.training.slow_ranks import RankWatch
from remit_megatron.training.spike_gate import SpikeGate
from remit_megatron.training.spikes import Spike, samples_text, step_samples
from remit_megatron.training.step import TrainingStep
from remit_megatron.training.weight_decay import weight_decay_overrides

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from remit_megatron.run.events import RunEvents
    from remit_megatron.run.prepare import Prepared
    from remit_megatron.training.evaluation import RunEvaluation


def _end_workers() -> None:
    """Ends data workers that are left when the program ends of an error.

    Python asks them by SIGTERM and waits for ever; but they were forked with the handlers of the run, which take that
    for the wish to stop after a step.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would say that a worker was killed
    for child in multiprocessing.active_children():
        child.kill()


class Engine:
    """The parts of one run; those that need process groups are made when Megatron has them.

    Args:
        prepared: the run.
        environment: this rank.
        scores: what the run knows of its reference scores.
        samples: the run's training samples.
        events: of this start; None keeps none.
        updates: of the weights that the run has made before this start.
        spikes: what the checkpoint that the run goes on from knows of `spikes`.
        record: what checkpoints say of how the run was trained, beside what they hold.

    Attributes:
        updates: of the weights that the run has made so far; a skipped step makes none.
    """

    def __init__(
        self,
        prepared: Prepared,
        environment: RankEnvironment,
        scores: RunScores,
        *,
        samples: Any = None,
        events: RunEvents | None = None,
        updates: int = 0,
        spikes: dict[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ):
        self._record_of_run = dict(record or {})
        self._prepared = prepared
        self._run_scores = scores
        self._environment = environment
        self._arguments = prepared.arguments
        self._root = Path(prepared.arguments.save)
        self._groups: Any = None
        self._score_parts = ScoreParts()
        self._recorder: RunRecorder | None = None
        self._peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self._last_checkpoint_size = 0
        self._companions = _companion_files(prepared) if environment.rank == 0 else {}
        # What a checkpoint says of the run, by the iteration of a save that has begun: an asynchronous one ends steps
        # later.
        self._progress: dict[int, dict[str, Any]] = {}
        self._samples, self._events = samples, events
        self.updates = updates
        self._rate: float | None = None  # of learning, in the present step
        config = prepared.config
        self.forward = ModelForward(
            eod_id=prepared.tokenizer.eod_id,
            groups=self.groups,
            document_mask=config.data.document_mask,
            packed_attention=prepared.arguments.transformer_impl == "transformer_engine",
        )
        self.step = TrainingStep(
            objective=build_objective(config.objective.name, **prepared.objective_settings),
            vocab_size=prepared.hf_config["vocab_size"],
            forward=self.forward,
            scores=None if prepared.reference is None else self.scores,
            upcoming=self._upcoming_microbatches,
            linear=config.loss.linear,
        )
        self._filler = IdleFiller(group=lambda: self.groups().tp_cp)
        self._evaluation: RunEvaluation | None = None
        objective = self.step.objective
        self._first_look: FirstLook | None = None
        if objective.reference_signal == "loss":
            selects = isinstance(objective, SelectingObjective)
            self._first_look = FirstLook(steps=total_steps(prepared.arguments), selects=selects)
        self._distills = isinstance(objective, Distillation)  # until the first step of this start has been looked at
        self._attention_is_known = not (self.forward.document_mask and self.forward.packed_attention)
        self._student: list = []  # its chunks on this rank, as Megatron trains them; known from the first step on
        scaled = prepared.arguments.fp16 and not prepared.arguments.loss_scale
        self._watch = StepWatch(
            max_dropped=1.0 if config.reference is None else config.reference.max_dropped,
            smallest_loss_scale=prepared.arguments.min_loss_scale if scaled else None,
        )
        self._dropped_said = False
        self._rank_watch: RankWatch | None = None
        if config.logging.slow_rank is not None and prepared.arguments.data_parallel_size > 1:
            self._rank_watch = RankWatch(self.step.own_time, factor=config.logging.slow_rank)
        self._spikes = None
        if config.spikes is not None:
            self._spikes = SpikeGate(config.spikes, prepared.arguments, environment, state=spikes)

    def groups(self) -> Any:
        """Megatron's process groups."""
        if self._groups is None:
            from megatron.core.process_groups_config import ProcessGroupCollection

            self._groups = ProcessGroupCollection.use_mpu_process_groups()
        return self._groups

    def scores(self) -> ScoreSource:
        """Where the run's reference scores come from."""
        assert self._score_parts.source is not None, "build_reference comes first"
        return self._score_parts.source

    def build_reference(self) -> None:
        """Makes the source of the run's scores; nothing where none is needed. Collective over all ranks."""
        self._score_parts = build_score_source(
            self._prepared,
            self._run_scores,
            forward=self.forward,
            filler=self._filler,
            signal="hidden" if self.step.objective.reference_signal == "hidden" else "loss",
            say=self._say,
            stopped=self._stopped,
        )

    def _stopped(self) -> bool:
        """Whether Megatron's signal came to this process; its own question, after each step, is a collective."""
        if not self._arguments.exit_signal_handler:
            return False
        from megatron.training.global_vars import get_signal_handler

        handler: Any = get_signal_handler()
        return handler._signal_received

    def _upcoming_microbatches(self) -> int:
        """How many microbatches of the coming step can be read now; 0 where no step of this run takes them.

        During a ramp-up of the batch size the coming step may have more.
        """
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        coming = self._arguments.curr_iteration + 2  # counted from 1, as iterations_to_skip; the present one is + 1
        if coming > self._arguments.train_iters or coming in self._arguments.iterations_to_skip:
            return 0
        return get_num_microbatches()

    def _say(self, text: str) -> None:
        if self._recorder is not None:
            self._recorder.message(text)

    def close(self) -> None:
        """Ends what runs beside the training."""
        if self._score_parts.writer is not None:
            self._score_parts.writer.close()

    def connect(self, recorder: RunRecorder | None, evaluation: RunEvaluation | None = None) -> None:
        """Takes the places that ``patches/`` opens in Megatron's loop.

        Args:
            recorder: writes the run's files; given on one rank, a last pipeline stage.
            evaluation: scores a suite between steps; None scores none.
        """
        from patches import (
            checkpoint_commit,
            evaluation_log,
            optimizer_overrides,
            pipeline_wait,
            schedule,
            train_step,
            training_log,
        )

        self._recorder, self._evaluation = recorder, evaluation
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
        wrapper = self.step.wrap_schedule if evaluation is None else self._evaluated_schedule
        schedule.wrapper, train_step.hook = wrapper, self.before_step
        if (gate := self._spikes) is not None:
            schedule.wrapper = lambda original: gate.wrap(wrapper(original))
        pipeline_wait.hook = self._filler.wait
        training_log.hook = self.after_step if evaluation is None else self._after_step_and_evaluation
        training_log.rate = lambda: self._rate
        evaluation_log.hook = self.after_evaluation
        checkpoint_commit.before = self.before_save
        checkpoint_commit.after = self.after_save
        optimizer_overrides.hook = partial(
            weight_decay_overrides, **dataclasses.asdict(self._prepared.config.optimizer)
        )

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluated_schedule(self, schedule: Callable[..., list]) -> Callable[..., list]:
        """The schedule of the run; sees the student, and evaluates it before the first step of a new run."""
        scored = self.step.wrap_schedule(schedule)

        def with_student(*, model: Any, forward_only: bool = False, **settings: Any) -> list:
            if not forward_only and not self._student:
                self._student = list(model) if isinstance(model, list) else [model]
                if self._arguments.curr_iteration == 0:
                    self._evaluate(0)
            return scored(model=model, forward_only=forward_only, **settings)

        return with_student

    def _after_step_and_evaluation(self, losses: dict[str, torch.Tensor], *, iteration: int, **figures: Any):
        logged = self.after_step(losses, iteration=iteration, **figures)
        self._evaluate(iteration)
        return logged

    def _evaluate(self, step: int) -> None:
        if self._evaluation is None or not self._evaluation.due(step):
            return
        record = self._evaluation.run(self._student, step)
        if self._recorder is not None:
            consumed = self._arguments.consumed_train_samples * self._arguments.seq_length
            self._recorder.evaluation({"iteration": step, "consumed_tokens": consumed, **record})

    # -- around a step -----------------------------------------------------------------------------------------------

    def before_step(self, model: Any, optimizer: Any, schedule: Any) -> None:
        """Takes what Megatron trains, and the learning rate of the step: after it the optimizer has the next one's.

        Raises:
            DoNotRestart: attention over packed documents is wrong here; on all ranks, before the first step.
        """
        from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

        if not self._attention_is_known:
            self._attention_is_known = True
            fault = None
            with parallel.same_fate("asking the attention"):
                fault = packed_attention_fault(model)
            faults = parallel.gather_objects(fault)
            if any(faults):
                raise DoNotRestart(next(filter(None, faults)))
        # Loading a checkpoint sets the optimizer's weight decay before it knows the checkpoint's (Megatron-LM #7468).
        schedule.step(0)
        self._rate = get_canonical_lr_for_logging(optimizer.param_groups)
        if self._spikes is not None:
            self._spikes.before_step(model, optimizer, schedule)

    def after_step(
        self,
        losses: dict[str, torch.Tensor],
        *,
        iteration: int,
        learning_rate: float | None,
        loss_scale: float,
        grad_norm: float | None,
        skipped: bool,
    ) -> dict[str, torch.Tensor]:
        """Derives the step's figures, records them, and gives Megatron those that it should log. Collective.

        Raises:
            DoNotRestart: the step has shown that the run trains nothing; on all ranks, before anything is saved.
        """
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        args = self._arguments
        self.updates += not skipped and grad_norm != 0 and self._rate != 0
        spike = self._meet_spike(iteration, grad_norm, skipped)
        fault = None if spike is None or not spike.hopeless else self._spike_text(spike)
        logged = losses
        if losses:
            microbatches = get_num_microbatches() * args.data_parallel_size * args.context_parallel_size
            figures = step_statistics(losses, microbatches=microbatches)
            tokens, counted = token_counts(losses, microbatches=microbatches)
            outcome = StepOutcome(
                iteration=iteration,
                tokens=tokens,
                counted=counted,
                dropped=int(figures["dropped_tokens"] or 0),
                lm_loss=float(losses["lm_loss"]),
                objective_loss=float(losses["objective_loss"]),
                grad_norm=grad_norm,
                skipped=skipped,
                loss_scale=loss_scale if args.fp16 or args.loss_scale else None,
            )
            fault = fault or self._watch.fault(outcome)
            if self._recorder is not None:
                record = self._record(figures, iteration, learning_rate, grad_norm, get_num_microbatches())
                if skipped or outcome.loss_scale is not None:
                    record |= {"skipped": skipped, "loss_scale": outcome.loss_scale}
                if spike is not None:
                    record |= {"spike": spike.figure, "back_to": spike.back_to}
                self._recorder.step(record)
                self._say_dropped(outcome)
                self._look_at_first(record)
            template = losses["lm_loss"]
            logged = {name: template.new_tensor([value]) for name, value in figures.items()}
        # A rank of an earlier stage knows no losses, and must not wait for one that has left.
        if parallel.on_any_rank(fault is not None)[0]:
            faults = parallel.gather_objects(fault)
            raise DoNotRestart(next(text for text in faults if text))
        self._watch_ranks(iteration)
        return logged

    def _watch_ranks(self, iteration: int) -> None:
        """Names ranks that hold the others up. Collective every few steps."""
        slow = None if self._rank_watch is None else self._rank_watch.after_step(self.groups())
        if slow is None:
            return
        for entry in slow:
            logger.warning("step %d: %s", iteration, entry.text())
        if not slow:
            self._say(f"step {iteration}: no rank is slower than the others any more")
        if self._events is not None:
            self._events.note("slow", step=iteration, ranks=[dataclasses.asdict(entry) for entry in slow])

    def _meet_spike(self, iteration: int, grad_norm: float | None, skipped: bool) -> Spike | None:
        """Deals with a spike, where the step was one, and writes down which samples it had. Collective."""
        if self._spikes is None:
            return None
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        args = self._arguments
        last = args.consumed_train_samples
        first = last - get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
        spike = self._spikes.after_step(iteration, grad_norm=grad_norm, skipped=skipped)
        if spike is None:
            return None
        if spike.back_to is not None:
            self.updates = self._spikes.updates_then
        samples = step_samples(getattr(self._samples, "blend", self._samples), first, last)
        self._say(f"{self._spike_text(spike)} (samples {first} to {last - 1}: {samples_text(samples)})")
        if self._events is not None:
            self._events.note("spike", **dataclasses.asdict(spike), first_sample=first, samples=samples)
        return spike

    def _spike_text(self, spike: Spike) -> str:
        assert self._prepared.config.spikes is not None
        return spike.text(window=self._prepared.config.spikes.window)

    def _look_at_first(self, record: dict[str, Any]) -> None:
        """Says what the first steps tell of the reference."""
        if self._first_look is not None and (line := self._first_look.add(record)) is not None:
            self._say(line)
        if self._distills:
            self._distills = False
            share = self._prepared.objective_settings["ntp_weight"]
            if (line := nothing_to_distill(record, ntp_weight=share)) is not None:
                self._say(line)

    def _say_dropped(self, step: StepOutcome) -> None:
        """Names the first tokens that do not count for want of a score; metrics.jsonl has them all."""
        if step.dropped and not self._dropped_said:
            self._dropped_said = True
            share = dropped_share(step.dropped, step.tokens)
            self._say(f"step {step.iteration}: {share} have no finite score of the reference and do not count")

    def _record(
        self,
        figures: dict[str, float | None],
        iteration: int,
        learning_rate: float | None,
        grad_norm: float | None,
        microbatches: int,
    ) -> dict[str, Any]:
        """One line of metrics.jsonl."""
        from megatron.training.training import num_floating_point_operations

        args, clock = self._arguments, self.step.clock
        seconds = clock.step_seconds()
        batch = microbatches * args.micro_batch_size * args.data_parallel_size
        flops_per_second = num_floating_point_operations(args, batch) / seconds / self._environment.world_size
        losses = ("lm_loss", "objective_loss")
        return {
            "iteration": iteration,
            "consumed_tokens": args.consumed_train_samples * args.seq_length,
            **{name: figures[name] for name in losses},
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": batch * args.seq_length / seconds,
            "tflops": flops_per_second / 1e12,
            "mfu": None if self._peak is None else flops_per_second / self._peak,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            "step_seconds": seconds,
            "reference_seconds": clock.reference_seconds(),
            **{name: value for name, value in figures.items() if name not in losses},
            **({} if self._score_parts.gate is None else self._score_parts.gate.figures()),
        }

    def after_evaluation(self, losses: dict[str, torch.Tensor]) -> None:
        """Records a validation."""
        if self._recorder is not None and "lm_loss" in losses:
            iteration = self._arguments.curr_iteration + 1
            self._recorder.validation({"iteration": iteration, "lm_loss": float(losses["lm_loss"])})

    # -- around a save -----------------------------------------------------------------------------------------------

    def before_save(self, iteration: int) -> None:
        """Clears the place of the checkpoint and refuses to begin one for which there is no room."""
        self._progress[iteration] = {
            "consumed_samples": self._arguments.consumed_train_samples,
            "updates": self.updates,
            **({} if self._spikes is None else {"spikes": self._spikes.rule.state()}),
        }
        if self._score_parts.writer is not None:
            # What a resumed run will not compute again is on disk before its checkpoint.
            self._score_parts.writer.flush()
        with parallel.same_fate("saving a checkpoint"):
            if self._environment.rank == 0:
                if checkpoints.iteration_directory(self._root, iteration).exists():
                    checkpoints.set_aside(self._root, iteration)
                run_directory.require_space(self._root, self._last_checkpoint_size, what="the last checkpoint")

    def after_save(self, iteration: int) -> None:
        """Declares the checkpoint complete: model files, digests (shared out), manifest, pointer, retention."""
        directory = checkpoints.iteration_directory(self._root, iteration)
        rank, world_size = self._environment.rank, self._environment.world_size
        progress = self._progress.pop(iteration)
        with parallel.same_fate("saving a checkpoint"):
            if rank == 0:
                self._add_model_files(directory)
        # One rank lists: on a network file system another may not see every file yet.
        names = parallel.broadcast_object(checkpoints.list_files(directory) if rank == 0 else [])
        known: dict[str, str] = {}
        if self._arguments.async_save:
            from patches import asynchronous_save

            taken = parallel.gather_objects(asynchronous_save.take_digests(directory))
            known = {name: digest for part in taken for name, digest in part.items()}
        with parallel.same_fate("saving a checkpoint"):
            part = checkpoints.describe_files(directory, names[rank::world_size], known=known)
        parts = parallel.gather_objects(part)
        with parallel.same_fate("saving a checkpoint"):
            if rank == 0:
                files = {name: entry for part in parts for name, entry in part.items()}
                self._last_checkpoint_size = sum(entry["size"] for entry in files.values())
                checkpoints.write_manifest(
                    directory,
                    files=files,
                    iteration=iteration,
                    tokenizer=self._prepared.tokenizer.digest,
                    **progress,
                    **self._record_of_run,
                )
                checkpoints.point_to(self._root, iteration)
                checkpoints.retain(self._root, self._prepared.config.checkpoint.keep)

    def _add_model_files(self, directory: Path) -> None:
        """Puts config.json and the tokenizer beside the weights: a checkpoint can be exported without its run."""
        target = directory / HF_SUBFOLDER
        target.mkdir(exist_ok=True)
        config = self._prepared.hf_config
        if self._prepared.init is None and "eos_token_id" not in config:
            # A model from a description: transformers would put in the ids of another tokenizer.
            config = config | {"bos_token_id": None, "eos_token_id": self._prepared.tokenizer.eod_id}
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, content in self._companions.items():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(content)


def _companion_files(prepared: Prepared) -> dict[str, bytes]:
    """The tokenizer and what else travels with the weights, by name. Read at the start: what they are beside may be a
    checkpoint that is removed while the run goes on."""
    from remit_megatron.conversion.source import CHAT_FILES, TOKENIZER_FILES, read_companions

    tokenizer, init = prepared.tokenizer, prepared.init
    if tokenizer.directory is None:
        found = {"tokenizer.json": Path(tokenizer.path).read_bytes()}
    else:
        found = read_companions(tokenizer.directory, TOKENIZER_FILES)
    for folder in (tokenizer.directory, None if init is None else init.hf_files):
        if folder is not None:
            found = read_companions(folder, (*CHAT_FILES, "generation_config.json")) | found
    return found
