"""Writes a model, a reference, token files and the configuration of a run of two steps: small_run.py FOLDER

For ``scripts/test_image.sh``, which runs it inside the image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from remit_megatron.data.build import build_dataset
from tests.tiny import make_llama, make_tokenizer, write_documents


def main(folder: Path) -> None:
    tokenizer = make_tokenizer(folder / "tokenizer")
    documents = write_documents(folder / "documents.jsonl", count=100, seed=3)
    build_dataset([str(documents)], tokenizer=str(tokenizer), output=str(folder / "corpus"))
    config = {
        "init": str(make_llama(folder / "student", seed=1, tokenizer=tokenizer)),
        "objective": {"name": "remit"},
        "reference": {"checkpoint": str(make_llama(folder / "reference", seed=2, tokenizer=tokenizer))},
        "data": {"train": [[1.0, str(folder / "corpus")]], "tokenizer": str(tokenizer), "document_mask": True},
        "megatron": {
            "tensor_model_parallel_size": 2,
            "make_vocab_size_divisible_by": 4,
            "seq_length": 64,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 2,
            "lr": 1e-3,
        },
        "run_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML


if __name__ == "__main__":
    main(Path(sys.argv[1]))
