"""Where a step's reference scores come from: the contract, and what its implementations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Item = dict[str, Any]
Schedule = Callable[..., list]


class ScoreSource(Protocol):
    """Gives every microbatch of a step its reference scores.

    Implementations: `LiveReference` runs the frozen model in the student's pipeline, others read a cache, run ahead, or
    stand around another source.
    """

    def score(self, schedule: Schedule, buffers: list[list[Item]], **settings: Any) -> list[Tensor]:
        """Scores all microbatches of a step. All ranks of the job call it at the same place.

        Args:
            schedule: Megatron's forward-backward function for this layout.
            buffers: per model chunk on this rank, the step's microbatches (whole sequences, [b, S]).
            settings: what the student's schedule is called with (``seq_length``, ``micro_batch_size``, groups).

        Returns:
            On the last pipeline stage one tensor per microbatch, in order: the reference's losses of this rank's part
            of the sequences, [b, s] float32 in nats, or its final hidden states where the objective asks for them.
            Elsewhere an empty list.
        """
        ...


@runtime_checkable
class LookAhead(Protocol):
    """A `ScoreSource` that can score microbatches of the coming step while the present one runs."""

    def ahead(self, items: Sequence[Item], *, microbatches: int, model: Any) -> AbstractContextManager[None]:
        """Scores items within the context, in the pauses of what else runs there. All ranks of the job call it.

        Args:
            items: microbatches of the coming step; a later :meth:`ScoreSource.score` gets these very objects.
            microbatches: of the present step.
            model: the student's chunks on this rank, whose schedule runs within the context.
        """
        ...


def looking_ahead(source: ScoreSource) -> LookAhead | None:
    """The source, or the one that it stands around (its attribute ``source``), if that one looks ahead."""
    while not isinstance(source, LookAhead) and hasattr(source, "source"):
        source = source.source  # pyright: ignore[reportAttributeAccessIssue]
    return source if isinstance(source, LookAhead) else None


def merge_items(items: Sequence[Item]) -> Item:
    """Several microbatches as one: every tensor laid end to end along the batch dimension."""
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


def merge_factor(wanted: int, microbatches: int, *, multiple: int = 1) -> int:
    """How many microbatches to run as one.

    Args:
        wanted: at most as many.
        microbatches: of the step; the factor divides it.
        multiple: what the number of merged microbatches has to be a multiple of (the stages of an interleaved
            pipeline).
    """
    fits = (n for n in range(min(wanted, microbatches), 0, -1) if microbatches % n == 0)
    return next((n for n in fits if microbatches // n % multiple == 0), 1)
