"""Time, memory and exactness of the losses over the vocabulary, beside every other implementation at hand.

    python scripts/bench_kernels.py --record docs/benchmarks
    python scripts/bench_kernels.py --sections loss --tokens 512 --rounds 25

Sections: ``loss``, forward and backward from logits; ``logprob``, no gradient from logits; ``hidden``, no gradient from
hidden states; ``linear``, forward and backward from hidden states and output weight; ``divergence``, forward and
backward of `kd`'s divergence, from the student's logits and the reference's hidden states; ``norms``, forward and
backward of OLMo 2's norms of queries and keys. In each, all arms take turns in
one process, in an order that rotates, over the same data; the incoming gradient differs from token to token and is 0
for the first, so that an arm that scales every row alike is found out. Every arm is compared with float64 before it is
timed, and one that is wrong is reported as wrong in place of a time.

Reported: median, p20 and p80; the median over rounds of the ratio to ours within a round (above 1: slower than ours);
bytes per logit, which is what a copy of the logits would have moved in that time at the bandwidth measured in the same
rounds; the share of that bandwidth that the arm reaches if only the unavoidable bytes count (logits read twice and
written once, or read once without gradient); peak memory beyond the inputs, the gradient where it is a new tensor
included; and the largest error of loss and gradient. Sections from hidden states compare with the bare products.
Without a GPU token counts are small by default, for about two minutes on two cores; arms that need one say so.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarking import heading, interleave, median_ratio, quantile, record, versions

SHAPES = {  # vocabulary, hidden size
    "OLMo 2 1B": (100352, 2048),
    "SmolLM3 3B, Youtu-LLM 2B": (128256, 2048),
}
SECTIONS = {
    "loss": "forward and backward from logits",
    "logprob": "no gradient, from logits",
    "hidden": "no gradient, from hidden states",
    "linear": "forward and backward from hidden states and output weight",
    "divergence": "forward and backward of kd's divergence from the reference's hidden states",
    "norms": "forward and backward of the norms of queries and keys",
}
NORMED = ("OLMo 2 1B", "own shape")  # shapes whose models have those
# Largest error that passes: of a loss in nats beside max(1, loss), of a gradient beside the largest of its kind.
# Sections from hidden states round their logits, in all arms; a gradient that is scaled wrongly is off by far more.
BOUNDS = {
    "loss": (1e-3, 0.01),
    "logprob": (1e-3, 0.0),
    "hidden": (0.1, 0.0),
    "linear": (0.1, 0.05),
    "divergence": (0.02, 0.1),  # a logit of the reference may be rounded to a neighbor
    "norms": (0.01, 0.02),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default: 50 on a GPU, 7 elsewhere")
    parser.add_argument("--tokens", type=int, help="tokens of logits; default: 8192 on a GPU, 256 elsewhere")
    parser.add_argument(
        "--hidden-tokens", type=int, help="tokens of hidden states; default: 8192 on a GPU, 64 elsewhere"
    )
    parser.add_argument("--sequences", type=int, default=2, help="sequences that the hidden states are (default: 2)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), help="default: bfloat16; on a CPU both")
    parser.add_argument("--vocabulary", type=int, help="measure this size in place of the families' shapes")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size beside --vocabulary")
    parser.add_argument("--compile", action="store_true", help="torch.compile also without a GPU (a minute or more)")
    parser.add_argument("--record", type=Path, metavar="DIR", help="append a dated record there")
    return parser.parse_args()


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Most bytes that ``run`` held at once beyond what there was before."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    changes = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call; on a GPU of its work, launched ahead of time."""
    import torch

    if not torch.cuda.is_available():
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    # Some 10 ms, in which the launches queue up: those of Triton take longer than its small kernels.
    torch.cuda._sleep(20_000_000)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


