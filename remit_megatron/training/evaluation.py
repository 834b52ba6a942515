"""A suite scored between two steps of a run, on the run's own ranks, with the weights as they are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from remit_megatron.run.checks import read_suite
from remit_megatron.runtime import parallel
from remit_megatron.scoring.requests import RequestScorer, encode_suite

if TYPE_CHECKING:
    from remit_megatron.run.prepare import Prepared


class RunEvaluation:
    """When a run is evaluated, and the evaluation. Training goes on bit for bit as it would have without.

    Args:
        prepared: the run.
        total_steps: iterations of the whole run.

    Raises:
        UserError: the suite or its requests are not there, or do not fit the run's sequences.
    """

    def __init__(self, prepared: Prepared, *, total_steps: int):
        settings = prepared.config.evaluation
        assert settings is not None
        self._settings, self._arguments, self._total = settings, prepared.arguments, total_steps
        suite = read_suite(settings)
        rows, length = prepared.hf_config["vocab_size"], prepared.arguments.seq_length
        encoded = encode_suite(suite, prepared.tokenizer, sequence_length=length, vocab_size=rows)
        self.name, self.requests, self.cut = suite.name, len(encoded.requests), encoded.cut
        self._scorer = RequestScorer(encoded, prepared.arguments, groups=self._megatron_groups, vocab_size=rows)
        self._groups: Any = None
        self._started = time.monotonic()
        self._spent = 0.0

    def _megatron_groups(self) -> Any:
        if self._groups is None:
            from megatron.core.process_groups_config import ProcessGroupCollection

            self._groups = ProcessGroupCollection.use_mpu_process_groups()
        return self._groups

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after ``step`` steps; 0 is before the first."""
        if step == 0:
            return self._settings.at_start
        return step >= self._total or (self._settings.every is not None and step % self._settings.every == 0)

    def run(self, chunks: Sequence[torch.nn.Module], step: int) -> dict[str, Any]:
        """Scores the suite; collective over all ranks. The record of it, the same on every rank.

        Args:
            chunks: the student's chunks on this rank, as Megatron trains them.
            step: steps so far.

        Returns:
            ``iteration``, ``suite``, ``tasks`` (:meth:`RequestScorer.results`), ``seconds`` of this evaluation, and
            ``share`` of the time since this start of the run that went into evaluations.
        """
        began = time.monotonic()
        with _evaluating(chunks):
            logprobs = self._scorer.logprobs(chunks)
        tasks = self._scorer.results(logprobs)
        now = time.monotonic()
        self._spent += now - began
        figures = {"seconds": now - began, "share": self._spent / (now - self._started)}
        return {"iteration": step, "suite": self.name, "tasks": tasks, **parallel.broadcast_object(figures)}


@contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The chunks in evaluation mode, their parameters gathered: under ``overlap_param_gather`` a forward pass of
    training waits for its parameters by hooks, which Megatron takes away around its own evaluation too."""
    from megatron.training.training import disable_forward_pre_hook, enable_forward_pre_hook

    hooked = bool(getattr(chunks[0], "remove_forward_pre_hook_handles", None))
    if hooked:
        disable_forward_pre_hook(chunks)
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in chunks:
            chunk.train()
        if hooked:
            enable_forward_pre_hook(chunks)
