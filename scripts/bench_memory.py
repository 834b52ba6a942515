"""Memory of a run's main process over its steps: resident and anonymous memory of rank 0, read from outside.

    python scripts/bench_memory.py --steps 2000 --record docs/benchmarks

A plain ``remit train`` with what a run has switched on: a live reference, data workers, validations, saves,
tensorboard, metrics.jsonl. Nothing is put into it. Whenever metrics.jsonl has grown by ``--every`` lines the process is
looked at. What a run allocates once (first save, first validation, allocator pools) is over by a quarter of the steps;
from there on a line is fitted, and its slope should be nothing: a run has as many steps as its corpus.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from benchmarking import heading, record, versions
from toy_run import make_corpus, make_tokenizer, model_values

from remit_megatron.runtime.progress import Progress

FIELDS = ("VmRSS", "RssAnon")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=10, help="steps between two looks (default: 10)")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a dated record there")
    return parser.parse_args()


def run_config(args: argparse.Namespace, folder: Path) -> Path:
    """The run, with its models and data."""
    import torch
    from random_model import write_random_model

    import patches

    patches.apply()
    tokenizer = make_tokenizer(folder / "tokenizer")
    values = model_values(hidden=32, layers=2, sequence=64)
    for seed, name in enumerate(("student", "reference"), start=1):
        write_random_model(folder / name, values, dtype=torch.float32, seed=seed)
        for file in tokenizer.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    corpus = str(make_corpus(folder, tokenizer, tokens=64 * 4 * args.steps // 2))  # two epochs
    config = {
        "init": str(folder / "student"),
        "objective": {"name": "remit"},
        "reference": {"checkpoint": str(folder / "reference")},
        "data": {"train": [[1.0, corpus]], "valid": [[1.0, corpus]], "tokenizer": str(tokenizer)},
        "megatron": {
            "seq_length": 64,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": args.steps,
            "lr": 1e-4,
            "save_interval": max(1, args.steps // 20),
            "eval_interval": max(1, args.steps // 20),
            "eval_iters": 2,
        },
        "run_dir": str(folder / "run"),
        "logging": {"interval": 50},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def memory(pid: int) -> list[float]:
    """MiB of each of :data:`FIELDS`."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return [int(lines[name].split()[0]) / 1024 for name in FIELDS]


def follow(args: argparse.Namespace, folder: Path) -> list[list[float]]:
    """Runs it; one row for each look: step, and MiB of each field."""
    path = run_config(args, folder)
    command = [sys.executable, "-m", "remit_megatron", "train", str(path)]
    rows: list[list[float]] = []
    progress = Progress("bench", total=args.steps, unit="steps")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        metrics, steps, read = folder / "run" / "metrics.jsonl", 0, 0
        while process.poll() is None:
            time.sleep(0.02)
            if not metrics.exists():
                continue
            with open(metrics, "rb") as file:
                file.seek(read)
                new = file.read()
            steps, read = steps + new.count(b"\n"), read + len(new)
            if steps >= (rows[-1][0] if rows else 0) + args.every:
                try:
                    rows.append([steps, *memory(process.pid)])
                except (OSError, KeyError):  # at its end
                    break
                progress.update(steps)
    progress.finish()
    if process.wait():
        raise SystemExit(f"the run ended with {process.returncode}:\n{(folder / 'log').read_text()[-2000:]}")
    return rows


def report(args: argparse.Namespace, rows: list[list[float]]) -> str:
    """Tables in Markdown."""
    seen = np.array(rows)
    late = seen[seen[:, 0] >= args.steps / 4]
    lines = [
        heading("memory of a run's main process"),
        f"One rank, {args.steps} steps of 4 x 64 tokens, live reference, {len(rows)} looks, 20 saves and validations; "
        f"{versions('megatron-core')}.",
        "",
        "| step | resident MiB | anonymous MiB |",
        "|---|---|---|",
    ]
    marks = [min(range(len(rows)), key=lambda n, t=tenth: abs(rows[n][0] - args.steps * t / 10)) for tenth in range(11)]
    lines += [f"| {rows[n][0]:.0f} | {rows[n][1]:.1f} | {rows[n][2]:.1f} |" for n in sorted(set(marks))]
    lines.append("")
    for column, name in enumerate(("Resident", "Anonymous"), start=1):
        slope, _ = np.polyfit(late[:, 0], late[:, column], 1)
        half = len(late) // 2
        first, second = np.median(late[:half, column]), np.median(late[half:, column])
        lines.append(
            f"{name} memory from step {late[0, 0]:.0f} on: {1024 * slope:+.3f} KiB a step (fitted line), median of the "
            f"second half {second - first:+.2f} MiB against the first, largest {late[:, column].max():.1f} MiB."
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    args = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as folder:
        rows = follow(args, Path(folder))
    text = report(args, rows)
    sys.stdout.write(text)
    if args.record is not None:
        raw: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}, "fields": FIELDS, "rows": rows}
        record(args.record, "memory", title="Memory of a run's main process", text=text, raw=raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
