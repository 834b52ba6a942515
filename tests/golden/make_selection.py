"""Makes selection.json: which samples MiniPLM's own script keeps of made-up scores.

Runs `scripts/miniplm/difference_sampling/construct_pretrain_data.py` of a checkout, unchanged, over a corpus in its own
format in which sample i is the tokens [i, i + 1]. Packages that it imports and that this needs nothing of (deepspeed,
peft) may be missing: empty modules stand in.

    python -m tests.golden.make_selection --miniplm DIR > tests/golden/selection.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tests.tiny import make_tokenizer

SAMPLES = 41
STEPS = {"distinct": 1 / 65536, "tied": 1 / 8}
RATIOS = ("0.8", "0.5", "0.1", "1.0")


def scores(step: float) -> tuple[list[float], list[float]]:
    """Losses of a small and a large model in multiples of ``step``: at 1/8 many differences are equal."""
    draw = random.Random(7)

    def losses(lowest: float, highest: float) -> list[float]:
        return [draw.randint(round(lowest / step), round(highest / step)) * step for _ in range(SAMPLES)]

    return losses(1, 3), losses(0.5, 2)


def kept(checkout: Path, base: Path, ratio: str) -> list[int]:
    """Numbers of the samples that the script writes, in its order."""
    from data_utils import DistributedMMapIndexedDataset  # pyright: ignore[reportMissingImports]

    sys.argv = ["construct_pretrain_data.py", f"{base}{os.sep}", ratio]
    script = checkout / "scripts/miniplm/difference_sampling/construct_pretrain_data.py"
    runpy.run_path(str(script), run_name="__main__")
    name = f"processed_data/pretrain/pile-diff_samp-qwen_1.8B-qwen_104M-r{float(ratio)}/qwen-1025"
    dataset = DistributedMMapIndexedDataset(str(base / name), "data")
    return [int(dataset[index][0]) for index in range(len(dataset))]


def select(checkout: Path, small: list[float], large: list[float]) -> dict[str, Any]:
    """What the script keeps at each ratio, beside the losses."""
    from data_utils import ChunkedDatasetBuilder  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_tokenizer(base / "checkpoints/qwen/200M")
        data, results = base / "processed_data/pretrain/pile/qwen-1025", base / "results/lm_infer/pile"
        difference = results / "diff-qwen_1.8B-qwen_104M"
        for directory in (data, difference):
            directory.mkdir(parents=True)
        builder = ChunkedDatasetBuilder(f"{base}{os.sep}", str(data), np.uint16)
        for sample in range(SAMPLES):
            builder.add_np_item(np.array([sample, sample + 1], dtype=np.uint16))
        builder.finalize()
        torch.save(torch.tensor(small) - torch.tensor(large), difference / "diff_scores.pt")
        chosen = {ratio: kept(checkout, base, ratio) for ratio in RATIOS}
    return {"reference": small, "teacher": large, "kept": chosen}


def main(checkout: Path) -> dict[str, Any]:
    for name, attributes in (("deepspeed", ()), ("peft", ("LoraConfig", "get_peft_model", "AutoPeftModelForCausalLM"))):
        module = sys.modules.setdefault(name, ModuleType(name))
        module.__spec__ = module.__spec__ or ModuleSpec(name, None)
        for attribute in attributes:
            setattr(module, attribute, None)
    sys.path.insert(0, str(checkout))
    selected = {name: select(checkout, *scores(step)) for name, step in STEPS.items()}
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    return {
        "made_by": "python -m tests.golden.make_selection --miniplm DIR",
        "source": f"thu-coai/MiniPLM {commit.stdout.strip()}, difference_sampling/construct_pretrain_data.py",
        "torch": torch.__version__,
        "scores": selected,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--miniplm", type=Path, required=True)
    with contextlib.redirect_stdout(sys.stderr):  # what their code prints
        content = main(parser.parse_args().miniplm)
    print(json.dumps(content, indent=1))
