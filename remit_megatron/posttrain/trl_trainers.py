"""TRL's trainers with what a resumed run needs to go on as if nothing had happened, and what a run writes.

TRL's checkpoints leave out, and these put back: the order of the prompts from the second epoch on (its sampler begins
again with the first), completions that several steps share (it generates others), and the tokens seen by SFT and DPO.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from trl.trainer import dpo_trainer, grpo_trainer, sft_trainer
from trl.trainer.utils import RepeatSampler

from remit_megatron.posttrain.checkpoints import retain
from remit_megatron.runtime.checkpoints import describe_files, write_manifest
from remit_megatron.runtime.parallel import same_fate

_STATE = "remit_state_{rank}.pt"


class EpochRepeatSampler(RepeatSampler):
    """TRL's order of prompts in any epoch without having been through those before it.

    Attributes:
        epoch: the one that the next iteration is; set before it begins.
    """

    epoch: int = 0

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)  # pyright: ignore[reportArgumentType]
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


class _Resumable:
    """What the three trainers have in common; stands before TRL's class.

    Attributes:
        remit_identity: what the manifest of a checkpoint says of the run.
        remit_keep: newest checkpoints that stay; None keeps all.
    """

    remit_identity: dict[str, Any]
    remit_keep: int | None = None

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card for the hub."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        trainer: Any = self
        directory = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        torch.save(self._remit_state(), directory / _STATE.format(rank=trainer.args.process_index))
        with same_fate("saving a checkpoint"):
            pass  # every rank has written its files
        with same_fate("completing a checkpoint"):
            if trainer.args.process_index == 0:
                (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
                files = describe_files(directory)
                write_manifest(directory, files=files, iteration=trainer.state.global_step, **self.remit_identity)
                retain(directory.parent, self.remit_keep)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            trainer: Any = self
            file = Path(checkpoint) / _STATE.format(rank=trainer.args.process_index)
            self._remit_load(torch.load(file, map_location=trainer.args.device, weights_only=True))

    def _remit_state(self) -> dict[str, Any]:
        return {"tokens": self._total_train_tokens}  # type: ignore[attr-defined]

    def _remit_load(self, state: dict[str, Any]) -> None:
        self._total_train_tokens = state["tokens"]


class SFTTrainer(_Resumable, sft_trainer.SFTTrainer):
    """Supervised fine-tuning."""


class DPOTrainer(_Resumable, dpo_trainer.DPOTrainer):
    """Direct preference optimization."""


class GRPOTrainer(_Resumable, grpo_trainer.GRPOTrainer):
    """Group-relative policy optimization."""

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        trainer: Any = self
        self._remit_sampler = EpochRepeatSampler(
            data_source=trainer.train_dataset if dataset is None else dataset,
            mini_repeat_count=trainer.num_generations,
            batch_size=trainer.args.generation_batch_size // trainer.num_generations,
            repeat_count=self._steps_of_completions(),
            shuffle=trainer.shuffle_dataset,
            seed=trainer.args.seed,
        )
        return self._remit_sampler

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        self._remit_sampler.epoch = epoch
        super()._run_epoch(epoch=epoch, **kwargs)

    def _remit_state(self) -> dict[str, Any]:
        shared = self._step % self._steps_of_completions() != 0
        return {"step": self._step, "completions": self._buffered_inputs if shared else None}

    def _steps_of_completions(self) -> int:
        """Forward passes that one generation serves."""
        args: Any = self.args
        return args.steps_per_generation * self.num_iterations

    def _remit_load(self, state: dict[str, Any]) -> None:
        self._step, self._buffered_inputs = state["step"], state["completions"]


TRAINERS: dict[str, Callable[..., Any]] = {"sft": SFTTrainer, "dpo": DPOTrainer, "rlvr": GRPOTrainer}
