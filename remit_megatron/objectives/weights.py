"""ReMiT's token weights and the weighted loss: pure functions of per-token losses.

Per token t of a sequence, natural logarithms (ReMiT, arXiv 2602.03075):

    delta_t = L_student(x_t) - L_ref(x_t)                                          (Eq. 3)
    mu      = mean of delta over the counted tokens of the sequence                (Eq. 4)
    w_t     = clip(2 * sigmoid(delta_t - mu), 1 - epsilon, 1 + epsilon)            (Eq. 5)
    loss    = sum of w_t * L_student(x_t) / number of counted tokens               (Eq. 6; the division is the caller's)

A token is counted if its loss mask is above 0 and its reference loss is finite. A token that is masked in but has no
finite reference loss is dropped: it is in no sum, no mean and no count, and is reported.

Means are taken in float64, in a fixed order, from the same numbers on every rank of a context-parallel group: a
constant difference has exactly itself as its mean, so models that agree up to a constant give weights of exactly 1,
and a repeated step gives the same bits.

Shapes: b sequences, s tokens of each on this rank (under context parallelism any slice of the sequence, equally long
on every rank).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.objectives.contract import ObjectiveResult

CENTERINGS = ("sequence", "document", "none")


class _Weighting(NamedTuple):
    weights: Tensor  # [b, s] float32
    unclipped: Tensor  # [b, s] float32, before the clip; meaningless where not counted
    counted: Tensor  # [b, s] bool
    delta: Tensor  # [b, s] float64, 0 where not counted


def token_weights(
    student_loss: Tensor,
    reference_loss: Tensor,
    loss_mask: Tensor,
    *,
    epsilon: float | None = 0.2,
    centering: str | None = None,
    document_ids: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Weights of Eq. 3-5, without gradient.

    Args:
        student_loss: [b, s] negative log-likelihood in nats under the student.
        reference_loss: [b, s] the same under the reference; a value that is not finite drops the token.
        loss_mask: [b, s] tokens above 0 count.
        epsilon: weights lie in [1 - epsilon, 1 + epsilon]. None does not clip: weights lie in [0, 2]. With 0 all are
            exactly 1.
        centering: what delta is centered over: "sequence", "document" (within each sequence), or "none" (mu = 0). Left
            out it is "document" where ``document_ids`` are given, else "sequence".
        document_ids: [b, s] integers, equal within a document of a sequence and different between them, in any order;
            under context parallelism the same for all parts of a document. Another ``centering`` that is asked for by
            name does not read them.
        cp_group: ranks that hold the other tokens of these sequences, or None. One collective ("none": no collective).

    Returns:
        [b, s] float32, 0 where a token is not counted. A sequence or document without counted tokens gives zeros.

    Raises:
        ValueError: shapes differ, or a setting is not one of those above.
    """
    return _weighting(student_loss, reference_loss, loss_mask, epsilon, centering, document_ids, cp_group).weights


