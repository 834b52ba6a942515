"""What weight decay applies to: Megatron's rule, or the one that ``optimizer`` of the configuration asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from remit_megatron.training.weight_decay import is_embedding, weight_decay_overrides
from tests.families import make_case
from tests.tiny import make_tokenizer, write_documents

NORMS, EMBEDDING, HEAD = "norms", "embedding", "head"


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, Path]:
    from remit_megatron.data.build import build_dataset

    root = tmp_path_factory.mktemp("decay")
    tokenizer = make_tokenizer(root / "tokenizer")
    documents = write_documents(root / "documents.jsonl", count=50, seed=3)
    build_dataset([str(documents)], tokenizer=str(tokenizer), output=str(root / "corpus"))
    return {
        "root": root,
        "tied": make_case(root / "tied", "smollm3-gqa_4_2_tied", tokenizer=tokenizer),
        "untied": make_case(root / "untied", "olmo2-mha_untied", tokenizer=tokenizer),
    }


def decay_of_run(path: str) -> dict[str, float]:
    """Trains a step; the weight decay that the optimizer holds for each parameter of this rank."""
    import patches

    patches.apply()
    from megatron.training import training

    from remit_megatron.run.configuration import load_config
    from remit_megatron.training.command import train

    original, built = training.get_megatron_optimizer, {}

    def capture(config, model, **kwargs):
        built.update(model=model, optimizer=original(config, model, **kwargs))
        return built["optimizer"]

    training.get_megatron_optimizer = capture
    try:
        assert train(load_config(path)) == 0
    finally:
        training.get_megatron_optimizer = original
    names = {id(parameter): name for chunk in built["model"] for name, parameter in chunk.named_parameters()}
    groups = built["optimizer"].param_groups
    found = {
        names.pop(id(p)).removeprefix("module."): group["weight_decay"] for group in groups for p in group["params"]
    }
    assert not names, "every parameter is in a group"
    return found


def kind_of(name: str) -> str:
    if name.endswith("word_embeddings.weight"):
        return EMBEDDING
    return HEAD if name == "output_layer.weight" else NORMS if "norm" in name else "matrix"


@pytest.mark.parametrize(
    ("model", "layout", "rule", "left_out"),
    [
        ("tied", "pipeline", {}, {NORMS}),
        ("tied", "pipeline", {"decay_embeddings": False}, {NORMS, EMBEDDING, HEAD}),  # the head is the embedding's copy
        ("tied", "tensor", {"decay_norms": True, "decay_embeddings": False}, {EMBEDDING}),
        ("untied", "pipeline", {"decay_norms": True, "decay_embeddings": False}, {EMBEDDING}),
        ("untied", "tensor", {"decay_norms": True}, set()),
        ("untied", "tensor", {"decay_norms": False, "decay_embeddings": True}, {NORMS}),
    ],
)
def test_parameter_groups(pool, material, tmp_path, model, layout, rule, left_out):
    config: dict[str, Any] = {
        "init": str(material[model]),
        "objective": {"name": "ntp"},
        "optimizer": rule,
        "data": {"train": str(material["root"] / "corpus"), "num_workers": 0},
        "megatron": {
            "seq_length": 32,
            "global_batch_size": 2,
            "train_iters": 1,
            "lr": 1e-3,
            "weight_decay": 0.125,
            f"{layout}_model_parallel_size": 2,
        },
        "run_dir": str(tmp_path / "run"),
        "logging": {"tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    ranks = pool.run(decay_of_run, world_size=2, path=str(tmp_path / "run.yaml"))
    seen = set()
    for name, decay in (item for rank in ranks for item in rank.items()):
        seen.add(kind_of(name))
        assert decay == (0.0 if kind_of(name) in left_out else 0.125), name
    assert seen >= {NORMS, EMBEDDING, "matrix"}


def test_names_of_transformer_engine_and_biases_go_by_their_shape():
    import patches

    patches.apply()
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    parameters = {
        "module.module.embedding.word_embeddings.weight": torch.zeros(4, 2),
        "module.module.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": torch.zeros(2),
        "module.module.decoder.layers.0.self_attention.linear_qkv.bias": torch.zeros(2),
        "module.module.decoder.layers.0.self_attention.linear_qkv.weight": torch.zeros(4, 2),
    }
    standard = get_standard_config_overrides(OptimizerConfig(decoupled_lr=0.1))

    def decays(**rule: bool | None) -> list[bool]:
        overrides = weight_decay_overrides(standard, **({"decay_norms": None, "decay_embeddings": None} | rule))
        assert {"max_lr": 0.1} in overrides.values(), "other overrides stay"
        return [
            not any(key.matches(p, name) and override.get("wd_mult") == 0 for key, override in overrides.items())
            for name, p in parameters.items()
        ]

    assert decays() == [True, False, False, True]
    assert decays(decay_norms=True) == [True, True, True, True]
    assert decays(decay_embeddings=False) == [False, False, False, True]
    assert decays(decay_norms=True, decay_embeddings=False) == [False, True, True, True]
    assert [is_embedding(p, name) for name, p in parameters.items()] == [True, False, False, False]  # type: ignore[arg-type]
