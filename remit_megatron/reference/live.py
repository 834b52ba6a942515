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
    What remains of it is one float per token (:meth:`output_processor`), or for objectives on distributions the final
    hidden states of every microbatch (:meth:`keep_hidden`), on the last stage.

    Args:
        chunks: the model's chunks on this rank (one without virtual pipeline stages), frozen, in evaluation mode.
        vocab_size: true size of the vocabulary, without padding.
        tp_group: tensor parallel ranks.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], *, vocab_size: int, tp_group: torch.distributed.ProcessGroup):
        for chunk in chunks:
            assert not chunk.training and not any(p.requires_grad for p in chunk.parameters()), (
                "the reference is frozen"
            )
        self.chunks = list(chunks)
        self.vocab_size = vocab_size
        self.tp_group = tp_group
        self._head: Tensor | None = None
        self._sequence_parallel = False

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

    def keep_hidden(self, *, hidden_states: Tensor, output_layer, output_weight: Tensor | None, context, **_) -> Tensor:
        """``output_processor`` that leaves the final hidden states in ``context.reference_hidden``.

        They are [s, b, h], under sequence parallelism this rank's part [s / TP, b, h], in the model's dtype: what the
        model returns, which is an empty tensor here, is converted to float32 by Megatron.
        """
        self._head = output_layer.weight if output_weight is None else output_weight
        self._sequence_parallel = output_layer.sequence_parallel
        context.reference_hidden = hidden_states.detach()
        return hidden_states.new_empty(0)

    def head_input(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the reference's logits of a microbatch are made of.

        Args:
            hidden: as :meth:`keep_hidden` left it.

        Returns:
            Hidden states [s, b, h] of all tokens, and this rank's rows of the output weight [V / TP, h].
        """
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        assert self._head is not None, "the reference has run before its hidden states are used"
        if self._sequence_parallel:
            with torch.no_grad():
                hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden, self._head.detach()

    def score(
        self, schedule: Callable[..., list], forward: ForwardStep, buffers: list[list[Item]], **settings
    ) -> list[Tensor]:
        """Scores all microbatches of a step.

        Args:
            schedule: Megatron's forward-backward function for this layout.
            forward: runs a chunk on an item of the data loader: receives an iterator over the chunk's buffer, and the
                chunk. Its loss function gives what is returned here.
            buffers: per model chunk on this rank, the step's microbatches.
            settings: what the student's schedule is called with (sequence length, micro-batch size, groups).

        Returns:
            On the last pipeline stage one tensor per microbatch, in order; elsewhere an empty list.
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
