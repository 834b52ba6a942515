"""Whether packed documents go rightly through this machine's attention, forward and backward.

Transformer Engine hands packed sequences to cuDNN or FlashAttention, which choose a kernel by GPU, version and width of
the heads. Some have right outputs and wrong gradients, without a word: on an H100 with cuDNN 9.19 and values padded to
192 channels those of the weights that make queries, keys and values were off by 13 to 20% of their norm
(docs/benchmarks/parity.md), and NVIDIA's issues know other cases (TransformerEngine #2186, #2448, #3249, #3333). A loss
that falls a little slower says nothing, so a run asks before its first step, with its own modules and widths, and
documents of uneven lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from remit_megatron.models.packing import packed_sequences

# Of documents. First those with which an H100 was wrong, of two sequences of 2,048 tokens; then some within a tile of a
# kernel, which meet what the first round has left in a workspace.
LENGTHS = ((1025, 256, 767, 1025, 256, 767), (1, 257, 511, 2, 129, 64))
LIMIT = 0.05  # of a tensor's norm; rounding to bfloat16 is below 0.02 on a CPU
_LARGEST = "current_max_attn_logits"
PARTS = ("output", "gradient of queries", "gradient of keys", "gradient of values")


def packed_attention_fault(chunks: Sequence[Any]) -> str | None:
    """What is wrong with packed documents in a model's attention, in one line; None where nothing is.

    Leaves random numbers and statistics as they are.

    Args:
        chunks: of the model on this rank, on its device; one layer of each is examined, for they are alike.
    """
    from megatron.core.transformer.attention import Attention

    for chunk in chunks:
        attention = next((module for module in chunk.modules() if isinstance(module, Attention)), None)
        if attention is None or attention.config.attention_dropout:  # there is nothing to compare with
            continue
        for number, lengths in enumerate(LENGTHS):
            with _untouched(attention):
                errors = packed_attention_errors(attention, lengths, seed=number)
            # Not a number is the worst.
            part, error = max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
            if not error <= LIMIT:
                return _text(attention, part, error)
    return None


def packed_attention_errors(attention: Any, lengths: Sequence[int], *, seed: int) -> dict[str, float]:
    """Norm of the error over the norm, of the output and of each gradient of a causal attention over packed documents.

    Args:
        attention: a Megatron ``Attention``; its core is called as its ``forward`` does it, with random queries, keys
            and values of its dtype and this rank's heads.
        lengths: of the documents.
        seed: of queries, keys, values and the incoming gradient.
    """
    heads, groups, width, value_width = _sizes(attention)
    device, dtype = next(attention.parameters()).device, attention.config.params_dtype
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, channels: int) -> Tensor:
        numbers = torch.randn(sum(lengths), count, channels, generator=generator)
        return numbers.to(device, dtype).requires_grad_()

    inputs = [draw(heads, width), draw(groups, width), draw(groups, value_width)]
    incoming = draw(heads, value_width).detach()
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    output = attention._run_core_attention(  # both of Megatron's classes have it
        *inputs,
        None,
        attn_mask_type=attention.attn_mask_type,
        packed_seq_params=packed_sequences(ids, device),
    ).reshape(incoming.shape)
    found = [output, *torch.autograd.grad(output, inputs, incoming)]
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    wanted = _definition(exact, lengths, scale=_scale(attention, width))
    true = [wanted, *torch.autograd.grad(wanted, exact, incoming.float())]
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=True)]
    return dict(zip(PARTS, errors, strict=True))


def _definition(tensors: Sequence[Tensor], lengths: Sequence[int], *, scale: float) -> Tensor:
    """softmax(scale q k^T) v, causal, each document alone; [t, heads, channels], fewer heads of keys and values."""
    outputs = []
    for q, *others in zip(*(tensor.split(list(lengths)) for tensor in tensors), strict=True):
        k, v = (other.repeat_interleave(q.shape[1] // other.shape[1], dim=1) for other in others)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -math.inf).softmax(-1), v))
    return torch.cat(outputs)


def _sizes(attention: Any) -> tuple[int, int, int, int]:
    """This rank's heads of queries, and of keys; the channels of a query, and of a value."""
    from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

    # Not its own number, which is that of a group where there are more ranks than groups of heads.
    heads = attention.config.num_attention_heads // attention.config.tensor_model_parallel_size
    if isinstance(attention, MultiLatentAttention):
        return heads, heads, attention.q_head_dim, attention.config.v_head_dim
    width = attention.hidden_size_per_attention_head
    return heads, attention.num_query_groups_per_partition, width, width


def _scale(attention: Any, width: int) -> float:
    """What scores are multiplied by."""
    own = getattr(attention, "softmax_scale", None) or attention.config.softmax_scale
    return 1 / math.sqrt(width) if own is None else own


@contextmanager
def _untouched(attention: Any) -> Iterator[None]:
    """Leaves torch's and Megatron's random numbers as they were, and the largest score that it has met (qk_clip)."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    states, core = tracker.get_states(), attention.core_attention
    largest = getattr(core, _LARGEST, None)
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    tracker.set_states(states)
    if hasattr(core, _LARGEST):
        setattr(core, _LARGEST, largest)


def _text(attention: Any, part: str, error: float) -> str:
    from megatron.core.utils import get_te_version

    heads, _, width, value_width = _sizes(attention)
    sizes = f"{heads} heads of {width} and {value_width} channels"
    number = torch.backends.cudnn.version() or 0
    cudnn = f"torch's cuDNN {number // 10000}.{number // 100 % 100}.{number % 100}"
    return (
        f"data.document_mask: the {part} of attention over packed documents is off by {error:.0%} of its norm on this "
        f"machine ({sizes}, Transformer Engine {get_te_version()}, {cudnn}); "
        f"expected below {LIMIT:.0%}. The run would train wrongly without a word: set megatron.transformer_impl=local, "
        "or megatron.attention_backend=unfused, which keeps all scores in memory, or install another cuDNN"
    )
