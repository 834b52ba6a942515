"""Filling the pauses of a pipeline: step time of a replicated reference against the coupled one, with timed stand-ins.

    python scripts/bench_pipeline.py --rounds 7 --record docs/benchmarks

Several processes run Megatron's own schedules and point-to-point communication (Gloo) and this repository's step, with
models whose forward pass takes a set time F per stage and whose backward pass takes 2F: they sleep, so that four stages
run on any machine. The arms take turns:

    student     no reference; ideal 3 (m + (p - 1) / v) F for p stages, m microbatches and v virtual stages per rank
    pipeline    the reference runs through the same pipeline before the student; ideal 4 (m + (p - 1) / v) F of two
                passes one after the other (they overlap where a rank is done with the reference early)
    replicated  every rank scores m / p whole microbatches of the next step in its pauses;
                ideal max(4 m, 3 (m + (p - 1) / v)) F

Nothing of the reference but its arithmetic is a stand-in: batches, scores, plan, hand-over and losses are the real
ones. A process sleeps in one place at a time, so a rank never does two things at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarking import heading, record, versions

HIDDEN, VOCABULARY, LENGTH = 8, 16, 8
PARTS = 4  # quanta per stage, virtual ones included
ARMS = ("student", "pipeline", "replicated")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="p (default: 4)")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["8:1", "16:1", "8:2", "16:2"],
        metavar="M:V",
        help="microbatches and virtual stages per rank (default: 8:1 16:1 8:2 16:2)",
    )
    parser.add_argument("--forward-ms", type=float, default=40.0, help="F in milliseconds (default: 40)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a dated record there")
    return parser.parse_args()


def ideals(*, stages: int, microbatches: int, virtual: int) -> dict[str, float]:
    """Step times without communication, in units of F."""
    length = microbatches + (stages - 1) / virtual
    return {"student": 3 * length, "pipeline": 4 * length, "replicated": max(4 * microbatches, 3 * length)}


class Pace:
    """Sleeps as long as it is told, on average: what one sleep was too long, the next is shorter.

    On a virtual machine a sleep of 5 to 240 ms ends 2% to 8% late, which would count as idle time of the pipeline.
    """

    def __init__(self) -> None:
        self._late = 0.0

    def __call__(self, seconds: float) -> None:
        started = time.perf_counter()
        time.sleep(max(0.0, seconds - self._late))
        self._late += time.perf_counter() - started - seconds


def stand_ins() -> type:
    """The class of a stage; torch is imported in the processes that run it."""
    import torch
    from megatron.core.enums import ModelType

    occupy = Pace()

    class Occupied(torch.autograd.Function):
        """Takes its time, twice as much backward."""

        @staticmethod
        def forward(ctx, hidden, scale, seconds):
            ctx.seconds = seconds
            occupy(seconds)
            return hidden * scale

        @staticmethod
        def backward(ctx, *gradients):
            occupy(2 * ctx.seconds)
            return gradients[0], gradients[0].sum().view(1), None

    class Head(torch.nn.Module):
        """An output layer as the output processors use it."""

        sequence_parallel = False

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(-1, 1, VOCABULARY * HIDDEN).view(VOCABULARY, HIDDEN))

        def forward(self, hidden, weight=None):
            return hidden @ (self.weight if weight is None else weight).t(), None

    class Stage(torch.nn.Module):
        """Called as GPTModel is; a stage of the pipeline, a virtual stage, or a part of a whole model."""

        model_type = ModelType.encoder_or_decoder

        def __init__(self, config: Any, *, seconds: float, last: bool):
            super().__init__()
            self.config, self.seconds = config, seconds
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.head = Head() if last else None
            self._input: Any = None

        def set_input_tensor(self, tensor):
            self._input = tensor[0] if isinstance(tensor, list) else tensor

        def forward(self, tokens, positions, mask, *, output_processor, output_processor_context, **named):
            hidden = named.get("decoder_input")
            if hidden is None:
                hidden = self._input
            if hidden is None:
                hidden = torch.nn.functional.one_hot(tokens.t() % HIDDEN, HIDDEN).float()
            hidden = Occupied.apply(hidden, self.scale, self.seconds)
            if self.head is None:
                return hidden
            return output_processor(
                hidden_states=hidden,
                output_layer=self.head,
                output_weight=None,
                context=output_processor_context,
                scale_logits=lambda logits: logits,
            )

    return Stage


class Samples:
    """Random tokens, the same on every rank."""

    def __init__(self, seed: int):
        import torch

        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        import torch

        text = torch.randint(1, VOCABULARY, (1, LENGTH + 1), generator=self._generator)
        return {"tokens": text[:, :-1].clone(), "labels": text[:, 1:].clone(), "loss_mask": torch.ones(1, LENGTH)}


def arms_of(*, stages: int, microbatches: int, virtual: int, forward_seconds: float) -> dict[str, Callable[[], None]]:
    """One function per arm that runs a step, on this rank; process groups exist."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from patches import pipeline_wait
    from remit_megatron.models.forward import ModelForward
    from remit_megatron.objectives import build_objective
    from remit_megatron.reference.idle import IdleFiller
    from remit_megatron.reference.live import LiveReference
    from remit_megatron.reference.replicated import ReplicatedReference
    from remit_megatron.training.step import TrainingStep

    groups = ProcessGroupCollection.use_mpu_process_groups()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    config = TransformerConfig(
        num_layers=stages * virtual,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=virtual > 1,  # as Megatron's arguments have it
        batch_p2p_comm=virtual == 1,
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
    )
    config.finalize_model_grads_func = lambda *args, **kwargs: torch.distributed.barrier(group=groups.pp)
    stage = stand_ins()

    def chunks() -> list[torch.nn.Module]:
        return [
            stage(config, seconds=forward_seconds / virtual, last=rank == stages - 1 and number == virtual - 1)
            for number in range(virtual)
        ]

    def frozen(module: torch.nn.Module) -> torch.nn.Module:
        return module.eval().requires_grad_(False)

    forward = ModelForward(eod_id=0, groups=lambda: groups)
    filler = IdleFiller()
    parts = stages * virtual * PARTS
    seconds = forward_seconds * stages / parts
    pieces = [frozen(stage(config, seconds=seconds, last=number == parts - 1)) for number in range(parts)]
    references = {
        "student": None,
        "pipeline": LiveReference([frozen(chunk) for chunk in chunks()], vocab_size=VOCABULARY, forward=forward),
        "replicated": ReplicatedReference(
            pieces[-1], vocab_size=VOCABULARY, forward=forward, filler=filler, pieces=pieces
        ),
    }
    pipeline_wait.hook = filler.wait
    student = chunks()
    schedule = get_forward_backward_func(pp_size=stages, vp_size=virtual if virtual > 1 else None)

    def run(step: TrainingStep, data: list[Samples]) -> None:
        step.wrap_schedule(schedule)(
            forward_step_func=step.forward_step,
            data_iterator=data if virtual > 1 else data[0],
            model=student,
            num_microbatches=microbatches,
            seq_length=LENGTH,
            micro_batch_size=1,
        )

    arms = {}
    for name, reference in references.items():
        step = TrainingStep(
            objective=build_objective("ntp" if reference is None else "remit"),
            vocab_size=VOCABULARY,
            forward=forward,
            scores=None if reference is None else partial(lambda found: found, reference),
            upcoming=lambda: microbatches,
        )
        arms[name] = partial(run, step, [Samples(0) for _ in range(virtual)])
    return arms


