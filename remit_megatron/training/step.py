"""One training step as Megatron's loop calls it: batches to losses, scores to weights, weights to one loss.

schedule wrapper: buffer the step's microbatches -> reference scores them (one loss per token, or hidden states)
                  -> objectives that select among the global batch: student forward only -> selection
                  -> student runs over the same microbatches
forward_step:     batch -> model -> token_loss (on the last stage, through GPTModel's output_processor) -> objective
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.kernels.token_loss import token_loss
from remit_megatron.models.batch import Batch
from remit_megatron.models.forward import Item, ModelForward
from remit_megatron.objectives import DistributionObjective, Objective, ScoredTokens, SelectingObjective
from remit_megatron.objectives.selection import ORDER_LIMIT
from remit_megatron.reference.live import LiveReference
from remit_megatron.reference.source import ScoreSource, looking_ahead
from remit_megatron.training.linear_loss import LinearLoss
from remit_megatron.training.slow_ranks import OwnTime

# Sums that an objective may leave out stand for zero.
STATISTICS = (
    "weight_excess",
    "weight_excess_squared",
    "weight_clipped_low",
    "weight_clipped_high",
    "delta",
    "delta_squared",
)


def _owned(item: Item) -> Item:
    """The item in this process's own memory: a data worker's shared memory costs an open file per tensor."""
    return {name: tensor.clone() if tensor.is_shared() else tensor for name, tensor in item.items()}


class StepClock:
    """Wall-clock seconds of the current step and of the reference's share of it, on this rank."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self._started = time.perf_counter()
        self._marks: list = []
        self._reference = 0.0

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()
        self._marks, self._reference = [], 0.0

    def mark(self) -> None:
        """Called before and after the reference's pass; on a GPU an event in the stream, so that nothing waits."""
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def step_seconds(self) -> float:
        return time.perf_counter() - self._started

    def reference_seconds(self) -> float:
        if len(self._marks) < 2:
            return 0.0
        if self._gpu:
            self._marks[1].synchronize()
            return self._marks[0].elapsed_time(self._marks[1]) / 1000
        return self._marks[1] - self._marks[0]


