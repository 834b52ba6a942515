"""Every command computes float32 products in float32, whatever the image says."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from remit_megatron import cli

PACKAGE = Path(cli.__file__).parent
# A command in place of the one that is asked for: it imports torch only now, as most do, and says what it finds. So
# does a process that it starts.
PROBE = """
import json, os, subprocess, sys
{before}
from remit_megatron import cli

FLAGS = "import torch; print(torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())"

def probe(namespace):
    import torch
    child = subprocess.run([sys.executable, "-c", FLAGS], capture_output=True, text=True, check=True)
    found = [str(torch.backends.cuda.matmul.allow_tf32), torch.get_float32_matmul_precision()]
    print(json.dumps([found, child.stdout.split()]))
    return 0

cli._parse = lambda argv: (None, "analysis", "run_kl")
cli._command = lambda room, name: probe
sys.exit(cli.main(["analyze", "kl"]))
"""
# `remit analyze heatmap`, up to the model's own start: no files are asked for.
TEXT_MODEL = """
import torch, transformers
from pathlib import Path
from types import SimpleNamespace
from remit_megatron.analysis import models

def refuse(*args, **kwargs):
    print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    raise OSError("no files")

transformers.AutoModelForCausalLM.from_pretrained = refuse
models.name_of = lambda source: "x"
try:
    models.TextModel(SimpleNamespace(path=Path("x")), field="--student")
except models.UserError:
    pass
"""


def run_in_nvidias_image(code: str) -> str:
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_image_is_heard_without_it():
    assert run_in_nvidias_image("import torch; print(torch.backends.cuda.matmul.allow_tf32)").split() == ["True"]


@pytest.mark.parametrize("before", ["", "import torch"], ids=["torch comes with the work", "torch is there"])
def test_every_command_starts_without_tf32(before):
    """All commands go through `main`; the processes that they start inherit it."""
    own, child = json.loads(run_in_nvidias_image(PROBE.format(before=before)).splitlines()[-1])
    assert own == child == ["False", "highest"]


def test_a_model_of_transformers_is_loaded_without_tf32():
    """Also where Python is the caller, and for convolutions, which are TF32 by torch's own choice."""
    assert run_in_nvidias_image(TEXT_MODEL).split() == ["False", "False"]


LOADERS = ("ForCausalLM.from_pretrained", ".create_from_arg_obj", "TRAINERS[stage]")


def test_whoever_loads_a_model_of_transformers_says_so():
    """In the file that loads it, so that convolutions are exact, too; the toy's models have none, and those that only
    names and shapes are looked at of compute nothing."""
    loads, silent = set(), set()
    for path in PACKAGE.rglob("*.py"):
        called = {
            ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        }
        if any(name.endswith(LOADERS) for name in called):
            loads.add(str(path.relative_to(PACKAGE)))
            silent |= {str(path.relative_to(PACKAGE))} - {name for name in loads if "exact_float32" in called}
    assert silent == {"flywheel/toy_evaluation.py", "runtime/whole_model.py"}
    assert loads == silent | {"analysis/models.py", "evaluation/lm.py", "posttrain/trl_engine.py"}