def measure(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each arm, over all ranks."""
    import torch.distributed as dist

    for name in ARMS:
        for _ in range(5 if name == "replicated" else 1):  # one warm-up step, three that measure, the first that fills
            arms[name]()
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(rounds):
        shift = number % len(ARMS)
        for name in ARMS[shift:] + ARMS[:shift]:
            dist.barrier()
            started = time.perf_counter()
            arms[name]()
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def work(rank: int, port: int, args: argparse.Namespace, folder: str) -> None:
    """One stage, in a process of its own."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(args.stages),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    import torch

    import patches

    torch.set_num_threads(1)
    patches.apply()
    from megatron.core import parallel_state

    from remit_megatron.runtime import parallel
    from remit_megatron.runtime.progress import Progress

    parallel.initialize(parallel.rank_environment())
    progress = Progress("bench", total=len(args.cases), unit="cases")
    for number, case in enumerate(args.cases):
        microbatches, virtual = map(int, case.split(":"))
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=args.stages,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        )
        arms = arms_of(
            stages=args.stages,
            microbatches=microbatches,
            virtual=virtual,
            forward_seconds=args.forward_ms / 1000,
        )
        seconds = measure(arms, args.rounds)
        parallel_state.destroy_model_parallel()
        if rank == 0:
            (Path(folder) / f"{number}.json").write_text(json.dumps(seconds))
            progress.update(number + 1)
    if rank == 0:
        progress.finish()
    torch.distributed.destroy_process_group()


def rows_of(args: argparse.Namespace, results: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """What stands in the table, a row for each arm of each case."""
    rows = []
    for case, seconds in results.items():
        microbatches, virtual = map(int, case.split(":"))
        ideal = ideals(stages=args.stages, microbatches=microbatches, virtual=virtual)
        for arm in ARMS:
            median = statistics.median(seconds[arm])
            passes = median / args.forward_ms * 1000
            rows.append(
                {
                    "microbatches": microbatches,
                    "virtual": virtual,
                    "arm": arm,
                    "seconds": median,
                    "passes": passes,
                    "ideal": ideal[arm],
                    "ratio": passes / ideal[arm],
                }
            )
    return rows


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [
        heading("filling the pauses of a pipeline"),
        f"{args.stages} stages in as many processes on {len(os.sched_getaffinity(0))} cores, Gloo, "
        f"F = {args.forward_ms:g} ms, {PARTS} quanta per (virtual) stage; {versions('megatron-core')}. Arms "
        f"interleaved, median of {args.rounds} steps; the bar is 1.10 x the ideal of the replicated arm. That of "
        "the coupled arm is of two passes one after the other; ranks that are done with the reference begin with the "
        "student.",
        "",
        "| microbatches | virtual stages | arm | median s | in F | ideal in F | measured / ideal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['microbatches']} | {row['virtual']} | {row['arm']} | {row['seconds']:.3f} "
            f"| {row['passes']:.1f} | {row['ideal']:.1f} | {row['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    args = parse()
    from remit_megatron.runtime.launch import free_port

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [context.Process(target=work, args=(rank, port, args, folder)) for rank in range(args.stages)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return 1
        results = {case: json.loads((Path(folder) / f"{n}.json").read_text()) for n, case in enumerate(args.cases)}
    rows = rows_of(args, results)
    text = report(args, rows)
    sys.stdout.write(text)
    if args.record is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        raw = {"arguments": settings, "rows": rows, "seconds": results}
        record(args.record, "pipeline", title="Filling the pauses of a pipeline", text=text, raw=raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
