"""The reference scores a step's microbatches, on the student's ranks, before the student sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from remit_megatron.kernels.token_logprob import token_logprob

Item = dict[str, Any]
# (data iterator, model) -> (output, loss function): the signature that Megatron's schedules call
ForwardStep = Callable[[Iterator[Item], Any], tuple[Tensor, Callable[..., Any]]]


class LiveReference:
    """A frozen model on the student's tensor, pipeline and context parallel groups.

    Sharded like the student; runs the student's own pipeline schedule, forward only, over all microbatches of the step.
    One float per token remains of it.

    Args:
        chunks: the model's chunks on this rank (one without virtual pipeline stages), frozen, in evaluation mode.
        forward: runs a chunk on an item of the data loader; on the last stage it calls ``output_processor`` with
            :meth:`output_processor`.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], *, vocab_size: int, tp_group: torch.distributed.ProcessGroup):
        for chunk in chunks:
            assert not chunk.training and not any(p.requires_grad for p in chunk.parameters()), (
                "the reference is frozen"
            )
        self.chunks = list(chunks)
        self.vocab_size = vocab_size
        self.tp_group = tp_group

    def output_processor(
        self, *, hidden_states: Tensor, output_layer, output_weight: Tensor | None, context, **_
    ) -> Tensor:
        """Megatron's ``output_processor`` hook on the last stage: hidden states [s, b, h] to losses [b, s] float32."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        if output_layer.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        weight = output_layer.weight if output_weight is None else output_weight
        labels, loss_mask = (t.reshape(hidden_states.size(1), -1).t() for t in (context.labels, context.loss_mask))
        logprob = token_logprob(
            hidden_states, weight, labels, tp_group=self.tp_group, vocab_size=self.vocab_size, loss_mask=loss_mask
        )
        return -logprob.t().reshape(context.labels.shape)

    def score(
        self, schedule: Callable[..., list], forward: ForwardStep, buffers: list[list[Item]], **settings
    ) -> list[Tensor]:
        """Scores all microbatches of a step.

        Args:
            schedule: Megatron's forward-backward function for this layout.
            forward: see the class; receives the chunk and an iterator over its buffer.
            buffers: per model chunk on this rank, the step's microbatches.
            settings: what the student's schedule is called with (sequence length, micro-batch size, groups).

        Returns:
            On the last pipeline stage one [b, s] float32 loss per microbatch, in order; elsewhere an empty list.
        """
        iterators = [iter(buffer) for buffer in buffers]
        with torch.no_grad():
            return schedule(
                forward_step_func=forward,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(buffers[0]),
                forward_only=True,
                collect_non_loss_data=True,
                **settings,
            )
