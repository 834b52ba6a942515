"""Import and export hold a weight or two of the model, not the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.families import hf_values

REPOSITORY = Path(__file__).resolve().parents[2]

# 62.9M parameters in fp32, 252 MB; the embedding is the largest of them with 16.8 MB.
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
MODEL_BYTES, LARGEST_BYTES = 251_717_632, 8192 * 512 * 4

WRITE = """
import json, sys
from pathlib import Path

import patches

patches.apply()
import torch

sys.path.insert(0, "scripts")
from random_model import write_random_model

for name, config in json.loads(sys.argv[2]).items():
    write_random_model(Path(sys.argv[1], name), config, dtype=torch.float32, max_file_bytes=100_000_000)
"""

# Converts a small model, for what Python and the libraries need, then the large one; prints by how many bytes the peak
# of resident memory has grown after each command. (getrusage would begin with the peak of the process that forked.)
CONVERT = """
import sys

from remit_megatron.cli import main

def convert(size):
    root = sys.argv[1]
    for words in (f"import --hf {root}/hf/{size} --output {root}/checkpoints/{size}",
                  f"export --checkpoint {root}/checkpoints/{size} --output {root}/back/{size}"):
        assert main(words.split()) == 0
        (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
        yield 1024 * int(line.split()[1])

*_, before = convert("small")
print(*(peak - before for peak in convert("large")))
"""


def python(program: str, *words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_few_weights(tmp_path):
    config = hf_values("llama-gqa_6_2_tied")
    # Three files of up to 100 MB: more than the limit, if one were collected before it is written.
    python(WRITE, tmp_path / "hf", json.dumps({"small": config, "large": config | SIZES}))
    written = sorted((tmp_path / "hf" / "large").glob("*.safetensors"))
    assert len(written) == 3
    size = sum(file.stat().st_size for file in written)
    assert 0 <= size - MODEL_BYTES < 100_000, "the figures above"

    limit = 3 * LARGEST_BYTES + (16 << 20)
    imported, exported = map(int, python(CONVERT, tmp_path).split())
    assert imported <= exported < limit < MODEL_BYTES / 3, f"grown by {imported}, then {exported}"

    with safe_open(tmp_path / "back" / "large" / "model.safetensors", framework="pt") as back:
        names = set(back.keys())
        for file in written:
            with safe_open(file, framework="pt") as original:
                for name in original.keys():  # noqa: SIM118 - not a dict
                    assert original.get_tensor(name).equal(back.get_tensor(name)), name
                    names.remove(name)
    assert not names
