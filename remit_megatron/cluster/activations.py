"""Bytes that the forward pass keeps for backward, and what the step needs beside them.

After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4, who count
what each operation of a layer keeps. Their layer has GeLU, dropout and materialized scores; here are SwiGLU, grouped
queries, rotary embeddings, fused attention (queries, keys, values, output and one float32 a token and head) and no
dropout.

Legend: t tokens of a microbatch on a rank (micro-batch x sequence / CP), e bytes of an element, T tensor-parallel size
(and P = T with sequence parallelism, else 1), h hidden, f feed-forward, n heads, g key/value heads, d size of a head,
dv of a value's, V padded vocabulary.

One layer keeps

    input of the two norms                     2 t h e / P         and 4 t / P each for their statistics
    input of qkv and of fc1 (the norms' output) 2 t h e / P
    projected queries, keys and values         t (n + 2 g) d e / T     alive as long as the values, a view of them, are
    rotated queries and keys                   t (n + g) d e / T
    cosines and sines, of queries and of keys  4 s / CP d e            the same for every sample
    context, and the scores' logarithmic sums  t n dv e / T + 4 t n / T
    output of fc1, input of fc2                3 t f e / T

Layers without rotary embeddings (``no_rope_freq``) have no rotated queries and keys, only a copy of the queries where a
rank has several groups of them. A norm of queries and keys keeps its inputs, t (n + g) d e / T, and 8 t. Norms on the
branch output keep as much as those before it: the input of the norm and the input of the projection. Multi-latent
attention replaces the three rows of attention by the latents, their norms' output, and n heads of queries twice, keys
once, and the keys and values that the latents are expanded to.

Without Transformer Engine a document mask is an e-byte element for every pair of a query and a key, in every layer;
context parallelism gathers keys and values of the whole sequence, and without a document mask keeps the context twice
and a mask of its two causal pieces; and where there is a mask, a GPU's keys and values are copied to n heads.

Recomputation (``recompute_granularity``): ``full`` keeps the input of every unit of layers, t h e / P, and the angles
of the rotary embedding; ``selective`` drops what its modules name: ``mlp`` the last row, ``layernorm`` the norms'
output, ``core_attn`` the scores' sums (with fused attention that is all there is to drop). While going back, what was
dropped of one unit, or of one layer, exists again; on the last stage the logits are gone by then.

Pipeline stage i of p holds min(m, p - i) microbatches at once; with v virtual stages,
min(m v, 2 (p - 1 - i) + (v - 1) p + 1) microbatches of one chunk each (the warm-up of Megatron's schedules, plus the
one that is being worked on).

The last stage holds the logits of one microbatch, t V e / T; the loss overwrites them with their gradient and keeps
four numbers a token. With ``loss.linear`` it holds in their place the gradients of the hidden states, t h e, and of the
output weight, 4 V h / T.

On a CPU torch composes RMSNorm of float32 operations and SwiGLU of single ones, which keep more; ``fused=False``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from remit_megatron.cluster.inventory import Inventory
from remit_megatron.cluster.state import chunk_layers

_FLOAT = 4
# Of the loss, beside the logits: label (int64), whether it counts, loss, maximum and sum (float32); of the objective,
# whether the token counts and its weight.
_LOSS_BYTES_PER_TOKEN = 8 + 1 + 3 * _FLOAT + 1 + _FLOAT
# What remit_megatron.kernels.linear_token_loss holds at once on a GPU, of the logits and of a product.
_LINEAR_CHUNK = 256 << 20
_LINEAR_PRODUCT = 64 << 20


@dataclass(frozen=True)
class LayerBytes:
    """What one transformer layer keeps of one microbatch, in bytes."""

    boundary: float
    norms: float
    norm_outputs: float
    attention: float
    sums: float
    mlp: float

    @property
    def total(self) -> float:
        return self.norms + self.norm_outputs + self.attention + self.sums + self.mlp


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes on one pipeline stage at the moment when it holds most.

    Attributes:
        microbatch: kept of one microbatch by all layers of the stage.
        in_flight: how many microbatches of the whole stage are held; a fraction with virtual stages.
        layers: kept by the layers, of all microbatches in flight.
        recomputed: what comes back of one unit of layers while it is recomputed.
        logits: logits of one microbatch and what the loss keeps; the last stage's.
        ends: last norm and the head's input; the last stage's.
        inputs: token ids, the first stage's, and with full recomputation the angles of the rotary embedding.
        working: an estimate of what exists for moments: gradients of one layer, gathered inputs, a gradient of the
            largest weight before it is added.
    """

    microbatch: float
    in_flight: float
    layers: float
    recomputed: float
    logits: float
    ends: float
    inputs: float
    working: float

    @property
    def kept(self) -> float:
        """Saved for backward: what a measurement of saved tensors finds."""
        return self.layers + self.inputs + max(self.logits + self.ends, self.recomputed)

    @property
    def total(self) -> float:
        return self.kept + self.working


