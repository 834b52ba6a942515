"""Two frozen models on one layout: log-probabilities of both, and the divergence of the first from the second.

The second model runs a few microbatches ahead and leaves its final hidden states on the last stage; there the first
one's logits, sharded over the tensor parallel ranks, meet those of the second a block of tokens at a time, by the
kernel that distillation trains with. Nothing as large as the vocabulary is ever gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from remit_megatron.scoring.logprobs import IGNORED, Microbatch, Scorer

# Microbatches per pipeline stage whose hidden states are kept at once.
_ROUND = 4


class PairScorer:
    """Scores texts with two models of one vocabulary.

    Args:
        model: the first one; what :func:`score_file` calls the model.
        reference: the second one, on the same process groups.
    """

    def __init__(self, model: Scorer, reference: Scorer):
        assert model.vocab_size == reference.vocab_size
        self._model, self._reference = model, reference
        self._head: Tensor | None = None

    def score(self, batches: Sequence[Microbatch]) -> dict[int, list[list[float]]]:
        """Of this replica's share of ``batches``, by line: log-probabilities of the model and of the reference, and
        KL(reference || model) over the vocabulary, in nats; empty on ranks that do not hold the head's result.

        Collective over the ranks of a replica.
        """
        groups = self._model.groups
        share = list(batches[groups.dp.rank() :: groups.dp.size()])
        found: dict[int, list[list[float]]] = {}
        size = _ROUND * groups.pp.size()
        for first in range(0, len(share), size):
            part = share[first : first + size]
            hidden = self._reference.run(part, [None] * len(part), self._keep_hidden)
            results = self._model.run(part, hidden or [None] * len(part), self._compare)
            if groups.tp.rank() != 0:
                continue  # the same numbers as rank 0
            for batch, rows in zip(part, results, strict=False):  # no results except on the last stage
                for row, line in enumerate(batch.lines):
                    counted = int((batch.labels[row] != IGNORED).sum())
                    found[line] = rows[:, row, :counted].tolist()
        return found

    def _keep_hidden(self, hidden: Tensor, output_layer: Any, weight: Tensor, labels: Tensor, _: Any) -> Tensor:
        """[s, b, h], as they are."""
        self._head = weight
        return hidden

    def _compare(self, hidden: Tensor, output_layer: Any, weight: Tensor, labels: Tensor, other: Any) -> Tensor:
        """[3, b, s] float32: log-probabilities of the model and of the reference, and the divergence."""
        import torch

        from remit_megatron.kernels import token_logprob
        from remit_megatron.kernels.kl_divergence import distillation_loss

        assert self._head is not None, "the reference has run before its hidden states are used"
        theirs = other.to(device=self._head.device, dtype=self._head.dtype)
        shared = dict(tp_group=self._model.groups.tp, vocab_size=self._model.vocab_size, ignore_index=IGNORED)
        logits, _ = output_layer(hidden, weight=weight)
        divergence, loss = distillation_loss(logits.contiguous(), labels.t(), theirs, self._head, **shared)
        return torch.stack([-loss.t(), token_logprob(theirs, self._head, labels.t(), **shared).t(), divergence.t()])
