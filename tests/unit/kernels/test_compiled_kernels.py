"""Every Triton kernel, compiled for an H100 on whatever machine: nothing spilled, and 16 bytes at a time."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY / "scripts"))
compile_kernels = pytest.importorskip("compile_kernels")
sys.path.remove(str(REPOSITORY / "scripts"))

# Kernel -> registers of a thread at most, programs on a multiprocessor at least.
LIMITS = {"statistics": (104, 2), "gradient": (40, 6), "divergence": (88, 2), "divergence gradient": (40, 6)}
CASES = [
    (name, vocabulary, dtype)
    for name in LIMITS
    for vocabulary in compile_kernels.VOCABULARIES
    for dtype in ("bf16", "fp32")
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("name", "vocabulary", "dtype"), CASES)
def test_nothing_is_spilled_and_loads_are_wide(name, vocabulary, dtype):
    columns, width = compile_kernels.VOCABULARIES[vocabulary]
    found = compile_kernels.compile_kernel(name, dtype=dtype, columns=columns, width=width)
    registers, programs = LIMITS[name]
    assert (found.stack, found.local) == (0, 0)
    assert found.registers <= registers and found.programs() >= programs
    # A thread's logits of a block, of both models for the divergence, in loads of 16 bytes and no others.
    models = 2 if name.startswith("divergence") else 1
    bits = {"bf16": 16, "fp32": 32}[dtype]
    assert found.loads.get(128, 0) == models * found.block // found.threads * bits // 128
    assert not any(width in found.loads for width in (16, 32) if width != bits and not name.endswith("gradient"))
    if name.endswith("gradient"):  # one set of stores for rows that count, one of zeros for those that do not
        assert found.stores == {128: 2 * found.block // found.threads * bits // 128}


def test_a_width_that_16_does_not_divide_is_seen():
    """The check can fail: rows of GPT-2's vocabulary do not begin on 16 bytes."""
    found = compile_kernels.compile_kernel("gradient", dtype="bf16", columns=50257, width=50257)
    assert 128 not in found.loads and 128 not in found.stores


def test_every_kernel_of_the_package_is_compiled():
    compiled = {function.fn.__name__ for function, _, _ in compile_kernels.kernels().values()}
    written = set()
    for file in (REPOSITORY / "remit_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                written.add(node.name)
    assert written == compiled
