"""TRL's trainers with what a resumed run needs to go on as if nothing had happened, and what a run writes.

TRL's checkpoints leave out, and these put back: the order of the prompts from the second epoch on (its sampler begins
again with the first), completions that several steps share (it generates others), and the tokens seen by SFT and DPO.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import GenerationConfig
from trl.trainer import dpo_trainer, grpo_trainer, sft_trainer
from trl.trainer.utils import RepeatSampler

from remit_megatron.posttrain.checkpoints import retain
from remit_megatron.posttrain.configuration import KeepSettings, check_keep
from remit_megatron.runtime.checkpoints import describe_files, write_manifest
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.parallel import same_fate

_STATE = "remit_state_{rank}.pt"
# TRL's name of a data set -> the configuration's.
_FIELDS = {"train": "data.train", "eval": "data.valid"}


@dataclass(frozen=True)
class Cut:
    """What ``trl.max_length`` takes from a data set; TRL says nothing of it.

    Attributes:
        field: the configuration's name of the data set.
        records: before.
        longer: those with more tokens than ``max_length``, with prompt and template; of a pair, either side.
        dropped: those of them of which nothing would be left to learn from: TRL leaves them out.
        max_length: tokens.
    """

    field: str
    records: int
    longer: int
    dropped: int
    max_length: int

    def line(self) -> str:
        """For a person."""
        left_out = f", {self.dropped} of them left out, with nothing to learn left" if self.dropped else ""
        longer = f"{self.longer:,} of {self.records:,} records are longer than trl.max_length {self.max_length}"
        return f"{self.field}: {longer}, and cut there{left_out}"

    def check(self) -> None:
        """Raises:
        UserError: no record is left.
        """
        if self.dropped == self.records:
            found = f"{self.records} records, of none of which trl.max_length {self.max_length} leaves what is learnt"
            raise UserError(self.field, found, "a larger trl.max_length, or shorter prompts")


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
        remit_cut: the data sets that have records longer than ``max_length``.
        remit_keep_models: the intermediate models of the run.
    """

    remit_identity: dict[str, Any]
    remit_keep: int | None = None
    remit_cut: tuple[Cut, ...] = ()
    remit_keep_models: KeepSettings = KeepSettings()

    def _remit_note(self, name: str, *, records: int, longer: int, dropped: int, max_length: int) -> None:
        cut = Cut(_FIELDS.get(name, name), records, longer, dropped, max_length)
        cut.check()
        if longer:
            self.remit_cut = (*self.remit_cut, cut)

    def get_train_dataloader(self) -> Any:
        """TRL's; one without a batch is refused, of which a run would be done at once."""
        loader: Any = super().get_train_dataloader()  # type: ignore[misc]
        if len(loader) == 0:
            raise UserError("data.train", "no whole batch", "more lines, or a smaller trl.per_device_train_batch_size")
        return loader

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' numbers of a run, of which the last are its steps."""
        values = super().set_initial_training_values(*args, **kwargs)  # type: ignore[misc]
        check_keep(self.remit_keep_models, values[-1])
        return values

    def _run_epoch(self, **kwargs: Any) -> None:
        """transformers' epoch, which begins with a step; none after the last, where only the model is to be written."""
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)  # type: ignore[misc]

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

    def _prepare_dataset(  # type: ignore[override]
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """TRL's preparation in two steps, which it allows: tokens first, then what it does to them."""
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        tokens: Any = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        prepared: Any = super()._prepare_dataset(tokens, processing_class, args, packing, None, dataset_name)
        # The other strategies of packing split what is too long, and lose nothing.
        if args.max_length is not None and (not packing or args.packing_strategy == "bfd"):
            longer = int((_lengths(tokens, "input_ids") > args.max_length).sum())
            dropped = 0 if packing else len(tokens) - len(prepared)
            self._remit_note(
                dataset_name, records=len(tokens), longer=longer, dropped=dropped, max_length=args.max_length
            )
        return prepared


class DPOTrainer(_Resumable, dpo_trainer.DPOTrainer):
    """Direct preference optimization."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        prepared: Any = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is not None:
            prompts, *answers = (_lengths(prepared, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            dropped = len(dataset) - len(prepared)
            longer = dropped + int((prompts + np.maximum(*answers) > args.max_length).sum())
            self._remit_note(
                dataset_name, records=len(dataset), longer=longer, dropped=dropped, max_length=args.max_length
            )
        return prepared


class GRPOTrainer(_Resumable, grpo_trainer.GRPOTrainer):
    """Group-relative policy optimization.

    Completions are drawn as the arguments say and in no other way: what TRL has no argument for, transformers would
    take from the model's ``generation_config.json`` (``no_repeat_ngram_size``, ``typical_p``, and the like).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model: Any = self.model
        before = model.generation_config
        identifiers = {name: getattr(before, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**identifiers)

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


def _lengths(dataset: Any, column: str) -> np.ndarray:
    """Length of the list in a column, by record: [records] int64; no list of Python is made."""
    batches = dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    chunks = [chunk for batch in batches for chunk in batch.column(column).chunks]
    return np.concatenate([np.zeros(0, np.int64), *(np.diff(chunk.offsets.to_numpy()) for chunk in chunks)])


TRAINERS: dict[str, Callable[..., Any]] = {"sft": SFTTrainer, "dpo": DPOTrainer, "rlvr": GRPOTrainer}
