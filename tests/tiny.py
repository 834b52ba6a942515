"""Tiny real things for tests: models with odd sizes, a tokenizer, token files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,+-=?"


def make_tokenizer(directory: Path) -> Path:
    """One entry per character, and an end-of-document entry with id 0."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<|endoftext|>": 0, "<|unknown|>": 1}
    vocabulary |= {character: 2 + i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return directory


def make_model(directory: Path, values: dict[str, Any], *, seed: int, tokenizer: Path | None = None) -> Path:
    """A random model as a Hugging Face directory, of the values of a config.json; norms are not all ones."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(directory)
    if tokenizer is not None:
        for path in tokenizer.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def make_llama(directory: Path, *, seed: int, tokenizer: Path | None = None, **changes: Any) -> Path:
    """A random Llama of odd sizes; large initial weights, so that losses differ a lot."""
    settings: dict[str, Any] = dict(
        model_type="llama",
        vocab_size=51,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
        attention_bias=False,
        mlp_bias=False,
    )
    return make_model(directory, settings | changes, seed=seed, tokenizer=tokenizer)


def write_documents(path: Path, *, count: int, seed: int, longest: int = 90) -> Path:
    """JSONL of documents of very uneven length (1 to ``longest`` characters)."""
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        length = generator.choice((1, 2, 5, generator.randint(1, longest), generator.randint(1, longest)))
        words = "".join(generator.choice("abcde fgh 0123 +=") for _ in range(length))
        lines.append(json.dumps({"text": words or "a"}))
    path.write_text("\n".join(lines) + "\n")
    return path
