"""One microbatch on its device: what the data loader gave, this rank's part of each sequence, and its documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class Batch:
    """A microbatch as the model and the objective see it. Shapes are this rank's: s is seq_length / CP.

    Attributes:
        tokens, labels: [b, s] int64.
        loss_mask: [b, s] float32, 0 where the label does not count.
        position_ids: [b, s] int64, positions in the whole sequence.
        document_ids: [b, s] int64, number of end-of-document tokens before the token in its sequence.
        reference_loss: [b, s] float32, or None where nothing has scored the tokens.
        reference_hidden: the reference's final hidden states as its last stage had them, [s, b, h], or None.
        selected: [b, s] bool, the tokens that an objective chose among those of the global batch, or None.
        packed: the documents as packed sequences of Megatron, where attention takes them so; else None.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor
    reference_loss: Tensor | None = None
    reference_hidden: Tensor | None = None
    selected: Tensor | None = None
    packed: PackedSeqParams | None = None

    def order(self, cp_size: int, *, first_sample: int = 0) -> Tensor:
        """[b, s] int64: where each token stands in the whole sequences laid end to end, under every layout the same.

        Args:
            cp_size: ranks that share a sequence.
            first_sample: number of the microbatch's first sequence among those that are laid end to end.
        """
        samples = torch.arange(first_sample, first_sample + self.tokens.size(0), device=self.tokens.device)
        return samples.unsqueeze(1) * (self.tokens.size(1) * cp_size) + self.position_ids


def sequence_slice(tensor: Tensor, cp_rank: int, cp_size: int, *, dim: int = 1) -> Tensor:
    """This rank's part of a sequence under context parallelism, as Megatron splits it.

    The sequence is cut into 2 * cp_size chunks, and rank r holds chunks r and 2 * cp_size - 1 - r, so that every rank
    has the same amount of causal attention to compute.
    """
    if cp_size == 1:
        return tensor
    length = tensor.size(dim)
    if length % (2 * cp_size):
        raise ValueError(
            f"sequence of {length} tokens; expected a multiple of {2 * cp_size} (2 x context parallel size)"
        )
    chunks = tensor.chunk(2 * cp_size, dim=dim)
    return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=dim)


def whole_sequence(parts: Sequence[Tensor], *, dim: int = 1) -> Tensor:
    """The inverse of :func:`sequence_slice`: the parts of all context parallel ranks, in rank order, to sequences."""
    halves = [part.chunk(2, dim=dim) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[1] for half in reversed(halves)], dim=dim)


def document_ids_of(tokens: Tensor, eod_id: int) -> Tensor:
    """[b, s] -> [b, s] int64: how many documents ended before each token (an end belongs to its document)."""
    ended = tokens == eod_id
    return ended.cumsum(dim=1) - ended.long()


def to_batch(
    item: dict[str, Any],
    *,
    device: torch.device,
    eod_id: int,
    cp_group: dist.ProcessGroup | None = None,
    packed: bool = False,
) -> Batch:
    """Moves an item of the data loader (whole sequences) to ``device`` and takes this rank's part of each sequence.

    Documents end where the item's ``document_ids`` [b, s] change, else at end-of-document tokens. What the schedule has
    attached to the item (``reference_loss`` and the like) is this rank's part already.

    With ``packed`` the documents are also described as packed sequences, from the item as the loader gave it: where
    they end is found on the host, so that nothing waits for a GPU. Not for sequences that ranks share.
    """
    tokens = item["tokens"].to(device, non_blocking=True)
    labels = item["labels"].to(device, non_blocking=True)
    loss_mask = item["loss_mask"].to(device, non_blocking=True)
    position_ids = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    given = item.get("document_ids")
    documents = document_ids_of(tokens, eod_id) if given is None else given.to(device, non_blocking=True)
    rank, size = (cp_group.rank(), cp_group.size()) if cp_group is not None else (0, 1)
    whole = (tokens, labels, loss_mask, position_ids, documents)
    tokens, labels, loss_mask, position_ids, documents = (sequence_slice(t, rank, size) for t in whole)
    attached = {name: item.get(name) for name in ("reference_loss", "reference_hidden", "selected")}
    if packed:
        from remit_megatron.models.packing import packed_sequences

        assert size == 1, "packed sequences are whole"
        on_host = document_ids_of(item["tokens"], eod_id) if given is None else given
        attached["packed"] = packed_sequences(on_host, device)
    return Batch(tokens, labels, loss_mask, position_ids, documents, **attached)