class TrainingStep:
    """The step of one run: holds what its parts share.

    Args:
        objective: see :mod:`remit_megatron.objectives`.
        vocab_size: true vocabulary size, without padding.
        forward: how a microbatch goes through a model.
        scores: gives the source of reference scores once it exists; None for objectives that need none.
        upcoming: how many microbatches of the coming step may be read now, for sources that look ahead; 0 where the
            run ends.
        linear: whether output layer and loss are computed together, without a microbatch's logits.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        vocab_size: int,
        forward: ModelForward,
        scores: Callable[[], ScoreSource] | None = None,
        upcoming: Callable[[], int] = lambda: 0,
        linear: bool = False,
    ):
        self.objective = objective
        self.vocab_size = vocab_size
        self.forward = forward
        self.linear = linear
        self.clock = StepClock()
        self.own_time = OwnTime()
        # The reference exists only once Megatron has set up its groups, inside its own start.
        self._scores_of = scores
        self._upcoming = upcoming
        self._fetched: list[list[Item]] = []  # per model chunk, microbatches read ahead of their step

    @property
    def groups(self) -> Any:
        return self.forward.groups

    @property
    def scores(self) -> ScoreSource | None:
        """Where this run's reference scores come from."""
        return None if self._scores_of is None else self._scores_of()

    # -- the model ---------------------------------------------------------------------------------------------------

    def _student_losses(
        self, *, hidden_states: Tensor, output_layer, output_weight, context: Batch, scale_logits, **_
    ) -> Tensor:
        """``output_processor`` of the student: hidden states [s, b, h] to losses [b, s] float32, in nats.

        Where the reference's hidden states are attached, [2, b, s]: the objective's losses, and beside them the
        unweighted ones, which carry no gradient.
        """
        logits, _bias = output_layer(hidden_states, weight=output_weight)
        logits = scale_logits(logits)
        labels, loss_mask = (t.reshape(logits.size(1), -1).t() for t in (context.labels, context.loss_mask))
        settings: dict[str, Any] = dict(tp_group=self.groups.tp, vocab_size=self.vocab_size, loss_mask=loss_mask)
        if context.reference_hidden is None:
            return token_loss(logits, labels, **settings).t().reshape(context.labels.shape)
        objective, reference = self.objective, self.scores
        assert isinstance(objective, DistributionObjective) and isinstance(reference, LiveReference)
        hidden, weight = reference.head_input(context.reference_hidden)
        both = objective.token_losses(logits, labels, reference_hidden=hidden, reference_weight=weight, **settings)
        return torch.stack([losses.t().reshape(context.labels.shape) for losses in both])

    # -- Megatron's forward_step -------------------------------------------------------------------------------------

    def forward_step(self, data_iterator: Iterator[Item], model) -> tuple[Tensor, Callable]:
        """What Megatron's schedule calls for each microbatch (and for each model chunk) of the student."""
        with self.own_time.measure():
            batch = self.forward.next(data_iterator)
            processor = self._output_processor(batch)
            output = self.forward.run(model, batch, processor)
        applied = processor if isinstance(processor, LinearLoss) else None
        return output, partial(self.loss, batch, model.training, applied=applied)

    def _output_processor(self, batch: Batch) -> Callable[..., Tensor]:
        if not self.linear:
            return self._student_losses
        return LinearLoss(self.objective, batch, vocab_size=self.vocab_size, groups=self.groups)

    def loss(
        self, batch: Batch, training: bool, losses: Tensor, *, applied: LinearLoss | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss function of one microbatch, as Megatron wants it with ``calculate_per_token_loss``.

        Args:
            batch: the microbatch.
            training: False for evaluation, which reports the unweighted loss only.
            losses: what the output processor gave, [b, s] or [2, b, s].
            applied: the output processor that has applied the objective itself, and gave its sum.

        Returns:
            The sum to differentiate, the number of tokens in the denominator (int32), and for the log [sum, count]
            pairs that are added over microbatches and ranks before they are divided (:meth:`_of_the_step`, in
            evaluation Megatron itself).
        """
        if applied is not None:
            assert applied.losses is not None
            losses = applied.losses
        losses, plain_losses = losses.unbind(0) if losses.ndim == 3 else (losses, losses)
        with torch.no_grad():
            in_mask = batch.loss_mask > 0
            unweighted = torch.stack((torch.where(in_mask, plain_losses, 0.0).sum(), in_mask.sum().float()))
        if not training:
            return unweighted[0], in_mask.sum().int(), {"lm_loss": unweighted}
        applied_result = None if applied is None else applied.result
        result = applied_result or self.objective(
            losses,
            batch.loss_mask,
            reference_loss=batch.reference_loss,
            document_ids=batch.document_ids,
            order=batch.order(self.groups.cp.size()),
            selected=batch.selected,
            cp_group=self.groups.cp if self.groups.cp.size() > 1 else None,
        )
        counted, one = result.counted.float(), torch.ones_like(unweighted[0])
        zero = torch.zeros_like(one)
        report = {
            "lm_loss": unweighted,
            "objective_loss": torch.stack((result.loss_sum.detach(), counted)),
            "tokens": torch.stack((in_mask.sum().float(), one)),
            "counted_tokens": torch.stack((counted, one)),
            "dropped_tokens": torch.stack((result.statistics.get("dropped_tokens", zero).float(), one)),
        }
        for name in STATISTICS:
            report[name] = torch.stack((result.statistics.get(name, zero).float(), counted))
        return result.loss_sum, result.counted.int(), report

    # -- the schedule ------------------------------------------------------------------------------------------------

    def wrap_schedule(self, schedule: Callable[..., list]) -> Callable[..., list]:
        """The schedule of the run: the reference over the step's microbatches, then the student over the same ones.

        It must be around the schedule: inside ``forward_step`` the two pipelines' communication would deadlock.
        Evaluation needs no weights and runs as it is.
        """

        def scored_schedule(
            *, forward_step_func, data_iterator, model, num_microbatches, forward_only=False, **settings
        ):
            self.clock.start()
            source = self.scores
            if source is None or forward_only:
                reports = schedule(
                    forward_step_func=forward_step_func,
                    data_iterator=data_iterator,
                    model=model,
                    num_microbatches=num_microbatches,
                    forward_only=forward_only,
                    **settings,
                )
                return reports if forward_only else self._of_the_step(reports)
            sources = data_iterator if isinstance(data_iterator, list) else [data_iterator]
            buffers = self._read(sources, num_microbatches)
            self.clock.mark()
            shared = {k: v for k, v in settings.items() if k not in ("collect_non_loss_data", "force_all_reduce")}
            scores = source.score(schedule, buffers, **shared)
            self.clock.mark()
            hidden = self.objective.reference_signal == "hidden"
            _attach(buffers, "reference_hidden" if hidden else "reference_loss", scores)
            ahead, filling = looking_ahead(source), nullcontext()
            if ahead is not None:
                self._fetched = self._read(sources, self._upcoming())
                filling = ahead.ahead(self._fetched[-1], microbatches=num_microbatches, model=model)
            with filling:
                if self.objective.needs_global_batch:
                    _attach(buffers, "selected", self._select(schedule, model, buffers, **shared))
                iterators = [iter(buffer) for buffer in buffers]
                reports = schedule(
                    forward_step_func=forward_step_func,
                    data_iterator=iterators if isinstance(data_iterator, list) else iterators[0],
                    model=model,
                    num_microbatches=num_microbatches,
                    forward_only=False,
                    **settings,
                )
            return self._of_the_step(reports)

        return scored_schedule

    def _of_the_step(self, reports: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """One report of all microbatches and replicas, in one reduction. Megatron makes one for each figure, each of
        which waits for the other ranks; of a single number it makes none.

        Args:
            reports: of the microbatches, figures as [sum, count]; empty but on the last pipeline stage.

        Returns:
            One report of sum / count, 0-dimensional; or nothing.
        """
        if not reports:
            return []
        with torch.no_grad():
            totals = torch.stack([torch.stack(tuple(report.values())) for report in reports]).sum(0)
            if (group := self.groups.dp_cp).size() > 1:
                dist.all_reduce(totals, group=group)
            return [dict(zip(reports[0], (totals[:, 0] / totals[:, 1]).unbind(), strict=True))]

    def _read(self, sources: list[Iterator[Item]], microbatches: int) -> list[list[Item]]:
        """The next microbatches, per model chunk; those that were read ahead come first."""
        fetched, self._fetched = self._fetched or [[] for _ in sources], []
        assert all(len(items) <= microbatches for items in fetched), "the number of microbatches never decreases"
        with self.own_time.measure():
            return [
                items + [_owned(next(source)) for _ in range(microbatches - len(items))]
                for items, source in zip(fetched, sources, strict=True)
            ]

    def _select(
        self, schedule: Callable[..., list], model: Any, buffers: list[list[Item]], **settings: Any
    ) -> list[Tensor]:
        """The objective's choice among all tokens of the global batch, by the student's losses before this step.

        One more forward pass of the student, through its own schedule. Without dropout, training's pass over the same
        microbatches finds the same losses.

        Args:
            schedule, settings: as in :meth:`ScoreSource.score`.
            model: the student's chunks on this rank.
            buffers: per model chunk, the step's microbatches; those of the last stage with their scores.

        Returns:
            On the last pipeline stage a [b, s] bool for each microbatch; elsewhere an empty list.
        """
        iterators = [iter(buffer) for buffer in buffers]
        with torch.no_grad():
            losses = schedule(
                forward_step_func=self._loss_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=model,
                num_microbatches=len(buffers[0]),
                forward_only=True,
                collect_non_loss_data=True,
                **settings,
            )
        if not losses:
            return []
        objective, groups = self.objective, self.groups
        assert isinstance(objective, SelectingObjective)
        scored = []
        for number, (item, student_loss) in enumerate(zip(buffers[-1], losses, strict=True)):
            batch = self.forward.batch(item)
            assert batch.reference_loss is not None
            # Data parallel ranks take turns at the microbatches of a step, as Megatron's sampler deals them out.
            first = (number * groups.dp.size() + groups.dp.rank()) * batch.tokens.size(0)
            samples = len(losses) * groups.dp.size() * batch.tokens.size(0)
            assert samples * batch.tokens.size(1) * groups.cp.size() <= ORDER_LIMIT
            order = batch.order(groups.cp.size(), first_sample=first)
            scored.append(ScoredTokens(student_loss, batch.reference_loss, batch.loss_mask, order))
        return objective.select(scored, group=groups.dp_cp if groups.dp_cp.size() > 1 else None)

    def _loss_step(self, data_iterator: Iterator[Item], model) -> tuple[Tensor, Callable]:
        """The student's losses of a microbatch, as they are."""
        batch = self.forward.next(data_iterator)
        output = self.forward.run(model, batch, self._output_processor(batch))
        return output, lambda losses, non_loss_data=True: losses.detach()


def _attach(buffers: list[list[Item]], name: str, values: list[Tensor]) -> None:
    """Adds a tensor of each microbatch to the items of the last chunk; none where this is not the last stage."""
    if values:
        buffers[-1] = [{**item, name: value} for item, value in zip(buffers[-1], values, strict=True)]
