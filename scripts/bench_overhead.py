"""Time that this repository adds to a step of several ranks: one run whose steps are ours and Megatron's own by turns.

    python scripts/bench_overhead.py --steps 400 --record docs/benchmarks

One real ``remit train`` on ``--nproc`` ranks, tensor and data parallel. In every group of four steps two are ours
(schedule, forward step, loss, the figures of the step, the collective question whether a rank has met a fault,
metrics.jsonl, the progress line) and two are Megatron's (its schedule, the forward step and loss of its pretraining
script, its log), in the order ours, Megatron, Megatron, ours. A step is timed from one call of ``train_step`` to the
next on every rank, so that all of Megatron's loop is in both. Wall-clock time is rank 0's and has the waiting for other
ranks in it; processor time is that of the rank that works most, and other work on the machine disturbs it less.

The objective is ``ntp``: what weights and scores cost is the method's (bench_step.py). What is ours to add does not
grow with the model but by its tokens, so that a small step shows it. The bar is 1% of a step of one second: 10 ms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from benchmarking import heading, record, versions
from toy_run import make_corpus, make_tokenizer, model_values

BAR = 0.01  # seconds: 1% of a step of one second
WARM_UP = 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps that count (default: 400)")
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a dated record there")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    return parser.parse_args()


def run_config(args: argparse.Namespace, folder: Path) -> Path:
    """The run, with its data."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    tensor = 2 if args.nproc % 2 == 0 else 1
    replicas = args.nproc // tensor
    config = {
        "model": model_values(hidden=args.hidden, layers=args.layers, sequence=args.sequence),
        "objective": {"name": "ntp"},
        "data": {
            "train": [[1.0, str(make_corpus(folder, tokenizer, tokens=200_000))]],
            "tokenizer": str(tokenizer),
            "num_workers": 0,
        },
        "megatron": {
            "tensor_model_parallel_size": tensor,
            "seq_length": args.sequence,
            "micro_batch_size": args.micro_batch,
            "global_batch_size": args.micro_batch * replicas,
            "train_iters": args.steps + WARM_UP + 1,
            "lr": 1e-5,
            "save_interval": 1_000_000,
            "eval_iters": 0,
        },
        "run_dir": str(folder / "run"),
        "logging": {"interval": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def is_ours(step: int) -> bool:
    """Whether a step, counted from 0, is ours: ours, Megatron, Megatron, ours."""
    return step % 4 in (0, 3)


def run_rank(args: argparse.Namespace) -> int:
    """One rank of the run; leaves wall-clock and processor seconds of each step in ``seconds-RANK.json``."""
    import patches

    patches.apply()
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import training

    from patches import training_log
    from remit_megatron.models.batch import to_batch
    from remit_megatron.run.configuration import load_config
    from remit_megatron.runtime import parallel
    from remit_megatron.training.command import train

    def megatron_forward(data_iterator: Any, chunk: Any) -> tuple[Any, Any]:
        """The forward step of Megatron's own pretraining script, in its essentials."""
        batch = to_batch(next(data_iterator), device=parallel.device(), eod_id=0)
        losses = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)

        def loss(output: Any) -> tuple[Any, Any, dict[str, Any]]:
            mask = batch.loss_mask.view(-1).float()
            total = torch.sum(output.view(-1).float() * mask)
            tokens = mask.sum().clone().detach().to(torch.int)
            return total, tokens, {"lm loss": torch.cat([total.clone().detach().view(1), tokens.view(1)])}

        return losses, loss

    started: list[tuple[float, float]] = []
    whole_step: Any = training.train_step
    hook: Any = None

    def step(forward_step: Any, *rest: Any, **named: Any) -> Any:
        nonlocal hook
        started.append((time.perf_counter(), time.process_time()))
        hook = hook or training_log.hook  # the run's, which is there by now
        if is_ours(len(started) - 1):
            training_log.hook = hook
            return whole_step(forward_step, *rest, **named)
        training_log.hook = None
        return whole_step(megatron_forward, *rest[:-1], get_forward_backward_func(), **named)

    training.train_step = step
    code = train(load_config(args.folder / "run.yaml"))
    seconds = [(late[0] - early[0], late[1] - early[1]) for early, late in itertools.pairwise(started)]
    (args.folder / f"seconds-{os.environ['RANK']}.json").write_text(json.dumps(seconds))
    return code


def pairs(seconds: list[float]) -> tuple[list[float], list[float]]:
    """Seconds of our steps and of Megatron's, each the mean of the two in a group of four; the warm-up left out."""
    groups = [seconds[first : first + 4] for first in range(WARM_UP, len(seconds) - 3, 4)]
    return [(a + d) / 2 for a, _, _, d in groups], [(b + c) / 2 for _, b, c, _ in groups]


def median_and_error(values: list[float]) -> tuple[float, float]:
    """The median and its standard error, by the normal approximation."""
    return statistics.median(values), 1.253 * statistics.stdev(values) / len(values) ** 0.5


def report(args: argparse.Namespace, seconds: dict[str, list[list[float]]]) -> str:
    """A table in Markdown.

    Args:
        seconds: ``wall``, of rank 0, and ``processor``, of the rank whose steps cost most; each of our steps, and of
            Megatron's.
    """
    groups = len(seconds["wall"][0])
    lines = [
        heading("what a step costs beside Megatron's"),
        f"Llama of {args.layers} layers of width {args.hidden}, {args.nproc} ranks, {args.micro_batch} x "
        f"{args.sequence} tokens a replica; {versions('megatron-core')}. {groups} groups of four steps after {WARM_UP} "
        f"that warm up; load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores.",
        "",
        "| time | ours, median ms | Megatron's own | difference within a group: median | its standard error |",
        "|---|---|---|---|---|",
    ]
    verdicts = [""]
    for name, (ours, megatron) in seconds.items():
        middle, error = median_and_error([a - b for a, b in zip(ours, megatron, strict=True)])
        figures = (statistics.median(ours), statistics.median(megatron), middle, error)
        lines.append(f"| {name} | {' | '.join(f'{1000 * figure:.2f}' for figure in figures)} |")
        found = (
            "under" if middle + 2 * error < BAR else "over" if middle - 2 * error > BAR else "too noisy to compare with"
        )
        verdicts.append(f"- {name}: {middle:.2%} of a step of one second, {found} the bar of {BAR:.0%}.")
    return "\n".join(lines + verdicts) + "\n"


def main() -> int:
    args = parse()
    if args.folder is not None:
        return run_rank(args)
    from remit_megatron.runtime import launch

    os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(__file__).resolve().parents[up]) for up in (0, 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_config(args, folder)
        words = ["--folder", str(folder), "--nproc", str(args.nproc)]
        code = launch.launch(args.nproc, words, module="bench_overhead")
        if code:
            return code
        ranks = [json.loads((folder / f"seconds-{rank}.json").read_text()) for rank in range(args.nproc)]
    processor = [pairs([step[1] for step in steps]) for steps in ranks]
    busiest = max(processor, key=lambda arms: statistics.median(arms[0]))
    seconds = {"wall": list(pairs([step[0] for step in ranks[0]])), "processor": list(busiest)}
    text = report(args, seconds)
    sys.stdout.write(text)
    if args.record is not None:
        raw = {"arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": seconds}
        record(args.record, "overhead", title="What a step costs beside Megatron's", text=text, raw=raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
