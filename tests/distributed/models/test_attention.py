"""Core attention and masks: against the definition, over packed documents, and under context parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import make_llama

HEAD = 8
DOCUMENTS = [[0] * 5 + [1] * 1 + [2] * 10, [0] * 16]


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + mask) v with grouped keys, [s, b, n, d] -> [s, b, n d], in float64."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnqk,kbnd->qbnd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v).flatten(2)


def inputs(heads: int, groups: int, value: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((heads, HEAD), (groups, HEAD), (groups, value), (heads, value))
    return [torch.randn(16, 2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def our_attention(heads: int, groups: int, cp_group: Any = None, **changes: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from remit_megatron.models.attention import ScaledDotProductAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * HEAD,
        num_attention_heads=heads,
        num_query_groups=groups,
        attention_dropout=0.0,
    )
    collection = ProcessGroupCollection()
    collection.cp = cp_group
    return ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=collection, **changes)


def attention_errors(heads: int, groups: int, value: int, documents: bool) -> list[float]:
    """Largest differences from the definition: output, then gradients of q, k, v."""
    import patches

    patches.apply()
    from remit_megatron.models.attention import document_attention_mask

    *qkv, upstream = inputs(heads, groups, value)
    ids = torch.tensor(DOCUMENTS)
    hidden = document_attention_mask(ids if documents else torch.zeros_like(ids))
    qkv = [tensor.requires_grad_() for tensor in qkv]
    attention = our_attention(heads, groups, k_channels=HEAD, v_channels=value)
    ours = attention(*qkv, hidden if documents else None)
    assert ours.shape == (16, 2, heads * value)
    expected = definition(*qkv, hidden)
    pairs = zip(
        (ours, *torch.autograd.grad((ours * upstream.flatten(2)).sum(), qkv)),
        (expected, *torch.autograd.grad((expected * upstream.flatten(2)).sum(), qkv)),
        strict=True,
    )
    return [(a - b).abs().max().item() for a, b in pairs]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("heads", "groups", "value"), [(4, 4, HEAD), (6, 2, HEAD), (4, 1, 5), (6, 2, 11)])
def test_equals_the_definition(pool, heads, groups, value, documents):
    (errors,) = pool.run(attention_errors, world_size=1, heads=heads, groups=groups, value=value, documents=documents)
    assert max(errors) < 1e-13


def refusals() -> list[str]:
    """What the constructor and the call refuse."""
    import patches

    patches.apply()
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from remit_megatron.models.attention import ScaledDotProductAttention

    base = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    found = []
    for changes in ({"window_size": (4, 0)}, {"softmax_type": "learnable"}, {"context_parallel_size": 2}):
        try:
            ScaledDotProductAttention(TransformerConfig(**base, **changes), 1, AttnMaskType.causal, "self")
        except ValueError as error:
            found.append(str(error))
    q = torch.zeros(4, 1, 2, HEAD)
    for kwargs in ({"attention_bias": torch.zeros(1)}, {"packed_seq_params": PackedSeqParams()}):
        try:
            our_attention(2, 2)(q, q, q, None, **kwargs)
        except ValueError as error:
            found.append(str(error))
    return found


def test_refuses_what_it_would_compute_wrongly(pool):
    (found,) = pool.run(refusals, world_size=1)
    fields = ("window_size", "softmax_type", "pg_collection.cp", "attention_bias", "packed_seq_params")
    assert [line.split(":")[0] for line in found] == list(fields)


def split(tensor: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    """This rank's two pieces in Megatron's balanced layout, by Megatron's own code."""
    pieces = tensor.chunk(2 * size, dim)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], dim)


