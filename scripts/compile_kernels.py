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


def compile_kernel(name: str, *, dtype: str, columns: int, width: int, block: int | None = None) -> Compiled:
    """Compiles one kernel of :func:`kernels` as a launch over ``width`` columns would have it.

    Args:
        name: of the kernel.
        dtype: ``bf16``, ``fp16`` or ``fp32``, of the logits.
        columns: those that count; ``width`` has the padding too.
        block: columns of a block; default: what the code takes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from remit_megatron.kernels.token_loss_triton import warps

    function, types, own_block = kernels()[name]
    block = block or own_block
    names = function.arg_names
    constants = {"BLOCK": block, "TEMPERED": True}
    numbers = {"start": 0, "columns": columns, "width": width, "tokens": TOKENS, "stride": TOKENS}
    signature, aligned = {}, []
    for index, argument in enumerate(names):
        kind = types.get(argument, "constexpr")
        signature[argument] = f"*{dtype}" if kind == "x" else kind
        if kind == "x" or kind.startswith("*") or numbers.get(argument, 1) % 16 == 0:
            aligned.append((index,))
    source = ASTSource(
        function,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in constants.items() if key in names},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    target = GPUTarget("cuda", CAPABILITY, 32)
    result: Any = triton.compile(source, target=target, options={"num_warps": warps(block)})
    usage = _usage(result.asm["cubin"])
    ptx = result.asm["ptx"]
    return Compiled(
        name,
        dtype,
        block,
        32 * warps(block),
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
    head = "kernel | vocabulary | width | dtype | block | registers | spilled bytes | programs a multiprocessor"
    lines = [f"| {head} | loads | stores |", "|" + "---|" * 10]
    for name in kernels():
        for vocabulary, (columns, width) in VOCABULARIES.items():
            for dtype in ("bf16", "fp32"):
                for block in blocks or (None,):
                    one = compile_kernel(name, dtype=dtype, columns=columns, width=width, block=block)
                    loads, stores = (
                        ", ".join(f"{count} x {bits}" for bits, count in sorted(counts.items(), reverse=True))
                        for counts in (one.loads, one.stores)
                    )
                    found = (one.block, one.registers, one.stack + one.local, one.programs(), loads, stores)
                    lines.append(f"| {name} | {vocabulary} | {width} | {dtype} | {' | '.join(map(str, found))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=int, action="append", default=[], help="columns of a block (several: repeat)")
    arguments = parser.parse_args()
    # Compiled for nobody to launch: kept out of the cache of the machine's own kernels.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        sys.stdout.write(table(blocks=tuple(arguments.block)) + "\n")


if __name__ == "__main__":
    main()
