"""Core attention on torch.nn.functional.scaled_dot_product_attention, and masks for packed documents.

Takes the place of Megatron's DotProductAttention in the local spec: that one materializes the scores and refuses
context parallelism and different sizes of keys and values. Runs on a CPU, and on a GPU without Transformer Engine.

Context parallelism over c ranks uses Megatron's balanced layout: the sequence is cut into 2 c pieces and rank r holds
pieces r and 2 c - 1 - r, so that causal work is even. Keys and values are gathered over the group (their gradients are
summed back); each of the rank's two pieces of queries then attends to the keys up to its own end. Memory for keys and
values grows to the whole sequence, which grouped queries keep small; queries, scores and everything else stay split.

Legend: sq and sk lengths of queries and keys (global where context parallelism gathered them), b batch, n heads and g
query groups of this rank, d size of a head, c size of the context-parallel group.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import pad, scaled_dot_product_attention


def cp_order(size: int, device: torch.device) -> Tensor:
    """[2 c]: position of each piece of the sequence among the pieces as gathered, rank after rank."""
    pieces = torch.tensor([piece for rank in range(size) for piece in (rank, 2 * size - 1 - rank)], device=device)
    return torch.argsort(pieces)


def gather_sequence(local: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
    """[s / c, ...] -> [s, ...] in the order of the sequence; backward sums the gradients of all ranks and cuts them
    again."""
    size = cp_group.size()
    gathered = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=cp_group)
    pieces = gathered.unflatten(0, (2 * size, -1))
    return pieces.index_select(0, cp_order(size, local.device)).flatten(0, 1)


def document_attention_mask(document_ids: Tensor, *, cp_group: dist.ProcessGroup | None = None) -> Tensor:
    """Causal attention within documents, as the ``attention_mask`` of GPTModel. Build it once per microbatch.

    Args:
        document_ids: [b, s] integers, equal within a document; [b, s / c] of this rank's pieces under context
            parallelism.
        cp_group: the context-parallel group; None or a single rank means that ``document_ids`` is whole.

    Returns:
        [b, 1, s, s] bool, or [b, 1, s / c, s]; True means "do not attend", as everywhere in Megatron.
    """
    queries = document_ids
    position = torch.arange(document_ids.shape[1], device=document_ids.device)
    keys, key_position = queries, position
    if cp_group is not None and cp_group.size() > 1:
        keys = gather_sequence(document_ids.t().contiguous(), cp_group).t()
        key_position = torch.arange(keys.shape[1], device=keys.device)
        pieces = key_position.view(2 * cp_group.size(), -1)
        position = torch.cat([pieces[cp_group.rank()], pieces[-1 - cp_group.rank()]])
    later = key_position[None, :] > position[:, None]
    return (later | (keys[:, None, :] != queries[:, :, None])).unsqueeze(1)


def _to_one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[..., d] of several d -> [..., the largest], filled with zeros."""
    width = max(tensor.shape[-1] for tensor in tensors)
    return tuple(
        tensor if tensor.shape[-1] == width else pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors
    )


