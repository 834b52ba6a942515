"""Time and memory of ``remit import`` and ``remit export`` beside a plain copy of the same files.

    python scripts/bench_convert.py --model olmo2_1b --dtype fp32 --record docs/benchmarks

Writes a random model of true sizes, imports it, exports it, compares the exported weights with the first ones bit for
bit, and removes everything; it needs four times the model's size on disk (TMPDIR says where). Each command runs as a
user would run it, start included, on files that were dropped from the page cache before; so does the copy, which is
written through to the disk at the end, as the commands do. Memory: the highest VmHWM and RssAnon of /proc/PID/status
(all resident pages, and those that are not of a file), looked at every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarking import heading, record, versions

DTYPES = ("bf16", "fp32")
# Both commands do their own share of work, and a start, on a model of no size.
EMPTY = {"num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}


@dataclass(frozen=True)
class Measured:
    """One command: wall time, processor time of user and system, and its highest resident memory."""

    seconds: float
    cpu_seconds: float
    resident_bytes: int
    anonymous_bytes: int


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name in configs/models, or a file like those")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--no-empty", action="store_true", help="leave out the two commands on an empty model")
    parser.add_argument("--note", default="", help="a sentence for the record, as on what else the machine did")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a dated record there")
    return parser.parse_args()


def write_models(folder: Path, hf_config: dict[str, Any], dtype: str) -> None:
    """The model, and an empty one, as Hugging Face directories."""
    import patches

    patches.apply()
    import torch
    from random_model import write_random_model

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    write_random_model(folder / "hf", hf_config, dtype=kind)
    write_random_model(folder / "empty_hf", hf_config | EMPTY, dtype=kind)


def forget(folder: Path) -> int:
    """Writes the files of a folder to the disk and drops them from the page cache; returns their size."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            total += path.stat().st_size
    return total


def processor_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(command: Sequence[str | Path]) -> Measured:
    """Runs a command to its end and watches its memory."""
    started, used = time.monotonic(), processor_seconds()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = {"VmHWM": 0, "RssAnon": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # it has just ended
            continue
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], 1024 * int(value.split()[0]))
        time.sleep(0.02)
    seconds = time.monotonic() - started
    assert process.stderr is not None
    if process.returncode:
        raise SystemExit(process.stderr.read().decode())
    return Measured(seconds, processor_seconds() - used, peak["VmHWM"], peak["RssAnon"])


def same_weights(first: Path, second: Path) -> bool:
    """Whether two Hugging Face directories hold the same tensors bit for bit."""
    from remit_megatron.conversion.tensor_files import TensorFiles

    left, right = TensorFiles(first), TensorFiles(second)
    return left.names() == right.names() and all(
        left[name].dtype == right[name].dtype and left[name][:].equal(right[name][:]) for name in left.names()
    )


def run(folder: Path, hf_config: dict[str, Any], dtype: str, *, empty: bool) -> tuple[int, dict[str, Measured]]:
    """All measurements, with the bytes of the model's weights."""
    child = multiprocessing.get_context("spawn").Process(target=write_models, args=(folder, hf_config, dtype))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"writing the model ended with {child.exitcode}")
    remit = [sys.executable, "-m", "remit_megatron"]
    found: dict[str, Measured] = {}

    def convert(name: str, prefix: str, command: str, option: str, source: str, target: str) -> None:
        forget(folder / (prefix + source))
        words = [command, option, folder / (prefix + source), "--output", folder / (prefix + target)]
        found[name] = measure([*remit, *words])

    def copy(name: str) -> None:
        forget(folder / "hf")
        program = 'cp -r --reflink=never "$0" "$1" && find "$1" -type f -exec sync {} +'
        found[name] = measure(["sh", "-c", program, folder / "hf", folder / "copy"])
        shutil.rmtree(folder / "copy")

    size = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    for prefix, note in ((("empty_", ", empty model"),) if empty else ()) + (("", ""),):
        if not prefix:
            copy("cp, before")
        convert(f"import{note}", prefix, "import", "--hf", "hf", "checkpoint")
        convert(f"export{note}", prefix, "export", "--checkpoint", "checkpoint", "back")
    copy("cp, after")
    if not same_weights(folder / "hf", folder / "back"):
        raise SystemExit("the exported weights are not the imported ones")
    return size, found


def report(args: argparse.Namespace, size: int, found: dict[str, Measured]) -> str:
    """The record's section."""
    lines = [
        heading(f"import and export of {args.model} in {args.dtype}"),
        f"Random weights of true sizes, {size / 1e9:.2f} GB; the export holds the same bits. "
        f"{versions('megatron-core', 'safetensors')}. {args.note}".rstrip()
        + "\n",
        "| command | s | processor s | MB/s of weights | peak resident MB (VmHWM) | of it anonymous MB (RssAnon) |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        rate = "" if "empty" in name else f"{size / one.seconds / 1e6:.0f}"
        memory = " | " if name.startswith("cp") else f"{one.resident_bytes / 1e6:.0f} | {one.anonymous_bytes / 1e6:.0f}"
        lines.append(f"| {name} | {one.seconds:.1f} | {one.cpu_seconds:.1f} | {rate} | {memory} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse()
    from remit_megatron.run.configuration import load_model_description

    hf_config = load_model_description(args.model)
    with tempfile.TemporaryDirectory(prefix="bench_convert_") as folder:
        size, found = run(Path(folder), hf_config, args.dtype, empty=not args.no_empty)
    text = report(args, size, found)
    sys.stdout.write(text)
    if args.record:
        raw = {
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "model": hf_config,
            "weight_bytes": size,
            "measured": {name: asdict(one) for name, one in found.items()},
        }
        path = record(args.record, "convert", title="Import and export", text=text, raw=raw)
        sys.stderr.write(json.dumps(str(path)) + "\n")


if __name__ == "__main__":
    main()
