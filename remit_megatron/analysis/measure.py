"""Two models on the same text: per-token measures over whole distributions, and means with honest intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from remit_megatron.analysis.models import TextModel
from remit_megatron.analysis.results import Z_95


class Comparison(NamedTuple):
    """What a text's predictions say of two models; [s - 1] each, on the CPU, in nats where not said otherwise."""

    first_logprob: Tensor  # of the text's own tokens
    second_logprob: Tensor
    kl_first: Tensor  # KL(p_first || p_second) over the whole vocabulary
    kl_second: Tensor  # KL(p_second || p_first)
    variation: Tensor  # total variation distance, 0 to 1
    rank: Tensor  # int64: where the second model's most likely token stands in the first model's order, from 1


@torch.no_grad()
def compare(
    first: TextModel, second: TextModel, ids: list[int], *, hidden: tuple[Tensor, Tensor] | None = None
) -> Comparison:
    """Compares the two models' distributions at every position of a text; the logits exist a block at a time.

    Args:
        hidden: the models' hidden states of the text, where they are at hand.
    """
    states = hidden or (first.hidden(ids), second.hidden(ids))
    labels = torch.tensor(ids[1:], dtype=torch.int64, device=states[0].device).unsqueeze(1)
    parts = []
    for block in first.blocks(len(labels)):
        log_a = torch.log_softmax(first.logits(states[0][block]), -1)
        log_b = torch.log_softmax(second.logits(states[1][block]), -1)
        a, b, difference = log_a.exp(), log_b.exp(), log_a - log_b
        top = log_b.argmax(-1, keepdim=True)
        parts.append(
            (
                log_a.gather(1, labels[block]).squeeze(1),
                log_b.gather(1, labels[block]).squeeze(1),
                _expectation(a, difference),
                -_expectation(b, difference),
                (a - b).abs().sum(-1) / 2,
                1 + (log_a > log_a.gather(1, top)).sum(-1),
            )
        )
    return Comparison(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    # A token of probability 0 adds nothing, also where the other model's is 0 as well and the difference is NaN.
    return torch.where(p > 0, p * values, 0.0).sum(-1)


class Mean(NamedTuple):
    """A mean over tokens and half of its 95% interval over texts."""

    value: float
    half: float
    tokens: int

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half


def mean_over_tokens(sums: Sequence[float], counts: Sequence[int]) -> Mean:
    """The mean over all tokens. Its error is taken over texts: tokens of a text go together (a ratio estimator's
    cluster-robust standard error, as for cluster samples).

    Args:
        sums: of the values of each text.
        counts: tokens of each text; texts without any are left out.
    """
    pairs = [(float(total), count) for total, count in zip(sums, counts, strict=True) if count]
    tokens = sum(count for _, count in pairs)
    if not tokens:
        return Mean(math.nan, math.nan, 0)
    value = sum(total for total, _ in pairs) / tokens
    if len(pairs) < 2:
        return Mean(value, math.nan, tokens)
    square = sum((total - value * count) ** 2 for total, count in pairs)
    return Mean(value, Z_95 * math.sqrt(square * len(pairs) / (len(pairs) - 1)) / tokens, tokens)
