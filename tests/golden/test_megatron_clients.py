"""Megatron's own classes as clients of our files: GPTDataset of token files, a plain GPTModel of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import patches

patches.apply()

from remit_megatron.conversion.processes import process_groups  # noqa: E402
from remit_megatron.conversion.to_megatron import import_model  # noqa: E402
from remit_megatron.data.build import build_dataset  # noqa: E402
from remit_megatron.data.indexed import IndexedTokens  # noqa: E402
from tests.tiny import make_llama, make_tokenizer, write_documents  # noqa: E402


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    build_dataset([write_documents(root / "c.jsonl", count=40, seed=3)], make_tokenizer(root / "t"), root / "data")
    return root / "data"


def test_gpt_dataset(tokens):
    """Its samples are our documents, end to end in its own order, each with its labels one further."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    length = 16
    config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=length,
        blend=([str(tokens)], None),
        split="100,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=type("Tokens", (), {"eod": 0, "pad": -1, "vocab_size": 51, "unique_identifiers": {}})(),
    )
    ours = IndexedTokens(tokens)
    theirs = IndexedDataset(str(tokens))
    assert len(theirs) == len(ours) == 40
    assert all(np.array_equal(theirs[number], ours.read(number)) for number in range(len(ours)))
    with process_groups(alone=True):
        dataset = GPTDataset(theirs, str(tokens), np.arange(40, dtype=np.int32), None, Split.train, config)
        samples = {int(dataset.shuffle_index[i]): dataset[i] for i in range(len(dataset))}
        order = dataset.document_index.tolist()
    stream = np.concatenate([ours.read(number) for number in order])
    assert sorted(set(order)) == list(range(40)) and len(samples) == (len(stream) - 1) // length
    for number, sample in samples.items():
        expected = stream[number * length : (number + 1) * length + 1]
        assert sample["tokens"].tolist() == expected[:-1].tolist()
        assert sample["labels"].tolist() == expected[1:].tolist()


def test_plain_gpt_model(tmp_path):
    """Megatron's model and layers without any part of ours, filled from a checkpoint by Megatron's own loading."""
    import transformers
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    directory = make_llama(tmp_path / "hf", seed=4, tie_word_embeddings=False)
    import_model(directory, tmp_path / "checkpoint")
    config = TransformerConfig(
        num_layers=4,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=12,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
    )
    ids = torch.randint(0, 51, (2, 20), generator=torch.Generator().manual_seed(1))
    with process_groups(alone=True):
        model_parallel_cuda_manual_seed(1)
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=51,
            max_sequence_length=256,
            position_embedding_type="rope",
            rotary_base=10000,
            share_embeddings_and_output_weights=False,
        ).eval()
        state = dist_checkpointing.load(model.sharded_state_dict(), str(tmp_path / "checkpoint"))
        model.load_state_dict(state, strict=False)
        mask = torch.triu(torch.ones(1, 1, 20, 20, dtype=torch.bool), diagonal=1)
        with torch.no_grad():
            found = model(ids, torch.arange(20).expand_as(ids), mask)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
    assert expected.std() > 0.5 and (found - expected).abs().max() <= 1e-5
