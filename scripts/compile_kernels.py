#!/usr/bin/env python
"""What the compiler makes of every Triton kernel for an H100, without one: python scripts/compile_kernels.py

Triton compiles for a target that is not there (compute capability 9.0), with the ptxas that it brings. The kernels are
specialized as a launch would specialize them: pointers on 16 bytes, and whole numbers by whether 16 divides them.
Prints one line for each kernel, width and dtype: registers of a thread, bytes of its stack and of local memory (where
registers are spilled), blocks of threads that fit on one multiprocessor, and the widest loads and stores.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# The name of a family's vocabulary -> (its size, the width of a shard without tensor parallelism: padded to 64).
VOCABULARIES = {"OLMo 2": (100278, 100288), "OLMo 2 padded": (100352, 100352), "SmolLM3, Youtu-LLM": (128256, 128256)}
TOKENS = 8192
# Where the norms of queries and keys run -> heads of queries and of keys on a rank, and the channels of a head.
NORMS = {
    "OLMo 2 1B, two ranks": (8, 8, 128),
    "OLMo 2 1B": (16, 16, 128),
    "OLMo 2 7B": (32, 32, 128),
    "OLMo 2 13B": (40, 40, 128),
    "OLMo 2 32B": (40, 8, 128),
}
CAPABILITY = 90
# Of one multiprocessor of that capability (CUDA C++ Programming Guide, table of compute capabilities).
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 233472


@dataclass(frozen=True)
class Compiled:
    """One kernel as ptxas leaves it.

    Attributes:
        kernel, dtype, block, threads: what was compiled; threads of one program.
        registers: of a thread. stack, local: bytes of a thread; more than 0 means that registers were spilled.
        shared: bytes of a program.
        loads, stores: instructions of global memory by the bits of one thread, of the logits' loop and all else.
    """

    kernel: str
    dtype: str
    block: int
    threads: int
    registers: int
    stack: int
    local: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]

    def programs(self) -> int:
        """Programs that fit on one multiprocessor; registers are given out by 8 a thread."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * self.threads)
        by_shared = SHARED // (self.shared + 1024)  # one KiB of each is the system's
        return min(by_registers, by_shared, THREADS // self.threads, BLOCKS)


def kernels() -> dict[str, tuple[Any, dict[str, str], int]]:
    """Every Triton kernel: function, Triton's types of its arguments ("x" is the logits'), columns of a block."""
    from remit_megatron.kernels import kl_divergence_triton as kl
    from remit_megatron.kernels import token_loss_triton as loss

    common = {"labels": "*i64", "counted": "*u8", "start": "i32", "columns": "i32", "width": "i32"}
    divergence = common | {"x_logits": "x", "y_logits": "x", "stride": "i32", "inverse_c": "fp32"}
    rows = {"maximum": "*fp32", "row_scale": "*fp32", "label_gradient": "*fp32"}
    return {
        "statistics": (
            loss._statistics_kernel,
            common | {"logits": "x", "out": "*fp32", "tokens": "i32"},
            loss._FORWARD_BLOCK,
        ),
        "gradient": (loss._gradient_kernel, common | rows | {"logits": "x", "out": "x"}, loss._BACKWARD_BLOCK),
        "divergence": (kl._divergence_kernel, divergence | {"out": "*fp32"}, kl._FORWARD_BLOCK),
        "divergence gradient": (
            kl._divergence_gradient_kernel,
            divergence | {"out": "x", "rows": "*fp32"},
            kl._BACKWARD_BLOCK,
        ),
    }


def norm_kernels() -> dict[str, tuple[Any, dict[str, bool]]]:
    """The Triton kernels of the norms of queries and keys: function and its own settings. On one rank the scaling also
    sums the squares, and the inner products also write the gradient."""
    from remit_megatron.kernels import rms_norm_triton as norm

    return {
        "square sums": (norm._norm_squares_kernel, {}),
        "scaling": (norm._norm_scale_kernel, {"WHOLE": False}),
        "scaling, one rank": (norm._norm_scale_kernel, {"WHOLE": True}),
        "inner products": (norm._norm_products_kernel, {"WHOLE": False}),
        "inner products, one rank": (norm._norm_products_kernel, {"WHOLE": True}),
        "input gradient": (norm._norm_backward_kernel, {}),
    }


def compile_kernel(name: str, *, dtype: str, columns: int, width: int, block: int | None = None) -> Compiled:
    """Compiles one kernel of :func:`kernels` as a launch over ``width`` columns would have it.

    Args:
        name: of the kernel.
        dtype: ``bf16``, ``fp16`` or ``fp32``, of the logits.
        columns: those that count; ``width`` has the padding too.
        block: columns of a block; default: what the code takes.
    """
    from remit_megatron.kernels.token_loss_triton import warps

    function, types, own_block = kernels()[name]
    block = block or own_block
    numbers = {"start": 0, "columns": columns, "width": width, "tokens": TOKENS, "stride": TOKENS}
    types = {argument: f"*{dtype}" if kind == "x" else kind for argument, kind in types.items()}
    constants = {"BLOCK": block, "TEMPERED": True}
    return _compiled(name, function, types, constants, numbers, dtype=dtype, block=block, warps=warps(block))


def compile_norm(name: str, *, dtype: str, heads: tuple[int, int, int]) -> Compiled:
    """Compiles one kernel of :func:`norm_kernels` as a launch over queries and keys would have it.

    Args:
        name: of the kernel.
        dtype: ``bf16``, ``fp16`` or ``fp32``, of vectors and weights.
        heads: of queries and of keys on this rank, and channels of a head, as in ``NORMS``.
    """
    import torch

    from remit_megatron.kernels import rms_norm_triton as norm

    function, constants = norm_kernels()[name]
    queries, keys, channels = heads
    # As Megatron has them: views of one product, of which queries are copied where several share a key.
    product = torch.empty(2, keys, queries // keys + 2, channels, device="meta")
    layout = norm._layout([product[:, :, :-2].reshape(2, queries, channels), product[:, :, -2]])
    if queries > keys:
        layout = norm._layout([torch.empty(2, count, channels, device="meta") for count in (queries, keys)])
    used, types = layout.pop("num_warps"), {}
    for argument in function.arg_names:
        if argument.startswith(("size", "eps")):
            types[argument] = "fp32"
        elif argument in ("squares", "inner", "partials"):
            types[argument] = "*fp32"
        elif argument.startswith(("stride", "head_stride", "width", "tokens", "rows")):
            types[argument] = "i32"
        elif not argument.isupper():
            types[argument] = f"*{dtype}"
    numbers = {"tokens": TOKENS, "rows": norm._LEAST_ROWS} | {key: n for key, n in layout.items() if key in types}
    constants = constants | {key: n for key, n in layout.items() if key not in types}
    block = max(layout["BLOCK0"], layout["BLOCK1"])
    return _compiled(name, function, types, constants, numbers, dtype=dtype, block=block, warps=used)


def _compiled(
    name: str,
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    numbers: dict[str, int],
    *,
    dtype: str,
    block: int,
    warps: int,
) -> Compiled:
    """One kernel from Triton's types of its arguments, the values of its constants, and of the whole numbers that a
    launch specializes it by."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature, aligned = {}, []
    for index, argument in enumerate(names):
        kind = types.get(argument, "constexpr")
        signature[argument] = kind
        if kind.startswith("*") or (kind.startswith("i") and numbers[argument] % 16 == 0):
            aligned.append((index,))
    source = ASTSource(
        function,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in constants.items() if key in names},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    target = GPUTarget("cuda", CAPABILITY, 32)
    result: Any = triton.compile(source, target=target, options={"num_warps": warps})
    usage = _usage(result.asm["cubin"])
    ptx = result.asm["ptx"]
    return Compiled(
        name,
        dtype,
        block,
        32 * warps,
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        usage["SHARED"],
        _widths(ptx, "ld.global"),
        _widths(ptx, "st.global"),
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """What a thread and a program use, by the words of cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _widths(ptx: str, instruction: str) -> dict[int, int]:
    """How many instructions of a kind there are, by the bits that each moves for a thread."""
    found: dict[int, int] = {}
    for vector, bits in re.findall(re.escape(instruction) + r"[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx):
        width = int(vector or 1) * int(bits)
        found[width] = found.get(width, 0) + 1
    return found


def table(*, blocks: tuple[int, ...] = ()) -> str:
    """A Markdown table of every kernel, vocabulary and dtype; with ``blocks``, of these sizes instead of the code's."""
    lines = _head("kernel | vocabulary | width | dtype | block")
    for name in kernels():
        for vocabulary, (columns, width) in VOCABULARIES.items():
            for dtype in ("bf16", "fp32"):
                for block in blocks or (None,):
                    one = compile_kernel(name, dtype=dtype, columns=columns, width=width, block=block)
                    lines.append(_line(f"{name} | {vocabulary} | {width} | {dtype} | {one.block}", one))
    return "\n".join(lines)


def norm_table() -> str:
    """A Markdown table of the norms of queries and keys: every kernel, model and dtype."""
    lines = _head("kernel | queries and keys of | widths | dtype | threads")
    for name in norm_kernels():
        for model, heads in NORMS.items():
            for dtype in ("bf16", "fp32"):
                one = compile_norm(name, dtype=dtype, heads=heads)
                widths = ", ".join(str(count * heads[2]) for count in heads[:2])
                lines.append(_line(f"{name} | {model} | {widths} | {dtype} | {one.threads}", one))
    return "\n".join(lines)


def _head(columns: str) -> list[str]:
    columns = f"{columns} | registers | spilled bytes | programs a multiprocessor | loads | stores"
    return [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]


def _line(begin: str, one: Compiled) -> str:
    counts = (
        ", ".join(f"{count} x {bits}" for bits, count in sorted(counts.items(), reverse=True))
        for counts in (one.loads, one.stores)
    )
    found = (one.registers, one.stack + one.local, one.programs(), *counts)
    return f"| {begin} | {' | '.join(map(str, found))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=int, action="append", default=[], help="columns of a block (several: repeat)")
    parser.add_argument("--norms", action="store_true", help="the norms of queries and keys in place of the losses")
    arguments = parser.parse_args()
    # Compiled for nobody to launch: kept out of the cache of the machine's own kernels.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        found = norm_table() if arguments.norms else table(blocks=tuple(arguments.block))
        sys.stdout.write(found + "\n")


if __name__ == "__main__":
    main()
