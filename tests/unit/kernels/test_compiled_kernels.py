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
# Norms of queries and keys: those of the paper's model on one rank and on two, and of the largest rows.
NORM_LIMITS = {
    "square sums": (32, 12),
    "scaling": (40, 10),
    "scaling, one rank": (40, 10),
    "inner products": (88, 5),
    "inner products, one rank": (112, 4),
    "input gradient": (48, 10),
}
NORM_CASES = [
    (name, model, dtype)
    for name in NORM_LIMITS
    for model in ("OLMo 2 1B", "OLMo 2 13B")
    for dtype in ("bf16", "fp32")
]  # fmt: skip


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


@pytest.mark.parametrize(("name", "model", "dtype"), NORM_CASES)
def test_norms_of_queries_and_keys_spill_nothing_and_are_read_where_they_lie(name, model, dtype):
    found = compile_kernels.compile_norm(name, dtype=dtype, heads=compile_kernels.NORMS[model])
    registers, programs = NORM_LIMITS[name]
    assert (found.stack, found.local) == (0, 0)
    if model == "OLMo 2 1B":  # wider rows have more threads, and fewer programs
        assert found.registers <= registers and found.programs() >= programs
    # 16 channels a thread of each row, of queries and of keys, though both are views of every third head.
    once = 2 * 16 * {"bf16": 16, "fp32": 32}[dtype] // 128
    vectors = {"square sums": 1, "scaling": 2, "scaling, one rank": 2}.get(name, 3)  # x, weight, incoming
    written = {"square sums": 0, "inner products": 0}.get(name, 1)
    # Sums of float32, which the compiler stores behind the branch, for queries and keys alike.
    partials = 16 * 32 // 128 if name.startswith("inner") else 0
    assert found.loads[128] == vectors * once
    assert found.stores.get(128, 0) == written * once + partials
    # All else is one number of a row.
    assert set(found.loads) <= {128, 32} and found.loads.get(32, 0) <= 4
    assert set(found.stores) <= {128, 32} and found.stores.get(32, 0) <= 2


def test_a_width_that_16_does_not_divide_is_seen():
    """The check can fail: rows of GPT-2's vocabulary do not begin on 16 bytes."""
    found = compile_kernels.compile_kernel("gradient", dtype="bf16", columns=50257, width=50257)
    assert 128 not in found.loads and 128 not in found.stores


def test_every_kernel_of_the_package_is_compiled():
    """Functions that kernels call are part of them."""
    found = [
        function for function, *_ in (*compile_kernels.kernels().values(), *compile_kernels.norm_kernels().values())
    ]
    compiled = {function.fn.__name__ for function in found}
    written, called = set(), set()
    for file in (REPOSITORY / "remit_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                written.add(node.name)
                called |= {
                    call.func.id
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
    assert written - called == compiled
