"""Makes divergence.json: the Kullback-Leibler divergence of a few made-up logits by the code of three other projects.

Run once, outside of this repository's environment or in it: unpacked wheels of TRL and ModelOpt, a checkout of
DistillKit.

    python -m tests.golden.make_divergence --trl DIR --modelopt DIR --distillkit DIR > tests/golden/divergence.json
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

TEMPERATURES = (1.0, 2.0, 0.5)
TOKENS, VOCABULARY = (2, 3), 11


def logits(seed: int) -> torch.Tensor:
    draw = random.Random(seed)
    values = [round(draw.gauss(0.0, 3.0), 3) for _ in range(TOKENS[0] * TOKENS[1] * VOCABULARY)]
    return torch.tensor(values).reshape(*TOKENS, VOCABULARY)


def version(folder: Path, name: str) -> str:
    (metadata,) = folder.glob(f"{name}-*.dist-info/METADATA")
    return next(line.split(": ")[1] for line in metadata.read_text().splitlines() if line.startswith("Version: "))


def trl(folder: Path, student: torch.Tensor, teacher: torch.Tensor) -> dict[str, Any]:
    """Its trainer's static method alone: the module imports much that has nothing to do with it."""
    file = folder / "trl/experimental/gkd/gkd_trainer.py"
    tree = ast.parse(file.read_text())
    (method,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "generalized_jsd_loss"
    ]
    method.decorator_list = []
    space: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(ast.Module([method], []), str(file), "exec"), space)
    sums = {}
    for temperature in TEMPERATURES:
        sums[str(temperature)] = space["generalized_jsd_loss"](
            student, teacher, beta=0, temperature=temperature, num_items_in_batch=1
        ).item()
    source = f"trl {version(folder, 'trl')}, GKDTrainer.generalized_jsd_loss, beta 0, num_items_in_batch 1"
    return {"source": source, "what": "sum over tokens, not times the squared temperature", "values": sums}


def modelopt(folder: Path, student: torch.Tensor, teacher: torch.Tensor) -> dict[str, Any]:
    specification = importlib.util.spec_from_file_location("losses", folder / "modelopt/torch/distill/losses.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    values = {
        str(temperature): module.LogitsDistillationLoss(temperature, "none")(student, teacher).tolist()
        for temperature in TEMPERATURES
    }
    source = f"nvidia-modelopt {version(folder, 'nvidia_modelopt')}, LogitsDistillationLoss, reduction none"
    return {"source": source, "what": "each token, times the squared temperature", "values": values}


def distillkit(folder: Path, student: torch.Tensor, teacher: torch.Tensor) -> dict[str, Any]:
    sys.path.insert(0, str(folder))
    from distillkit.lossfuncs.kl import KLDLoss  # pyright: ignore[reportMissingImports]
    from distillkit.signals import DenseSignal  # pyright: ignore[reportMissingImports]
    from transformers.modeling_outputs import CausalLMOutput

    signal = DenseSignal(logits=teacher, generation_temperature=1.0, hidden_states=None, vocab_size=VOCABULARY)
    values = {
        str(temperature): KLDLoss(temperature)(CausalLMOutput(logits=student), signal).item()
        for temperature in TEMPERATURES
    }
    commit = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    source = f"arcee-ai/DistillKit {commit.stdout.strip()}, KLDLoss of a DenseSignal"
    return {"source": source, "what": "mean over tokens, times the squared temperature", "values": values}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for peer in ("trl", "modelopt", "distillkit"):
        parser.add_argument(f"--{peer}", type=Path, required=True)
    options = parser.parse_args()
    ours, theirs = logits(1), logits(2)
    content = {
        "made_by": "python -m tests.golden.make_divergence --trl DIR --modelopt DIR --distillkit DIR",
        "torch": torch.__version__,
        "student": ours.tolist(),
        "teacher": theirs.tolist(),
        "peers": {
            "trl": trl(options.trl, ours, theirs),
            "modelopt": modelopt(options.modelopt, ours, theirs),
            "distillkit": distillkit(options.distillkit, ours, theirs),
        },
    }
    print(json.dumps(content, indent=1))