class Section:
    """Arms of one section over one problem.

    ``base`` are the yardsticks: a copy of the logits, or the bare products.
    """

    def __init__(self, problem: Any, arms: dict[str, Any], base: tuple[str, Callable[[], object]]):
        self.problem, self.arms, self.base = problem, arms, base

    def measure(self, rounds: int, label: str, bounds: tuple[float, float]) -> list[dict[str, Any]]:
        """One result for each arm: what it is, or why there is none."""
        from kernel_arms import OURS, Missing

        results: dict[str, dict[str, Any]] = {}
        running = []
        for name, arm in self.arms.items():
            results[name] = {"arm": name, "status": "ok", "note": ""}
            if isinstance(arm, Missing):
                results[name] |= {"status": "not run", "note": arm.reason}
                continue
            errors = self.problem.errors(arm)
            results[name] |= dict(zip(("loss_error", "gradient_error"), errors, strict=True))
            if not all(error <= bound for error, bound in zip(errors, bounds, strict=True)):
                results[name] |= {"status": "wrong", "note": "wrong under uneven weights; not timed"}
                continue
            call = self.problem.prepare(arm)
            results[name]["peak_extra_bytes"] = peak_extra_bytes(call)
            del call
            running.append(name)
        assert results[OURS]["status"] == "ok", results[OURS]
        base_name, base = self.base

        def run(name: str) -> float:
            call = base if name == base_name else self.problem.prepare(self.arms[name])
            return timed(call)

        seconds = interleave([*running, base_name], rounds, run, label=label)
        for name in running:
            results[name] |= figures(seconds[name], seconds[OURS], seconds[base_name])
        return [
            *results.values(),
            {"arm": base_name, "status": "yardstick", "note": ""}
            | figures(seconds[base_name], seconds[OURS], seconds[base_name]),
        ]


def figures(seconds: list[float], ours: list[float], base: list[float]) -> dict[str, Any]:
    """What is reported of an arm's times; ``over_base`` is the ratio to the yardstick within a round."""
    return {
        "median_seconds": statistics.median(seconds),
        "p20_seconds": quantile(seconds, 0.2),
        "p80_seconds": quantile(seconds, 0.8),
        "over_ours": median_ratio(seconds, ours),
        "over_base": median_ratio(seconds, base),
        "seconds": seconds,
    }


def run_section(
    section: str, vocabulary: int, hidden: int, dtype: str, args: argparse.Namespace, label: str
) -> list[dict[str, Any]]:
    """Measures one section at one shape; returns its results, complete."""
    import kernel_arms as arms
    import torch
    from kernel_problems import DivergenceProblem, LinearProblem, LogitsProblem, NormProblem

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype)
    size = torch.finfo(kind).bits // 8
    if section in ("loss", "logprob"):
        gradient = section == "loss"
        problem = LogitsProblem(args.tokens, vocabulary, kind, device, gradient=gradient)
        found = (
            arms.loss_arms(device, compiled=args.compile or device.type == "cuda")
            if gradient
            else arms.logprob_arms(device)
        )
        base, tokens = ("copy of the logits", problem.copy), args.tokens
    elif section == "norms":
        problem = NormProblem(args.hidden_tokens, hidden, kind, device)
        found = arms.norm_arms(device, compiled=args.compile or device.type == "cuda")
        base, tokens = ("copy of queries and keys", problem.copy), args.hidden_tokens
    elif section == "divergence":
        problem = DivergenceProblem(args.hidden_tokens, vocabulary, hidden, kind, device)
        found = arms.divergence_arms(device, compiled=args.compile or device.type == "cuda")
        base, tokens = ("products alone", problem.products), args.hidden_tokens
    else:
        problem = LinearProblem(
            args.hidden_tokens, args.sequences, vocabulary, hidden, kind, device, gradient=section == "linear"
        )
        found = arms.linear_arms(device) if section == "linear" else arms.hidden_arms()
        base, tokens = ("products alone", problem.products), args.hidden_tokens
    results = Section(problem, found, base).measure(args.rounds, label, BOUNDS[section])
    for result in results:
        result |= {"section": section, "vocabulary": vocabulary, "hidden": hidden, "tokens": tokens, "dtype": dtype}
        if section in ("loss", "logprob") and "over_base" in result:
            # The copy reads and writes each logit: 2 x size bytes.
            result["bytes_per_logit"] = 2 * size * result["over_base"]
            if result["status"] == "yardstick":
                result["copy_bytes_per_second"] = 2 * size * tokens * vocabulary / result["median_seconds"]
            else:
                result["copy_fraction"] = (3 if section == "loss" else 1) * size / result["bytes_per_logit"]
    return results


