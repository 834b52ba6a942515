"""Reading the score cache: time per sample, and memory over a walk through all of it, at several sizes.

    python scripts/bench_cache.py --folder /dev/shm --record docs/benchmarks

Each cache is written first, with the class that training uses, and then read in random order by a process of its own,
which first has read 1,000 samples. Reported: microseconds per ``ReferenceCache.read``, which checks the score's
checksum and the hash of the sample's tokens (median, p20 and p80 over blocks of 500 reads; and the median of processor
time, which other work on the machine disturbs less), time to open the cache and
read a first sample, and the largest growth of resident and of anonymous memory during the walk. With a
folder in memory this is the cost of the code, not of a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarking import heading, quantile, record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from remit_megatron.reference import CacheIdentity, ReferenceCache
from remit_megatron.runtime.progress import Progress

DATASET = "0" * 64
BLOCK = 500
# (sequence length, samples declared, samples written)
CASES = [
    (256, 1_000, 1_000),
    (256, 100_000, 100_000),
    (256, 1_000_000, 100_000),
    (256, 1_000_000, 1_000_000),
    (4096, 20_000, 20_000),
    (4096, 1_000_000, 20_000),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the caches are made (default: the temporary folder); 0.7 GB")
    parser.add_argument("--rounds", type=int, default=3, help="walks through each cache, interleaved")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a dated record there")
    parser.add_argument("--walk", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def written_samples(samples: int, written: int) -> np.ndarray:
    """Which samples of a case have scores: all, or a random choice."""
    return np.random.default_rng(0).permutation(samples)[:written]


def tokens_of(length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 150_000, length + 1)


def make(directory: Path, length: int, samples: int, written: int) -> dict[str, float]:
    """Writes one cache; returns microseconds per write, seconds for the completeness, bytes on disk per token."""
    identity = CacheIdentity(
        reference="1" * 64, tokenizer="2" * 64, sequence_length=length, packing_seed=0, document_mask=False, eod_id=0
    )
    tokens = tokens_of(length)
    losses = np.random.default_rng(2).gamma(0.6, 3.0, length).astype(np.float32)
    progress = Progress(f"writing {samples} x {length}", total=written, unit="samples")
    with ReferenceCache.open(directory, identity=identity, create=True) as cache:
        cache.add_dataset(DATASET, samples=samples, name="bench")
        started = time.perf_counter()
        for number, sample in enumerate(np.sort(written_samples(samples, written)).tolist()):
            cache.write(DATASET, sample, tokens, losses)
            progress.update(number + 1)
        seconds = time.perf_counter() - started
        progress.finish()
        started = time.perf_counter()
        assert cache.completeness(DATASET).sum() == written
        completeness = time.perf_counter() - started
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return {
        "write_us": seconds / written * 1e6,
        "completeness_s": completeness,
        "bytes_per_token": size / (samples * length),
    }


def memory() -> np.ndarray:
    """Resident and anonymous memory of this process in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return np.array([int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon")]) / 1024


def walk(directory: Path, length: int, samples: int, written: int) -> dict[str, object]:
    """Opens a cache and reads every sample that it has, in random order."""
    order = written_samples(samples, written).tolist()
    tokens = tokens_of(length)
    started = time.perf_counter()
    cache = ReferenceCache.open(directory)
    assert cache.read(DATASET, order[0], tokens) is not None
    opening = time.perf_counter() - started
    for sample in order[:1000]:
        cache.read(DATASET, sample, tokens)
    before, growth, seconds, processor = memory(), np.zeros(2), [], []
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        started, used = time.perf_counter(), time.thread_time()
        for sample in block:
            if cache.read(DATASET, sample, tokens) is None:
                raise AssertionError(f"sample {sample} is missing")
        seconds.append((time.perf_counter() - started) / len(block))
        processor.append((time.thread_time() - used) / len(block))
        growth = np.maximum(growth, memory() - before)
    return {
        "open_ms": opening * 1e3,
        "read_us": [value * 1e6 for value in seconds],
        "processor_us": [value * 1e6 for value in processor],
        "growth_mib": growth.tolist(),
    }


def report(made: list[dict[str, float]], walks: list[list[dict]], rounds: int) -> str:
    """A table in Markdown."""
    lines = [
        heading("score cache"),
        f"uint16 scores, one thread, random order, {rounds} walks through each cache, interleaved, "
        f"each by a new process; Python {platform.python_version()}, numpy {np.__version__}. Memory: largest growth "
        "during a walk, after the first 1,000 reads; the largest of the walks. Where not all samples were written, the "
        "files are sparse, and bytes per token are of their full length. Rows with equally many written samples read "
        "equally much, so they show what the size of the cache costs; what else grows down the table are the misses of "
        "the processor's caches (1,000 samples of 256 tokens fit into them).",
        "",
        "| L | samples | written | read, median us | p20 | p80 | processor time, us | open and first read, ms "
        "| resident, MiB | anonymous, MiB | write, mean us | completeness, ms | bytes per token |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (length, samples, written), facts, results in zip(CASES, made, walks, strict=True):
        times = [value for result in results for value in result["read_us"]]
        processor = statistics.median(value for result in results for value in result["processor_us"])
        opening = statistics.median(result["open_ms"] for result in results)
        growth = np.max([result["growth_mib"] for result in results], axis=0)
        figures = [
            f"{length} | {samples:,} | {written:,}",
            *(f"{figure:.1f}" for figure in (statistics.median(times), quantile(times, 0.2), quantile(times, 0.8))),
            f"{processor:.1f}",
            f"{opening:.2f}",
            *(f"{figure:.1f}" for figure in growth),
            f"{facts['write_us']:.1f}",
            f"{facts['completeness_s'] * 1e3:.2f}",
            f"{facts['bytes_per_token']:.3f}",
        ]
        lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    args = parse()
    if args.walk:
        directory, *case = args.walk
        json.dump(walk(Path(directory), *map(int, case)), sys.stdout)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        directories = [Path(folder) / str(number) for number in range(len(CASES))]
        made = [make(directory, *case) for directory, case in zip(directories, CASES, strict=True)]
        walks: list[list[dict]] = [[] for _ in CASES]
        for number in range(args.rounds):
            for shift in range(len(CASES)):
                case = (number + shift) % len(CASES)
                command = [sys.executable, __file__, "--walk", str(directories[case]), *map(str, CASES[case])]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                walks[case].append(json.loads(result.stdout))
    text = report(made, walks, args.rounds)
    sys.stdout.write(text)
    if args.record is not None:
        for results in walks:
            for result in results:  # a million reads are 2,000 blocks; quantiles say what they say
                shares = (0, 0.05, 0.2, 0.5, 0.8, 0.95, 1)
                for name in ("read_us", "processor_us"):
                    result[name] = {str(share): quantile(result[name], share) for share in shares}
        cases = [
            {"sequence_length": length, "samples": samples, "written": written, **facts, "walks": results}
            for (length, samples, written), facts, results in zip(CASES, made, walks, strict=True)
        ]
        record(args.record, "cache", title="Score cache", text=text, raw={"cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