class ScaledDotProductAttention(MegatronModule):
    """Drop-in for megatron.core.transformer.dot_product_attention.DotProductAttention.

    Args:
        config: sizes, dropout, context parallelism.
        layer_number: 1-based over the whole model; unused.
        attn_mask_type: what is masked when no mask is given: ``causal`` or ``no_mask``.
        attention_type: unused.
        attention_dropout: probability; default ``config.attention_dropout``.
        softmax_scale: factor of the scores; default d ** -0.5 with d = ``k_channels``.
        cp_comm_type: unused; keys and values are always gathered.
        k_channels: size of a query and key head, where it is not ``config.kv_channels``.
        v_channels: unused; the size of a value head is read from the values.
        pg_collection: process groups; ``cp`` is used where it has more than one rank.

    Raises:
        ValueError: the configuration asks for a window, another softmax, or a mask type that is not implemented.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        if config.window_size is not None:
            raise ValueError(
                f"window_size: found {config.window_size}; expected None (no windows without Transformer Engine)"
            )
        if config.softmax_type != "vanilla":
            raise ValueError(f"softmax_type: found {config.softmax_type}; expected vanilla")
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(f"attn_mask_type: found {attn_mask_type}; expected causal or no_mask")
        self.attn_mask_type = attn_mask_type
        # apply_query_key_layer_scaling divides the scores by the layer number and multiplies them again in float32,
        # against overflow in float16; these kernels accumulate in float32, so there is nothing to do for it.
        head = k_channels if k_channels is not None else config.kv_channels
        assert head is not None
        self.softmax_scale = softmax_scale if softmax_scale is not None else head**-0.5
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        cp_group = getattr(pg_collection, "cp", None) if pg_collection is not None else None
        if cp_group is None and config.context_parallel_size > 1:
            raise ValueError("pg_collection.cp: found nothing; expected the context-parallel group")
        self.cp_group = cp_group if cp_group is not None and cp_group.size() > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """softmax(scale * q k^T + mask) v.

        Args:
            query: [sq, b, n, d]
            key: [sk, b, g, d], with g a divisor of n.
            value: [sk, b, g, dv]
            attention_mask: bool, broadcastable to [b, 1, sq, sk], True where a query must not see a key; it must hold
                causality too. Under context parallelism sk is the whole sequence (see :func:`document_attention_mask`).
                None: ``attn_mask_type`` alone.
            attn_mask_type: replaces the one given at construction.

        Returns:
            [sq, b, n * dv]

        Raises:
            ValueError: ``attention_bias`` or ``packed_seq_params`` is given.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias: found a tensor; expected None")
        if packed_seq_params is not None:
            raise ValueError(
                "packed_seq_params: found a value; expected None (give document ids; see document_attention_mask)"
            )
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        if self.cp_group is not None:
            key, value = gather_sequence(key, self.cp_group), gather_sequence(value, self.cp_group)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s, d], views
        if attention_mask is not None:
            # One mask for all layers of a microbatch: inverting it is small next to the scores.
            context = self._attend(q, k, v, mask=~attention_mask)
        elif self.cp_group is not None and causal:
            context = self._causal_pieces(q, k, v)
        else:
            context = self._attend(q, k, v, causal=causal)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _causal_pieces(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """This rank's two pieces of queries, each against the keys up to its end."""
        assert self.cp_group is not None
        rank, size = self.cp_group.rank(), self.cp_group.size()
        length = k.shape[2] // (2 * size)
        contexts = []
        for piece, queries in zip((rank, 2 * size - 1 - rank), q.chunk(2, dim=2), strict=True):
            end = (piece + 1) * length
            seen = torch.ones(length, end, dtype=torch.bool, device=q.device).tril(end - length)
            contexts.append(self._attend(queries, k[:, :, :end], v[:, :, :end], mask=seen))
        return torch.cat(contexts, dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """[b, n, sq, dv]; here True in ``mask`` means "attend", as torch has it."""
        repeats = q.shape[1] // k.shape[1]
        # Grouped keys without copies where a fused kernel takes them: always on a CPU (1.1 to 2.4 times faster than
        # expanding there), on a GPU only the flash kernel, which wants 16 bits and no mask. Otherwise torch would fall
        # back to materialized scores.
        native = q.device.type == "cpu" or (mask is None and q.dtype in (torch.float16, torch.bfloat16))
        if repeats > 1 and not native:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        width = v.shape[-1]
        if native and width != q.shape[-1]:
            # The same kernels want heads of one size. Zeros change neither scores nor values, and on a CPU they cost
            # less than materialized scores (1,024 tokens, 4 heads of 192 and 128 channels, forward and backward: 77 ms
            # instead of 190).
            q, k, v = _to_one_width(q, k, v)
        dropout = self.dropout if self.training else 0.0

        def attend() -> Tensor:
            return scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=repeats > 1 and native,
            )[..., :width]

        if dropout > 0.0 and not self.config.sequence_parallel:
            # Heads differ between tensor-parallel ranks, so their random numbers must too.
            tracker = tensor_parallel.get_cuda_rng_tracker()
            assert tracker is not None
            with tracker.fork():
                return attend()
        return attend()
