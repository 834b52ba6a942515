"""Samples through a source of scores, a few at a time: what every job that only runs forward does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from remit_megatron.models.forward import Item
from remit_megatron.reference.source import ScoreSource

ROUND = 4  # microbatches per pipeline stage that go through the schedule at once


def round_size(arguments: Any) -> int:
    """How many samples are taken at once."""
    return ROUND * arguments.pipeline_model_parallel_size * arguments.micro_batch_size


def score_samples(source: ScoreSource, samples: Sequence[Item], arguments: Any, *, chunks: int) -> list[Tensor]:
    """Scores of samples; collective over the ranks of a replica.

    Samples are filled up with the last one to whole microbatches and, where an interleaved pipeline wants a multiple of
    its stages, to so many of them; what is scored twice is the same twice.

    Args:
        source: gives the scores.
        samples: items without batch dimension; at least one.
        arguments: Megatron's.
        chunks: of the model on this rank.

    Returns:
        What the source gives of each microbatch, those of the filling included; nothing before the last stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    size = arguments.micro_batch_size
    multiple = size * (arguments.pipeline_model_parallel_size if chunks > 1 else 1)
    filled = [*samples, *[samples[-1]] * (-len(samples) % multiple)]
    items = [default_collate(filled[first : first + size]) for first in range(0, len(filled), size)]
    return source.score(
        get_forward_backward_func(),
        [list(items) for _ in range(chunks)],
        seq_length=arguments.seq_length,
        micro_batch_size=size,
    )
