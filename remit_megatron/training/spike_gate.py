"""Between a step's backward pass and its update: a spike is not applied, or the run goes back to its last checkpoint.

before the step:     model, optimizer and schedule are noted
after the schedule:  the loss of the global batch, on all ranks -> how large a gradient the optimizer may apply
after the step:      ordinary, or a spike; then, where it is wanted, the newest whole checkpoint is loaded

What decides is the same on all ranks: a sum over all of them, and the norm that Megatron computes over all. The
optimizer leaves an update out by itself where the norm is above its ``grad_norm_skip_threshold``; the learning rate's
schedule then stands still. A run that goes back keeps its place in the data and its step number, so that the steps in
between are as good as left out by ``iterations_to_skip``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.run import directory as run_directory
from remit_megatron.run.schema import SpikesConfig
from remit_megatron.runtime import checkpoints, parallel
from remit_megatron.runtime.parallel import RankEnvironment
from remit_megatron.training.spikes import Limits, Spike, SpikeRule

_NOTHING = -1.0  # no norm is below it


class SpikeGate:
    """What stands there in a run with `spikes`.

    Args:
        settings: `spikes` of the run.
        arguments: Megatron's.
        environment: this rank.
        state: of the rule, where the run goes on from a checkpoint.
    """

    def __init__(
        self, settings: SpikesConfig, arguments: Any, environment: RankEnvironment, *, state: dict[str, Any] | None
    ):
        self.rule = SpikeRule(settings)
        if state is not None:
            self.rule.load(state)
        self._start = self.rule.state()
        self._settings = settings
        self._arguments = arguments
        self._environment = environment
        self._trained: tuple[Any, Any, Any] | None = None
        self._own_thresholds: dict[int, float] = {}  # the configuration's, by the optimizer's settings
        self._limits, self._loss = Limits(), math.nan
        self.updates_then = 0  # of the weights that the run went back to

    def before_step(self, model: Any, optimizer: Any, schedule: Any) -> None:
        """Takes what Megatron trains."""
        self._trained = (model, optimizer, schedule)

    def wrap(self, schedule: Callable[..., list]) -> Callable[..., list]:
        """The schedule of a step, after which the optimizer knows what it may apply."""

        def judged(*, forward_only: bool = False, **settings: Any) -> list:
            losses = schedule(forward_only=forward_only, **settings)
            if not forward_only:
                self._judge(losses)
            return losses

        return judged

    def _judge(self, losses: list[dict[str, Tensor]]) -> None:
        assert self._trained is not None
        self._loss, self._limits = _mean_loss(losses), self.rule.limits()
        allowed = _NOTHING if self._over_loss() else self._limits.grad_norm
        for optimizer in self._trained[1].chained_optimizers:
            own = self._own_thresholds.setdefault(id(optimizer.config), optimizer.config.grad_norm_skip_threshold)
            optimizer.config.grad_norm_skip_threshold = min(own, allowed)

    def _over_loss(self) -> bool:
        # One that is not finite says that weights or data are broken, and ends the run (health.py).
        return math.isfinite(self._loss) and self._loss > self._limits.loss

    def after_step(self, iteration: int, *, grad_norm: float | None, skipped: bool) -> Spike | None:
        """Notes an ordinary step, or deals with a spike. Collective over all ranks.

        Raises:
            UserError: the checkpoint to go back to cannot be read.
        """
        over_norm = skipped and grad_norm is not None and grad_norm > self._limits.grad_norm
        if not self._over_loss() and not over_norm:
            if not skipped:
                self.rule.ordinary(self._loss, grad_norm)
            return None
        hopeless = self.rule.spike(iteration)
        figure, value, limit = "loss", self._loss, self._limits.loss
        if not self._over_loss():
            assert grad_norm is not None
            figure, value, limit = "grad_norm", grad_norm, self._limits.grad_norm
        back = None
        if self._settings.action == "rollback" and not hopeless:
            back = self._go_back()
        return Spike(iteration, figure, value, limit, self._loss, back, hopeless)

    def _go_back(self) -> int | None:
        """Loads the newest whole checkpoint into what is trained; its step, or None where there is none yet."""
        from megatron.training import training
        from megatron.training.checkpointing import load_checkpoint

        args, environment = self._arguments, self._environment
        training.maybe_finalize_async_save(blocking=True)
        root = Path(args.save)
        found = run_directory.newest_verified(root, rank=environment.rank, world_size=environment.world_size)
        if found is None:
            return None
        properties: dict[str, Any] = {}
        with parallel.same_fate("reading the checkpoint to go back to"):
            if environment.rank == 0:
                properties = checkpoints.read_manifest(checkpoints.iteration_directory(root, found)).properties
                checkpoints.point_to(root, found)
        properties = parallel.broadcast_object(properties)
        assert self._trained is not None
        model, optimizer, schedule = self._trained
        kept = {name: getattr(args, name) for name in ("consumed_train_samples", "skipped_train_samples", "load")}
        kept["consumed_valid_samples"] = args.consumed_valid_samples
        hooked = training.should_disable_forward_pre_hook(args) and _hooked(model)
        if hooked:
            training.disable_forward_pre_hook(model, optimizer=optimizer)
        args.load = str(root)
        schedule.num_steps = 0  # it adds what it loads
        load_checkpoint(model, optimizer, schedule)
        for name, value in kept.items():
            setattr(args, name, value)
        if hooked:
            training.enable_forward_pre_hook(model)
        self.rule.rolled_back(properties.get("spikes") or self._start)
        self.updates_then = int(properties.get("updates", found))
        return found


def _hooked(model: Any) -> bool:
    return any(getattr(chunk, "remove_forward_pre_hook_handles", None) for chunk in model)


def _mean_loss(losses: list[dict[str, Tensor]]) -> float:
    """The unweighted loss of the global batch, nats; the same on all ranks, of which the last stages' know it.

    Args:
        losses: the report of the step (``TrainingStep._of_the_step``), of which those ranks each add the same.
    """
    total = torch.zeros(2, dtype=torch.float64, device=parallel.device())
    for report in losses:
        loss = report["lm_loss"].double()
        total += torch.stack((loss, torch.ones_like(loss)))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    summed, count = total.tolist()
    return summed / count if count else math.nan