def table(results: list[dict[str, Any]]) -> list[str]:
    """Markdown of one section at one shape."""
    logits = results[0]["section"] in ("loss", "logprob")
    yardstick = "x copy" if results[0]["section"] == "norms" else "x products"
    last = ["bytes per logit", "of copy bandwidth"] if logits else [yardstick]
    columns = ["arm", "median ms", "p20", "p80", "x ours", *last, "peak extra MiB", "error of loss", "of gradient"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        if "median_seconds" not in result:
            row = [result["note"], *[""] * (len(columns) - 4)]
        else:
            row = [f"{result[f'{name}_seconds'] * 1e3:.4g}" for name in ("median", "p20", "p80")]
            row.append(f"{result['over_ours']:.3f}")
            if logits:
                share = f"{result['copy_fraction']:.0%}" if "copy_fraction" in result else ""
                row += [f"{result['bytes_per_logit']:.1f}", share]
            else:
                row.append(f"{result['over_base']:.3f}")
            row.append(f"{result['peak_extra_bytes'] / 2**20:.2f}" if "peak_extra_bytes" in result else "")
        errors = [f"{result[name]:.1e}" if name in result else "" for name in ("loss_error", "gradient_error")]
        if results[0]["section"] in ("logprob", "hidden"):
            errors[1] = ""
        lines.append(f"| {' | '.join([result['arm'], *row, *errors])} |")
    return lines


def report(args: argparse.Namespace, parts: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """The record in Markdown."""
    packages = versions("megatron-core", "triton", "liger-kernel", "transformer-engine")
    lines = [
        heading("kernels"),
        f"{packages}. Arms interleaved, {args.rounds} rounds after one warm-up round. "
        "Incoming gradient different for every token, 0 for the first.",
    ]
    for shape, results in parts:
        first = results[0]
        what = f"{first['tokens']} tokens, vocabulary {first['vocabulary']}"
        if first["section"] == "norms":
            what = f"{first['tokens']} tokens, queries and keys of {first['hidden']} channels each"
        elif first["section"] == "divergence":
            what += f", hidden size {first['hidden']}"
        elif first["section"] in ("hidden", "linear"):
            what += f", hidden size {first['hidden']}, {args.sequences} sequences"
        lines += ["", f"### {shape}: {SECTIONS[first['section']]}, {first['dtype']} ({what})", ""]
        if bandwidth := results[-1].get("copy_bytes_per_second"):
            note = f"A copy of the logits moves {bandwidth / 1e9:.3g} GB/s."
            if first["section"] == "loss" and first["dtype"] == "float32":
                note += " Megatron's native loss overwrites float32 logits in forward; ours keeps them until backward."
            lines += [note, ""]
        lines += table(results)
    return "\n".join(lines) + "\n"


def main() -> int:
    args = parse()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory; it has nothing to say
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import patches

    patches.apply()
    import torch
    from torch import distributed as dist

    gpu = torch.cuda.is_available()
    args.rounds = args.rounds or (50 if gpu else 7)
    args.tokens = args.tokens or (8192 if gpu else 256)
    args.hidden_tokens = args.hidden_tokens or (8192 if gpu else 64)
    args.dtypes = args.dtypes or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    if args.hidden_tokens % args.sequences:
        sys.exit(f"--hidden-tokens: found {args.hidden_tokens}; expected a multiple of --sequences {args.sequences}")
    shapes = SHAPES if args.vocabulary is None else {"own shape": (args.vocabulary, args.hidden)}
    parts = []
    for name, (vocabulary, hidden) in shapes.items():
        for section in args.sections:
            if section == "norms" and name not in NORMED:
                continue
            for dtype in args.dtypes:
                label = f"{name}, {section}, {dtype}"
                parts.append((name, run_section(section, vocabulary, hidden, dtype, args, label)))
    if dist.is_initialized():
        dist.destroy_process_group()
    text = report(args, parts)
    sys.stdout.write(text)
    if args.record is not None:
        raw = {
            "arguments": {key: str(value) for key, value in vars(args).items()},
            "results": [{"shape": shape} | result for shape, results in parts for result in results],
        }
        record(args.record, "kernels", title="Kernels", text=text, raw=raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
