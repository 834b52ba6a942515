"""An objective applied to a few whole sequences at a time, where the losses of a microbatch come chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from remit_megatron.objectives.contract import Objective, ObjectiveResult


class ChunkedObjective:
    """The ``weighting`` of :func:`remit_megatron.kernels.linear_token_loss` that an objective gives.

        weighting = ChunkedObjective(objective, loss_mask, reference_loss=reference_loss)
        loss_sum, losses = linear_token_loss(hidden, weight, labels, weighting, loss_mask=loss_mask)
        result = weighting.result(loss_sum)

    Args:
        objective: one with ``by_sequence``.
        loss_mask, reference_loss, document_ids, order, selected, cp_group: those of the whole microbatch, as the
            objective takes them.

    Raises:
        ValueError: the objective needs more than whole sequences.
    """

    def __init__(
        self,
        objective: Objective,
        loss_mask: Tensor,
        *,
        reference_loss: Tensor | None = None,
        document_ids: Tensor | None = None,
        order: Tensor | None = None,
        selected: Tensor | None = None,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ):
        if not objective.by_sequence:
            raise ValueError(f"objective: found {objective}; expected one that takes each sequence alone (by_sequence)")
        self._objective, self._loss_mask, self._cp_group = objective, loss_mask, cp_group
        self._tensors = {
            "reference_loss": reference_loss,
            "document_ids": document_ids,
            "order": order,
            "selected": selected,
        }
        self._results: list[ObjectiveResult] = []

    def __call__(self, losses: Tensor, sequences: slice) -> Tensor:
        """The loss sum of these sequences, [c, s] to []; remembers counts and statistics."""
        parts = {name: None if tensor is None else tensor[sequences] for name, tensor in self._tensors.items()}
        result = self._objective(losses, self._loss_mask[sequences], cp_group=self._cp_group, **parts)
        self._results.append(ObjectiveResult(result.loss_sum.detach(), result.counted, result.statistics))
        return result.loss_sum

    def result(self, loss_sum: Tensor) -> ObjectiveResult:
        """The microbatch's result: ``loss_sum``, and the sums of all chunks' counts and statistics."""
        assert self._results, "linear_token_loss calls the weighting first"
        names = {name for result in self._results for name in result.statistics}
        return ObjectiveResult(
            loss_sum=loss_sum,
            counted=torch.stack([result.counted for result in self._results]).sum(),
            statistics={
                name: torch.stack([r.statistics[name] for r in self._results if name in r.statistics]).sum()
                for name in sorted(names)
            },
        )
