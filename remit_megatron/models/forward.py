"""How a microbatch goes through a model, the same way for the student and for the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from remit_megatron.models.attention import document_attention_mask
from remit_megatron.models.batch import Batch, to_batch
from remit_megatron.runtime.parallel import device

Item = dict[str, Any]


class ModelForward:
    """Items of the data loader to batches, batches through a model.

    Args:
        eod_id: end-of-document token.
        groups: gives Megatron's process groups (tp and cp are used), once they exist.
        document_mask: whether attention stays within documents.
        packed_attention: document masks as packed sequences (Transformer Engine) instead of an explicit mask.
    """

    def __init__(
        self,
        *,
        eod_id: int,
        groups: Callable[[], Any],
        document_mask: bool = False,
        packed_attention: bool = False,
    ):
        self.eod_id = eod_id
        self.document_mask = document_mask
        self.packed_attention = packed_attention
        self._groups_of = groups

    @property
    def groups(self) -> Any:
        return self._groups_of()

    def batch(self, item: Item) -> Batch:
        """This rank's part of an item, on its device."""
        packed = self.document_mask and self.packed_attention
        return to_batch(item, device=device(), eod_id=self.eod_id, cp_group=self.groups.cp, packed=packed)

    def next(self, data_iterator: Iterator[Item]) -> Batch:
        """The next item as a batch."""
        return self.batch(next(data_iterator))

    def inputs(self, batch: Batch) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, Any]]:
        """What a model is called with: tokens, positions and attention mask in their order, and what has a name."""
        tokens, positions, mask, packed = batch.tokens, batch.position_ids, None, batch.packed
        if packed is not None:
            tokens, positions = tokens.reshape(1, -1), positions.reshape(1, -1)
        elif self.document_mask:
            mask = document_attention_mask(batch.document_ids, cp_group=self.groups.cp)
        return (tokens, positions, mask), {"packed_seq_params": packed}

    def run(self, model: Any, batch: Batch, output_processor: Callable[..., Tensor]) -> Tensor:
        """Hidden states of this stage, or on the last one what ``output_processor`` makes of them."""
        inputs, named = self.inputs(batch)
        return model(*inputs, **named, output_processor=output_processor, output_processor_context=batch)