def tokens_of_microbatch(args: argparse.Namespace) -> int:
    """Tokens of a microbatch on one rank."""
    return args.micro_batch_size * args.seq_length // args.context_parallel_size


def layer_bytes(
    args: argparse.Namespace, *, query_key_norm: bool = False, document_mask: bool = False, fused: bool = True
) -> LayerBytes:
    """The table above for one layer, the mean of those with and without rotary embeddings.

    Args:
        args: a validated Megatron namespace, or a copy of one with other parallel sizes.
        query_key_norm: queries and keys are normalized.
        document_mask: attention stops at document boundaries.
        fused: norms and activation functions are single kernels, as on a GPU; False for a CPU's.
    """
    t, e, tensor = tokens_of_microbatch(args), args.params_dtype.itemsize, args.tensor_model_parallel_size
    part = tensor if args.sequence_parallel else 1
    residual = t * args.hidden_size * e / part
    norm = residual + _FLOAT * t / part
    gate = 0.0
    if not fused:
        # x in float32 (a copy of a 16-bit one) and x / rms in float32; the gate's silu and a copy of the other half.
        copy = 0.0 if e == _FLOAT else _FLOAT * t * args.hidden_size / part
        norm += copy + _FLOAT * t * args.hidden_size / part
        norm -= 0.0 if e == _FLOAT else residual  # the 16-bit input itself is not kept
        gate = 2 * t * args.ffn_hidden_size * e / tensor if args.swiglu and not args.bias_swiglu_fusion else 0.0
    masked = document_mask and args.transformer_impl == "local"
    gathered = args.context_parallel_size > 1 and args.transformer_impl == "local"
    attention = _latent_attention(args, t) if args.multi_latent_attention else _attention(args, t, gathered, masked)
    attention = attention * e + _masks(args, e, masked, gathered)
    if query_key_norm and not args.multi_latent_attention:
        heads, groups, size, _ = _widths(args)
        attention += t * (heads + groups) * size * e / tensor + 2 * _FLOAT * t
    if fused and (masked or gathered):
        attention += _expanded(args) * e
    return LayerBytes(
        boundary=residual,
        norms=2 * norm,
        norm_outputs=2 * residual,
        attention=attention,
        sums=_FLOAT * t * args.num_attention_heads / tensor,
        mlp=(3 if args.swiglu else 2) * t * args.ffn_hidden_size * e / tensor + gate,
    )


def _widths(args: argparse.Namespace) -> tuple[int, int, int, int]:
    """(query heads, key/value heads, size of a query and key head, size of a value head)."""
    heads = args.num_attention_heads
    if args.multi_latent_attention:
        return heads, heads, args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim
    return heads, args.num_query_groups if args.group_query_attention else heads, args.kv_channels, args.kv_channels


def _attention(args: argparse.Namespace, t: int, gathered: bool, masked: bool) -> float:
    """Elements, without the scores' sums."""
    heads, groups, size, _ = _widths(args)
    tables = 4 * args.seq_length / args.context_parallel_size * _rotary_size(args)
    if gathered:
        contexts = 1 if masked else 2
        per_token = heads * size + 2 * groups * size * args.context_parallel_size + contexts * heads * size
    else:
        per_token = (heads + 2 * groups) * size + heads * size
        rotated = (heads + groups) * size
        # Queries of several groups are copied to be seen as one axis; rotation makes that copy in any case.
        copied = heads * size if args.tensor_model_parallel_size < groups < heads else 0
        share = _share_without_rope(args)
        per_token += (1 - share) * rotated + share * copied
        tables *= 1 - share
    return t * per_token / args.tensor_model_parallel_size + tables


def _share_without_rope(args: argparse.Namespace) -> float:
    """Share of the layers that leave queries and keys as they are."""
    skipped = args.no_rope_freq
    if not skipped:
        return 0.0
    count = args.num_layers // skipped if isinstance(skipped, int) else sum(skipped)
    return count / args.num_layers


def _latent_attention(args: argparse.Namespace, t: int) -> float:
    """Elements, without the scores' sums."""
    heads, _, key, value = _widths(args)
    rotary = _rotary_size(args)
    latents = 2 * (args.kv_lora_rank + (args.q_lora_rank or 0)) + rotary
    expanded = heads * (2 * key + key + args.qk_head_dim + value + value)
    tables = 4 * args.seq_length / args.context_parallel_size * rotary
    return t * (latents + expanded / args.tensor_model_parallel_size) + tables


def _masks(args: argparse.Namespace, e: int, masked: bool, gathered: bool) -> float:
    """Bytes of a layer's masks."""
    length, context = args.seq_length, args.context_parallel_size
    if masked:
        return args.micro_batch_size * length * length / context * e
    # Of 2 c pieces a rank has two, of s / (2 c) queries each, that together see (2 c + 1) pieces of keys.
    return length * length * (2 * context + 1) / (4 * context**2) * e if gathered else 0.0


