"""The student's output layer and loss together, a few sequences at a time: the step's way with ``loss.linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remit_megatron.kernels.linear_token_loss import linear_token_loss
from remit_megatron.kernels.token_logprob import token_logprob
from remit_megatron.models.batch import Batch
from remit_megatron.objectives import ChunkedObjective, Objective, ObjectiveResult


class LinearLoss:
    """One microbatch's ``output_processor``, and what it leaves for the loss function.

    The weights are needed where the logits' gradient is made, which is in the output layer's forward pass. So the
    objective is applied there, and the model returns its sum in place of the losses.

    Args:
        objective: one with ``by_sequence``.
        batch: the microbatch, with its scores.
        vocab_size: true vocabulary size, without padding.
        groups: Megatron's process groups (tp and cp are used).

    Attributes:
        losses: [b, s] float32 in nats, without gradient; None until the model has run, and on other stages.
        result: what the objective made of them; None without gradients (evaluation).
    """

    def __init__(self, objective: Objective, batch: Batch, *, vocab_size: int, groups: Any):
        self._objective, self._batch, self._vocab_size, self._groups = objective, batch, vocab_size, groups
        self.losses: Tensor | None = None
        self.result: ObjectiveResult | None = None

    def __call__(self, *, hidden_states: Tensor, output_layer, output_weight, scale_logits, **_) -> Tensor:
        """Final hidden states [s, b, h] to the objective's sum [] float32; without gradients to the losses [b, s]."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        batch, groups = self._batch, self._groups
        sequence_parallel = output_layer.sequence_parallel
        if sequence_parallel:  # its backward adds up over the ranks, and takes this rank's part
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=groups.tp)
        # The logits' factor, put before the product, which is linear; hidden states of packed sequences are [b * s, 1].
        hidden = scale_logits(hidden_states).transpose(0, 1).reshape(*batch.labels.shape, -1)
        weight = output_layer.weight if output_weight is None else output_weight
        shared: dict[str, Any] = dict(tp_group=groups.tp, vocab_size=self._vocab_size, loss_mask=batch.loss_mask)
        if not torch.is_grad_enabled():
            self.losses = -token_logprob(hidden, weight, batch.labels, **shared)
            return self.losses
        weighting = ChunkedObjective(
            self._objective,
            batch.loss_mask,
            reference_loss=batch.reference_loss,
            document_ids=batch.document_ids,
            order=batch.order(groups.cp.size()),
            selected=batch.selected,
            cp_group=groups.cp if groups.cp.size() > 1 else None,
        )
        loss_sum, self.losses = linear_token_loss(
            hidden, weight, batch.labels, weighting, reduce_hidden_grad=not sequence_parallel, **shared
        )
        self.result = weighting.result(loss_sum)
        return loss_sum
