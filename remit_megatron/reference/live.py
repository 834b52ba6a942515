"""The reference scores a step's microbatches, on the student's ranks, before the student sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from remit_megatron.conversion.source import ModelSource
from remit_megatron.kernels.token_logprob import token_logprob
from remit_megatron.models.batch import Batch
from remit_megatron.models.forward import Item, ModelForward
from remit_megatron.reference.source import Schedule, merge_factor, merge_items

Signal = Literal["loss", "hidden"]  # of every token, or the final hidden states


class LiveReference:
    """A frozen model on the student's tensor, pipeline and context parallel groups.

    Sharded like the student; runs the student's own pipeline schedule, forward only, over all microbatches of the step.
    What remains of it is one float per token (:meth:`losses`), or for objectives on distributions the final hidden
    states of every microbatch (:meth:`keep_hidden`), on the last stage.

    Args:
        chunks: the model's chunks on this rank (one without virtual pipeline stages), in evaluation mode. Those that
            :meth:`load` builds are frozen.
        vocab_size: true size of the vocabulary, without padding.
        forward: how a microbatch goes through a model.
        signal: what :meth:`score` returns: ``loss`` of every token, or ``hidden`` states.
        micro_batch_size: sequences per forward pass; None takes the student's. As many microbatches of the student as
            that allows, and as divide those of the step, go through the model together.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        vocab_size: int,
        forward: ModelForward,
        signal: Signal = "loss",
        micro_batch_size: int | None = None,
    ):
        assert not any(chunk.training for chunk in chunks), "scores are those of a model in evaluation mode"
        self.chunks = list(chunks)
        self.vocab_size = vocab_size
        self.forward = forward
        self.signal = signal
        self.micro_batch_size = micro_batch_size
        self._head: Tensor | None = None
        self._sequence_parallel = False

    @classmethod
    def load(
        cls,
        source: ModelSource,
        arguments: Any,
        *,
        forward: ModelForward,
        fp8: str | None = None,
        fp8_recipe: str = "tensorwise",
        **settings: Any,
    ) -> LiveReference:
        """Builds a reference on this rank's place in the groups and loads its weights; collective.

        Args:
            source: weights and config.json.
            arguments: Megatron's; the layout is taken from them and the weights' 16- or 32-bit type, the architecture
                from ``source``. A student's FP8 settings among them are not.
            fp8, fp8_recipe: as in :func:`remit_megatron.models.fp8.frozen_arguments`; None for no FP8.
            forward, settings: as the class takes them.

        Raises:
            UserError: the layout does not fit the model, or a weight is missing or has another shape.
        """
        from remit_megatron.conversion.loading import load_weights
        from remit_megatron.models.build import build_chunks, model_config
        from remit_megatron.models.fp8 import frozen_arguments

        own = frozen_arguments(arguments, fp8=fp8, recipe=fp8_recipe)
        chunks = build_chunks(model_config(source.hf_config, own), forward.groups)
        assert not any(p.requires_grad for chunk in chunks for p in chunk.parameters()), "the reference is frozen"
        load_weights(chunks, source)
        return cls(chunks, vocab_size=source.hf_config["vocab_size"], forward=forward, **settings)

    @property
    def _tp_group(self) -> torch.distributed.ProcessGroup:
        return self.forward.groups.tp

    def losses(
        self, *, hidden_states: Tensor, output_layer, output_weight: Tensor | None, context: Batch, **_
    ) -> Tensor:
        """Megatron's ``output_processor`` hook on the last stage: hidden states [s, b, h] to losses [b, s] float32.

        All tokens are scored, whatever the loss mask says: what counts is the run's affair, and a score that is kept
        serves other runs too.
        """
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        if output_layer.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self._tp_group)
        weight = output_layer.weight if output_weight is None else output_weight
        labels = context.labels.reshape(hidden_states.size(1), -1).t()
        logprob = token_logprob(hidden_states, weight, labels, tp_group=self._tp_group, vocab_size=self.vocab_size)
        return -logprob.t().reshape(context.labels.shape)

    def keep_hidden(
        self, *, hidden_states: Tensor, output_layer, output_weight: Tensor | None, context: Batch, **_
    ) -> Tensor:
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
                hidden = gather_from_sequence_parallel_region(hidden, group=self._tp_group)
        return hidden, self._head.detach()

    def score(self, schedule: Schedule, buffers: list[list[Item]], **settings: Any) -> list[Tensor]:
        """See :meth:`ScoreSource.score`."""
        together = self._together(len(buffers), len(buffers[0]), settings["micro_batch_size"])
        if together > 1:
            buffers = [
                [merge_items(buffer[first : first + together]) for first in range(0, len(buffer), together)]
                for buffer in buffers
            ]
            settings["micro_batch_size"] *= together
        iterators = [iter(buffer) for buffer in buffers]
        with torch.no_grad():
            scores = schedule(
                forward_step_func=self._step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(buffers[0]),
                forward_only=True,
                collect_non_loss_data=True,
                **settings,
            )
        if together == 1 or not scores:
            return scores
        dim = 0 if self.signal == "loss" else 1
        return [part for score in scores for part in score.chunk(together, dim=dim)]

    def _together(self, chunks: int, microbatches: int, micro_batch_size: int) -> int:
        if self.micro_batch_size is None:
            return 1
        stages = self.forward.groups.pp.size() if chunks > 1 else 1
        return merge_factor(self.micro_batch_size // micro_batch_size, microbatches, multiple=stages)

    def _step(self, data_iterator: Iterator[Item], model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
        """Megatron's forward step of the reference; the "loss function" gives what is kept of it."""
        batch = self.forward.next(data_iterator)
        output = self.forward.run(model, batch, self.losses if self.signal == "loss" else self.keep_hidden)
        return output, partial(self._keep, batch)

    def _keep(self, batch: Batch, output: Tensor, non_loss_data: bool = True) -> Tensor:
        if self.signal == "loss":
            return output.detach()
        assert batch.reference_hidden is not None
        return batch.reference_hidden