def weighted_loss(
    student_loss: Tensor,
    reference_loss: Tensor,
    loss_mask: Tensor,
    *,
    epsilon: float | None = 0.2,
    centering: str | None = None,
    document_ids: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> ObjectiveResult:
    """Numerator and denominator of Eq. 6 for this rank's tokens, and sums that describe the weights.

    The gradient reaches ``student_loss`` only, through L and not through w, and is exactly 0 at tokens that are not
    counted, whatever their losses hold (a NaN or an infinity there reaches neither the sums nor the gradient).

    Args: as `token_weights`.

    Returns:
        ``loss_sum`` [] float32, ``counted`` [] int64 and ``statistics``: [] float32 sums over the counted tokens of
        this rank, without gradient, that add up over microbatches and ranks:

        - ``weight_excess``, ``weight_excess_squared``: w - 1 and its square. About 1, because sums of w and w^2 would
          lose the spread.
        - ``weight_clipped_low``, ``weight_clipped_high``: number of tokens whose weight the clip changed.
        - ``delta``, ``delta_squared``: Eq. 3, not centered.
        - ``student_loss``: L, so the unweighted mean over the very same tokens is at hand.
        - ``dropped_tokens``: number of tokens masked in without a finite reference loss.
    """
    weighting = _weighting(student_loss, reference_loss, loss_mask, epsilon, centering, document_ids, cp_group)
    counted, weights, delta = weighting.counted, weighting.weights, weighting.delta
    kept_loss = torch.where(counted, student_loss.float(), 0.0)
    with torch.no_grad():
        low, high = _bounds(epsilon)
        excess = torch.where(counted, weights.double() - 1.0, 0.0)
        columns = {
            "weight_excess": excess,
            "weight_excess_squared": excess.square(),
            "weight_clipped_low": (counted & (weighting.unclipped < low)).double(),
            "weight_clipped_high": (counted & (weighting.unclipped > high)).double(),
            "delta": delta,
            "delta_squared": delta.square(),
            "student_loss": kept_loss.double(),
            "dropped_tokens": ((loss_mask > 0) & ~counted).double(),
        }
        sums = torch.stack(tuple(columns.values())).sum((1, 2)).float()
    return ObjectiveResult(
        loss_sum=(weights * kept_loss).sum(),
        counted=counted.sum(),
        statistics=dict(zip(columns, sums.unbind(0), strict=True)),
    )


@torch.no_grad()
def weight_error_bound(
    reference_loss: Tensor,
    other_loss: Tensor,
    loss_mask: Tensor,
    *,
    epsilon: float | None = 0.2,
    centering: str | None = None,
    document_ids: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """How far the weights of Eq. 3-5 can move when one reference stands for another, whatever the student's losses are.

    With c the difference of the two references' losses, centered as delta is, the arguments of the sigmoid differ by c.
    The difference of two sigmoids is largest where they lie around 0, and two clipped weights are no further apart than
    the clip is wide:

        |dw| <= min(4 * sigmoid(|c| / 2) - 2, 2 * epsilon) = min(2 * tanh(|c| / 4), 2 * epsilon) <= |c| / 2

    A token that only one of them scores makes the sum infinite: the mean of its whole sequence hangs on it.

    Args:
        reference_loss: [b, s] negative log-likelihood in nats under the one reference.
        other_loss: [b, s] the same under the other.
        loss_mask: [b, s] tokens above 0 count.
        epsilon, centering, document_ids, cp_group: as in `token_weights`.

    Returns:
        [] float64 sum of the bounds over this rank's counted tokens, and their number, [] int64.

    Raises:
        ValueError: shapes differ, or a setting is not one of those of `token_weights`.
    """
    centering = _centering(centering, document_ids)
    _check(reference_loss, other_loss, loss_mask, epsilon, centering, document_ids)
    in_mask, scored, other_scored = loss_mask > 0, torch.isfinite(reference_loss), torch.isfinite(other_loss)
    counted = in_mask & scored & other_scored
    difference = torch.where(counted, other_loss.double() - reference_loss.double(), 0.0)
    centered = _centered(difference, counted, centering, document_ids, cp_group)
    low, high = _bounds(epsilon)
    bound = (2.0 * torch.tanh(centered.abs() / 4.0)).clamp(max=high - low)
    bound = torch.where(in_mask & (scored != other_scored), math.inf, torch.where(counted, bound, 0.0))
    return bound.sum(), counted.sum()


@torch.no_grad()
def _weighting(
    student_loss: Tensor,
    reference_loss: Tensor,
    loss_mask: Tensor,
    epsilon: float | None,
    centering: str | None,
    document_ids: Tensor | None,
    cp_group: dist.ProcessGroup | None,
) -> _Weighting:
    centering = _centering(centering, document_ids)
    _check(student_loss, reference_loss, loss_mask, epsilon, centering, document_ids)
    counted = (loss_mask > 0) & torch.isfinite(reference_loss)
    delta = torch.where(counted, student_loss.double() - reference_loss.double(), 0.0)
    centered = _centered(delta, counted, centering, document_ids, cp_group)
    unclipped = (2.0 * torch.sigmoid(centered)).float()
    weights = torch.where(counted, unclipped.clamp(*_bounds(epsilon)), 0.0)
    return _Weighting(weights, unclipped, counted, delta)


def _centered(
    delta: Tensor,
    counted: Tensor,
    centering: str,
    document_ids: Tensor | None,
    cp_group: dist.ProcessGroup | None,
) -> Tensor:
    """[b, s] float64: delta less its mean over the counted tokens of the sequence or the document (Eq. 4)."""
    if centering == "sequence":
        return delta - _sequence_mean(delta, counted, cp_group)
    if centering == "document":
        assert document_ids is not None
        return delta - _document_mean(delta, counted, document_ids, cp_group)
    return delta


def _centering(centering: str | None, document_ids: Tensor | None) -> str:
    """What is centered over where the caller leaves it out: boundaries that are given are meant."""
    if centering is None:
        return "sequence" if document_ids is None else "document"
    return centering


def _bounds(epsilon: float | None) -> tuple[float, float]:
    return (0.0, 2.0) if epsilon is None else (1.0 - epsilon, 1.0 + epsilon)


def _sequence_mean(delta: Tensor, counted: Tensor, cp_group: dist.ProcessGroup | None) -> Tensor:
    """[b, 1] float64 mean over each sequence's counted tokens on all ranks."""
    sums = torch.stack((delta.sum(1), counted.sum(1).double()))
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        # Gathered and added here in rank order rather than all-reduced: the order of an all-reduce is up to the
        # library.
        gathered = sums.new_empty(dist.get_world_size(cp_group) * 2, sums.shape[1])
        dist.all_gather_into_tensor(gathered, sums, group=cp_group)
        sums = gathered.view(-1, 2, sums.shape[1]).sum(0)
    return (sums[0] / sums[1].clamp(min=1.0)).unsqueeze(1)


def _document_mean(delta: Tensor, counted: Tensor, document_ids: Tensor, cp_group: dist.ProcessGroup | None) -> Tensor:
    """[b, s] float64: for each token the mean over the counted tokens of its document on all ranks.

    A document may lie on several ranks, and which ones share it is not known beforehand: the ranks gather the tokens
    themselves (24 bytes each) and every rank adds up the whole sequences.
    """
    batch, local = delta.shape
    delta_bits = delta.view(torch.int64)  # so that one integer tensor carries all three
    packed = torch.stack((delta_bits, counted.long(), document_ids.long()))
    rank = 0
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        rank = dist.get_rank(cp_group)
        gathered = packed.new_empty(dist.get_world_size(cp_group) * 3, batch, local)
        dist.all_gather_into_tensor(gathered, packed, group=cp_group)
        packed = gathered.view(-1, 3, batch, local).permute(1, 2, 0, 3).reshape(3, batch, -1)
    whole = packed.shape[2]
    # Ids may be any integers: number the documents of each sequence from 0, which needs no look at the data from the
    # host.
    ordered, order = packed[2].sort(dim=1, stable=True)
    number = torch.zeros_like(ordered)
    number[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    number = torch.empty_like(number).scatter_(1, order, number)
    slot = (number + whole * torch.arange(batch, device=delta.device).unsqueeze(1)).reshape(-1)
    sums = _sum_by_slot(slot, packed[0].contiguous().view(torch.float64).reshape(-1), batch * whole)
    counts = _sum_by_slot(slot, packed[1].reshape(-1).double(), batch * whole)
    mean = (sums / counts.clamp(min=1.0))[slot].view(batch, whole)
    return mean[:, rank * local : (rank + 1) * local]


def _sum_by_slot(slot: Tensor, values: Tensor, slots: int) -> Tensor:
    """[slots] float64 sums of the values of each slot, always added in the same order."""
    out = torch.zeros(slots, dtype=values.dtype, device=values.device)
    if values.device.type == "cpu":
        return out.index_add_(0, slot, values)
    return out.index_put_((slot,), values, accumulate=True)  # sorts; index_add_ would use atomics on a GPU


def _check(
    student_loss: Tensor,
    reference_loss: Tensor,
    loss_mask: Tensor,
    epsilon: float | None,
    centering: str,
    document_ids: Tensor | None,
) -> None:
    if student_loss.ndim != 2:
        raise ValueError(f"student_loss: found shape {tuple(student_loss.shape)}; expected [b, s]")
    named = {"reference_loss": reference_loss, "loss_mask": loss_mask}
    if centering == "document":
        if document_ids is None:
            raise ValueError("document_ids: found None; expected [b, s] integers, as centering is 'document'")
        named["document_ids"] = document_ids
    for name, tensor in named.items():
        if tensor.shape != student_loss.shape:
            raise ValueError(f"{name}: found shape {tuple(tensor.shape)}; expected {tuple(student_loss.shape)}")
    if centering not in CENTERINGS:
        raise ValueError(f"centering: found {centering!r}; expected one of {', '.join(CENTERINGS)}")
    if epsilon is not None and not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"epsilon: found {epsilon}; expected a number from 0 to 1, or None for no clip")
