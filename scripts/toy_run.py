"""What a bench of whole runs trains on: a tokenizer of bytes, random documents as token files, a small random model."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VOCABULARY = 258  # bytes, end of document, unknown


def make_tokenizer(directory: Path) -> Path:
    """A tokenizer of single bytes, with an end-of-document token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, "<|unknown|>": 1} | {letter: 2 + number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def make_corpus(folder: Path, tokenizer: Path, *, tokens: int) -> Path:
    """Random documents of about so many tokens; returns the prefix of their token files."""
    from remit_megatron.data.build import build_dataset

    draw, written, lines = random.Random(0), 0, []
    while written < tokens:
        text = "".join(draw.choices("abcdefgh ", k=draw.randint(1, 600)))
        lines.append(json.dumps({"text": text}))
        written += len(text) + 1
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    build_dataset([folder / "corpus.jsonl"], tokenizer, folder / "corpus")
    return folder / "corpus"


def model_values(*, hidden: int, layers: int, sequence: int) -> dict[str, Any]:
    """Content of the config.json of a Llama."""
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": hidden // 4,
        "hidden_act": "silu",
        "max_position_embeddings": sequence,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