def _expanded(args: argparse.Namespace) -> float:
    """Elements of keys and values of the whole sequence, copied to all query heads."""
    heads, groups, key, value = _widths(args)
    tokens = args.micro_batch_size * args.seq_length
    return tokens * heads * (key + value) / args.tensor_model_parallel_size if groups < heads else 0.0


def microbatches_in_flight(args: argparse.Namespace, stage: int, microbatches: int) -> float:
    """Microbatches whose activations a stage holds at once, in units of the whole stage."""
    stages, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    if virtual == 1:
        return min(microbatches, stages - stage)
    chunks = min(microbatches * virtual, 2 * (stages - 1 - stage) + (virtual - 1) * stages + 1)
    return chunks / virtual


def activation_bytes(
    inventory: Inventory,
    args: argparse.Namespace,
    *,
    stage: int,
    microbatches: int,
    document_mask: bool = False,
    linear_loss: bool = False,
    fused: bool = True,
) -> ActivationBytes:
    """Bytes of activations on a rank of a pipeline stage.

    Args:
        inventory: the model under the tensor-parallel size of ``args``.
        args: a validated Megatron namespace, or a copy of one with other parallel sizes.
        stage: pipeline stage.
        microbatches: of one step, on each data-parallel rank.
        document_mask, fused: see :func:`layer_bytes`.
        linear_loss: output layer and loss are computed together.
    """
    normed = any(name.rsplit(".", 2)[-2] in ("q_norm", "q_layernorm") for name in inventory.layer)
    layer = layer_bytes(args, query_key_norm=normed, document_mask=document_mask, fused=fused)
    layers = sum(chunk_layers(args, stage))
    kept, again = _kept(args, layer, layers)
    angles = _angles(args) if args.recompute_granularity == "full" else 0.0
    in_flight = microbatches_in_flight(args, stage, microbatches)
    last = stage == args.pipeline_model_parallel_size - 1
    t, e, tensor = tokens_of_microbatch(args), args.params_dtype.itemsize, args.tensor_model_parallel_size
    table = inventory.head_elements // args.hidden_size
    working = _working(inventory, args, t, e, tensor, table=last or stage == 0)
    logits = ends = 0.0
    if last and linear_loss:
        logits = t * (args.hidden_size * e + _LOSS_BYTES_PER_TOKEN) + _FLOAT * inventory.head_elements
        ends = layer.norms / 2
        chunk = args.seq_length / args.context_parallel_size * table * e
        working = max(working, max(chunk, _LINEAR_CHUNK) + _LINEAR_PRODUCT)
    elif last:
        logits = t * (table * e + _LOSS_BYTES_PER_TOKEN)
        ends = layer.norms / 2 + layer.boundary
    return ActivationBytes(
        microbatch=kept,
        in_flight=in_flight,
        layers=kept * in_flight,
        recomputed=again,
        logits=logits,
        ends=ends,
        inputs=angles + (8 * t * in_flight if stage == 0 else 0.0),
        working=working,
    )


def _kept(args: argparse.Namespace, layer: LayerBytes, layers: int) -> tuple[float, float]:
    """(bytes that the layers of a stage keep of one microbatch, bytes that come back while a unit is recomputed)."""
    if args.recompute_granularity == "full":
        unit, boundary = min(args.recompute_num_layers, layers), layer.boundary
        if args.distribute_saved_activations and not args.sequence_parallel:
            boundary /= args.tensor_model_parallel_size
        if args.recompute_method == "uniform":
            # A unit's own input is among what it keeps.
            return -(-layers // unit) * boundary, unit * layer.total - boundary
        # The first layers are recomputed, one at a time; those behind them have gone back, and are freed, by then.
        rest = (layers - unit) * layer.total
        return unit * boundary + rest, max(0.0, layer.total - boundary - rest)
    kept = layer.total
    if args.recompute_granularity == "selective":
        modules = args.recompute_modules
        kept -= layer.mlp if "mlp" in modules else 0.0
        kept -= layer.norm_outputs if "layernorm" in modules else 0.0
        kept -= layer.sums if "core_attn" in modules else 0.0
    return kept * layers, layer.total - kept


def _angles(args: argparse.Namespace) -> float:
    """Bytes of the rotary embedding's angles, float32, one for all layers and microbatches."""
    return _FLOAT * args.seq_length / args.context_parallel_size * _rotary_size(args)


def _rotary_size(args: argparse.Namespace) -> int:
    return args.qk_pos_emb_head_dim if args.multi_latent_attention else args.kv_channels


def _working(inventory: Inventory, args: argparse.Namespace, t: int, e: int, tensor: int, *, table: bool) -> float:
    """Going back through fc2 and fc1: gradients of the two, of the stream and of its gathered copy; a weight's.

    Layers may add a weight's gradient to the buffer in the product; the table's is made whole before it is added.
    """
    layer = t * e * (3 * args.ffn_hidden_size / tensor + 3 * args.hidden_size)
    weight = 0 if args.gradient_accumulation_fusion else args.ffn_hidden_size // tensor * 2 * args.hidden_size
    return layer + (inventory.head_elements if table else weight) * e
