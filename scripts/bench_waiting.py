#!/usr/bin/env python
"""How OpenMP's threads should wait on a CPU that others use too: a training step where they spin, and where they sleep.

    python scripts/bench_waiting.py [--busy N] [--record docs/benchmarks]

Each arm is a process of its own, as the setting is read when torch is imported: bench_step.py's plain step, whose
median counts, started again in every round; the order of the arms rotates. --busy starts as many processes that do
nothing but count. The load of the machine stands in the record, as all of this is about what else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarking import heading, interleave, median_ratio, quantile, record, versions

SCRIPTS = Path(__file__).resolve().parent
ARMS: dict[str, dict[str, str]] = {
    "as the library does": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=7, help="steps of each process, of which the median counts")
    parser.add_argument("--busy", type=int, default=0, help="processes beside it that only count")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a dated record there")
    return parser.parse_args()


def seconds_of(arm: str, args: argparse.Namespace) -> float:
    """Median seconds of a step in a process with the arm's setting."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment |= ARMS[arm] | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    size = [
        "--hidden",
        args.hidden,
        "--layers",
        args.layers,
        "--sequence",
        256,
        "--vocabulary",
        4096,
        "--micro-batch",
        1,
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, SCRIPTS / "bench_step.py", "--arms", "ntp", "--rounds", args.steps, *size]
        words = [*map(str, command), "--record", folder]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"bench_step.py: exit code {done.returncode}: {done.stderr[-500:]}")
        (path,) = Path(folder).glob("step-*.json")
        return statistics.median(json.loads(path.read_text())["seconds"]["ntp"])


def main() -> int:
    args = parse()
    before = os.getloadavg()[0]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        seconds = interleave(list(ARMS), args.rounds, lambda arm: seconds_of(arm, args), label="waiting")
    finally:
        for process in busy:
            process.kill()
    first = next(iter(ARMS))
    cores = len(os.sched_getaffinity(0))
    lines = [
        heading("how threads wait"),
        f"{versions('megatron-core')}. {cores} cores, load of the last minute {before:.1f} at the start and "
        f"{os.getloadavg()[0]:.1f} at the end, {args.busy} processes of this script's own among it. {args.rounds} "
        f"rounds after one warm-up round, each of processes of {args.steps} steps. Arms take {cores} threads: hidden "
        f"size {args.hidden}, {args.layers} layers, 256 tokens.",
        "",
        "| arm | median s of a step | p20 | p80 | ratio (median over rounds) |",
        "|---|---|---|---|---|",
    ]
    for arm, values in seconds.items():
        figures = " | ".join(
            f"{one:.3f}" for one in (statistics.median(values), quantile(values, 0.2), quantile(values, 0.8))
        )
        lines.append(f"| {arm} | {figures} | {median_ratio(values, seconds[first]):.3f} |")
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if args.record:
        record(args.record, "waiting", title="How threads wait for each other", text=text, raw={"seconds": seconds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
