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

Norms on the branch output keep as much: the input of the norm and the input of the projection, each once. Multi-latent
attention replaces the three rows of attention by the latents, their norms' output, and n heads of queries twice, keys
once, and the keys and values that the latents are expanded to.

Recomputation (``recompute_granularity``): ``full`` keeps the input of every unit of layers, t h e / P, and needs one
unit's activations at a time while going back; ``selective`` drops what its modules name: ``mlp`` the last row,
``layernorm`` the third, ``core_attn`` the scores' sums (with fused attention that is all there is to drop).

Pipeline stage i of p holds min(m, p - i) microbatches at once; with v virtual stages,
min(m v, 2 (p - 1 - i) + (v - 1) p + 1) microbatches of one chunk each (the warm-up of Megatron's schedules, plus the
one that is being worked on).

The last stage holds the logits of one microbatch, t V e / T; the loss overwrites them with their gradient and keeps four
numbers a token.

On a CPU torch composes RMSNorm of float32 operations and SwiGLU of single ones, which keep more; ``fused=False``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from remit_megatron.cluster.inventory import Inventory
from remit_megatron.cluster.state import chunk_layers

_FLOAT = 4
# Of the loss, beside the logits: label (int64), whether it counts, loss, maximum and sum (float32).
_LOSS_BYTES_PER_TOKEN = 8 + 1 + 3 * _FLOAT


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
        logits: logits of one microbatch and what the loss keeps; the last stage's.
        ends: embedding, last norm and the head's input.
        working: an estimate of what exists for moments: gradients of one layer, gathered inputs, a gradient of the
            largest weight before it is added, a recomputed unit.
    """

    microbatch: float
    in_flight: float
    layers: float
    logits: float
    ends: float
    working: float

    @property
    def kept(self) -> float:
        """Saved for backward: what a measurement of saved tensors finds."""
        return self.layers + self.logits + self.ends

    @property
    def total(self) -> float:
        return self.kept + self.working


def tokens_of_microbatch(args: argparse.Namespace) -> int:
    """Tokens of a microbatch on one rank."""
    return args.micro_batch_size * args.seq_length // args.context_parallel_size


def layer_bytes(args: argparse.Namespace, *, fused: bool = True) -> LayerBytes:
    """The table above for one layer.

    Args:
        args: a validated Megatron namespace, or a copy of one with other parallel sizes.
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
    attention = (_latent_attention(args, t) if args.multi_latent_attention else _attention(args, t)) * e
    return LayerBytes(
        boundary=residual,
        norms=2 * norm,
        norm_outputs=2 * residual,
        attention=attention,
        sums=_FLOAT * t * args.num_attention_heads / tensor,
        mlp=(3 if args.swiglu else 2) * t * args.ffn_hidden_size * e / tensor + gate,
    )


def _attention(args: argparse.Namespace, t: int) -> float:
    """Elements, without the scores' sums."""
    heads, size = args.num_attention_heads, args.kv_channels
    groups = args.num_query_groups if args.group_query_attention else heads
    tables = 4 * args.seq_length / args.context_parallel_size * size
    per_token = (heads + 2 * groups) * size + (heads + groups) * size + heads * size
    return t * per_token / args.tensor_model_parallel_size + tables


def _latent_attention(args: argparse.Namespace, t: int) -> float:
    """Elements, without the scores' sums."""
    heads, rotary = args.num_attention_heads, args.qk_pos_emb_head_dim
    key, value = args.qk_head_dim + rotary, args.v_head_dim
    latents = 2 * (args.kv_lora_rank + (args.q_lora_rank or 0)) + rotary
    expanded = heads * (2 * key + key + args.qk_head_dim + value + value)
    tables = 4 * args.seq_length / args.context_parallel_size * rotary
    return t * (latents + expanded / args.tensor_model_parallel_size) + tables


def microbatches_in_flight(args: argparse.Namespace, stage: int, microbatches: int) -> float:
    """Microbatches whose activations a stage holds at once, in units of the whole stage."""
    stages, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    if virtual == 1:
        return min(microbatches, stages - stage)
    chunks = min(microbatches * virtual, 2 * (stages - 1 - stage) + (virtual - 1) * stages + 1)
    return chunks / virtual


def activation_bytes(
    inventory: Inventory, args: argparse.Namespace, *, stage: int, microbatches: int, fused: bool = True
) -> ActivationBytes:
    """Bytes of activations on a rank of a pipeline stage.

    Args:
        inventory: the model under the tensor-parallel size of ``args``.
        args: a validated Megatron namespace, or a copy of one with other parallel sizes.
        stage: pipeline stage.
        microbatches: of one step, on each data-parallel rank.
        fused: see :func:`layer_bytes`.
    """
    layer, layers = layer_bytes(args, fused=fused), sum(chunk_layers(args, stage))
    kept, unit = _kept(args, layer, layers)
    in_flight = microbatches_in_flight(args, stage, microbatches)
    last = stage == args.pipeline_model_parallel_size - 1
    t, e, tensor = tokens_of_microbatch(args), args.params_dtype.itemsize, args.tensor_model_parallel_size
    logits = ends = 0.0
    if last:
        table = inventory.head_elements // args.hidden_size
        logits = t * (table * e + _LOSS_BYTES_PER_TOKEN)
        ends += layer.norms / 2 + layer.boundary
    if stage == 0:
        ends += 8 * t * in_flight  # token ids
    return ActivationBytes(
        microbatch=kept,
        in_flight=in_flight,
        layers=kept * in_flight,
        logits=logits,
        ends=ends,
        working=unit + _working(inventory, args, t, e, tensor, last=last or stage == 0),
    )


def _kept(args: argparse.Namespace, layer: LayerBytes, layers: int) -> tuple[float, float]:
    """(bytes that the layers of a stage keep of one microbatch, bytes of a unit while it is recomputed)."""
    if args.recompute_granularity == "full":
        unit = args.recompute_num_layers
        boundary = layer.boundary
        if args.distribute_saved_activations and not args.sequence_parallel:
            boundary /= args.tensor_model_parallel_size
        if args.recompute_method == "uniform":
            return -(-layers // unit) * boundary, min(unit, layers) * layer.total
        recomputed = min(unit, layers)
        return recomputed * boundary + (layers - recomputed) * layer.total, layer.total
    kept = layer.total
    if args.recompute_granularity == "selective":
        modules = args.recompute_modules
        kept -= layer.mlp if "mlp" in modules else 0.0
        kept -= layer.norm_outputs if "layernorm" in modules else 0.0
        kept -= layer.sums if "core_attn" in modules else 0.0
    return kept * layers, layer.total - kept


def _working(inventory: Inventory, args: argparse.Namespace, t: int, e: int, tensor: int, *, last: bool) -> float:
    """Going back through fc2 and fc1: gradients of the two, of the stream and of its gathered copy; a weight's."""
    layer = t * e * (3 * args.ffn_hidden_size / tensor + 3 * args.hidden_size)
    weight = 0
    if not args.gradient_accumulation_fusion:
        weight = inventory.head_elements if last else args.ffn_hidden_size // tensor * 2 * args.hidden_size
    return layer + weight * e