def context_parallel_errors(documents: bool) -> list[float]:
    """This rank's part of the output and of the gradients against the definition on the whole sequence."""
    import patches

    patches.apply()
    import torch.distributed as dist
    from megatron.core.utils import get_batch_on_this_cp_rank

    from remit_megatron.models.attention import document_attention_mask, gather_sequence
    from remit_megatron.runtime import parallel

    parallel.initialize(parallel.rank_environment())
    group = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    *whole, upstream = inputs(6, 2, HEAD)
    whole = [tensor.requires_grad_() for tensor in whole]
    ids = torch.tensor(DOCUMENTS) if documents else torch.zeros(2, 16, dtype=torch.int64)
    expected = definition(*whole, document_attention_mask(ids))
    gradients = torch.autograd.grad((expected * upstream.flatten(2)).sum(), whole)

    batch = get_batch_on_this_cp_rank({"tokens": ids.clone()}, False, cp_group=group)
    assert torch.equal(batch["tokens"], split(ids, 1, rank, size)), "the layout is Megatron's"
    assert torch.equal(gather_sequence(batch["tokens"].t().contiguous(), group).t(), ids)
    local = [split(tensor.detach(), 0, rank, size).requires_grad_() for tensor in whole]
    mask = document_attention_mask(batch["tokens"], cp_group=group) if documents else None
    ours = our_attention(6, 2, cp_group=group)(*local, mask)
    ours_gradients = torch.autograd.grad((ours * split(upstream, 0, rank, size).flatten(2)).sum(), local)
    pairs = zip((ours, *ours_gradients), (expected, *gradients), strict=True)
    return [(a - split(b, 0, rank, size)).abs().max().item() for a, b in pairs]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_context_parallel_equals_one_process(pool, world_size, documents):
    for errors in pool.run(context_parallel_errors, world_size=world_size, documents=documents):
        assert max(errors) < 1e-13


def model_logits(directory: str, tokens: list[list[int]], documents: list[list[int]] | None, cp: int) -> torch.Tensor:
    """Logits of the whole model, with a document mask, under context parallelism, in the order of the sequence."""
    import patches

    patches.apply()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_batch_on_this_cp_rank

    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.attention import document_attention_mask, gather_sequence
    from remit_megatron.models.build import build_chunks, default_arguments, model_config
    from remit_megatron.runtime import parallel

    parallel.initialize(parallel.rank_environment())
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    source = resolve(directory)
    arguments = default_arguments(context_parallel_size=cp)
    chunks = build_chunks(model_config(source.hf_config, arguments), groups)
    load_weights(chunks, source)
    ids = torch.tensor(tokens)
    batch = {"tokens": ids, "position_ids": torch.arange(ids.shape[1]).repeat(len(ids), 1)}
    if documents is not None:
        batch["documents"] = torch.tensor(documents)
    if cp > 1:
        batch = get_batch_on_this_cp_rank(batch, False, cp_group=groups.cp)
    with torch.no_grad():
        mask = None if documents is None else document_attention_mask(batch["documents"], cp_group=groups.cp)
        logits = chunks[0](batch["tokens"], batch["position_ids"], mask)
        return logits if cp == 1 else gather_sequence(logits.transpose(0, 1).contiguous(), groups.cp).transpose(0, 1)


@pytest.mark.parametrize("cp", [1, 2])
def test_document_mask_equals_separate_documents(pool, tmp_path, cp):
    """Also shows that rotary positions need not restart: only their differences count."""
    import transformers

    directory = make_llama(tmp_path / "model", seed=4)
    tokens = torch.randint(0, 51, (2, 16), generator=torch.Generator().manual_seed(5))
    for documents in (None, DOCUMENTS):
        results = pool.run(
            model_logits, world_size=cp, directory=str(directory), tokens=tokens.tolist(), documents=documents, cp=cp
        )
        model = transformers.LlamaForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            for row, ids in enumerate(documents or [[0] * 16] * 2):
                lengths = torch.tensor(ids).unique_consecutive(return_counts=True)[1].tolist()
                separate = [model(part[None]).logits[0] for part in tokens[row].split(lengths)]
                for logits in results:
                    assert (logits[row, :, :51] - torch.cat(separate)).abs().max() < 2e-5
