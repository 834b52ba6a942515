"""Time of one training step: Megatron's own GPT loss, our ntp, and remit with a live reference and with cached scores.

    python scripts/bench_step.py --rounds 15 --record docs/benchmarks

    python scripts/bench_step.py --fp8 tensorwise --student-fp8

All arms share one student, one optimizer, one batch shape and Megatron's ``train_step``; they differ in the forward
step and the schedule. ``--fp8`` adds a reference with FP8 weights; ``--student-fp8`` makes the student's products FP8
too, in a record of its own; where the machine has no FP8, both are left out and the record says why. The order of the
arms rotates from round to round. Reported: median, p20 and p80 of seconds per step, and the median over rounds of the
ratio within a round. The arithmetic limit of remit over ntp is 4/3: forward and backward of the student cost three
forward passes, the reference a fourth.

Beside the times: what a step of ntp under document masks launches with one document in a sequence and with 32 (on a
GPU its kernels and copies, on a CPU the operations that are dispatched). Exit code 1 where 32 documents take more than
5% more. The bars of speed are in the table and fail nothing: a GPU that others use, too, is no judge.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from benchmarking import heading, interleave, median_ratio, quantile, record, versions

ARMS = ("megatron", "ntp", "remit", "remit, cached", "kd", "scoring only", "ntp, loss.linear", "remit, FP8 reference")
# Arm -> the arm it is compared with, and the bar of that ratio of times on a GPU.
COMPARED: dict[str, tuple[str, float | None]] = {
    "ntp": ("megatron", None),
    "remit": ("ntp", 1 / (1 - 0.27)),
    "remit, cached": ("ntp", 1 / (1 - 0.01)),
    "kd": ("remit", 1.5),
    "ntp, loss.linear": ("ntp", None),
    "remit, FP8 reference": ("ntp", None),
}
SCORING_BAR = 2.8  # tokens/s of scoring over those of training
DOCUMENTS, MORE_LAUNCHES = (1, 32), 1.05
FP8_ARM = ARMS[-1]
RECIPES = ("tensorwise", "blockwise", "mxfp8")  # of a frozen model (remit_megatron/models/fp8.py)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help="only some of them")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--fp8", metavar="RECIPE", choices=RECIPES, help="recipe of the reference's FP8 weights")
    parser.add_argument("--student-fp8", action="store_true", help="the student's products in FP8 too, by that recipe")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a dated record there")
    args = parser.parse_args()
    if args.student_fp8 and args.fp8 is None:
        parser.error("--student-fp8 needs --fp8 RECIPE")
    return args


def left_out(args: argparse.Namespace) -> str | None:
    """Why FP8 is left out although it was asked for, in one line; None where it is not."""
    if args.fp8 is None:
        return None
    import patches

    patches.apply()
    from remit_megatron.models.fp8 import missing

    return missing(args.fp8)


def run_config(args: argparse.Namespace, folder: Path) -> Path:
    """A run configuration with an inline model; its data and checkpoints are never opened."""
    heads = args.hidden // 64
    config = {
        "model": {
            "model_type": "llama",
            "vocab_size": args.vocabulary,
            "hidden_size": args.hidden,
            "intermediate_size": args.hidden * 8 // 3 // 64 * 64,
            "num_hidden_layers": args.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": 64,
            "hidden_act": "silu",
            "max_position_embeddings": args.sequence,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
        },
        "objective": {"name": "ntp"},
        "data": {"train": [[1.0, "unused"]], "tokenizer": "unused"},
        "megatron": {
            "seq_length": args.sequence,
            "micro_batch_size": args.micro_batch,
            "global_batch_size": args.micro_batch * args.microbatches,
            "train_iters": 1000,
            "lr": 1e-5,
            **({"fp8": "hybrid", "fp8_recipe": args.fp8, "first_last_layers_bf16": True} if args.student_fp8 else {}),
        },
        "run_dir": str(folder / "run"),
        "logging": {"tensorboard": False},
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Corpus:
    """A blend of one data set of random tokens, as long as a step.

    Args:
        documents: of equal length in each sequence; None leaves them out of the items.
    """

    def __init__(self, args: argparse.Namespace, documents: int | None = None):
        import torch

        self.documents = documents

        shape = (args.micro_batch * args.microbatches, args.sequence + 1)
        self.tokens = torch.randint(1, args.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        self.datasets = [argparse.Namespace(identity="0" * 64)]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        tokens = self.tokens[index]
        item = {"tokens": tokens[:-1].clone(), "labels": tokens[1:].clone(), "loss_mask": torch.ones(len(tokens) - 1)}
        if self.documents is not None:
            length = len(tokens) - 1
            item["document_ids"] = torch.arange(length) * self.documents // length
        return item | {"dataset_id": torch.tensor(0), "sample_id": torch.tensor(index)}


def filled_cache(blend: Corpus, directory: Path) -> Any:
    """A score cache with a random score for every token."""
    import numpy as np

    from remit_megatron.reference.cache import CacheIdentity, ReferenceCache

    samples, length = blend.tokens.shape
    identity = CacheIdentity("0" * 64, "0" * 64, length - 1, 0, False, None)
    cache = ReferenceCache.open(directory, identity=identity, create=True)
    cache.add_dataset(blend.datasets[0].identity, samples=samples, name="random")
    scores = np.random.default_rng(0).gamma(2.0, 2.0, size=(samples, length - 1))
    for sample in range(samples):
        cache.write(blend.datasets[0].identity, sample, blend.tokens[sample].numpy(), scores[sample])
    cache.flush()
    return cache


def setup(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Callable[[], None]], int]:
    """Builds student, optimizer and reference; returns one function per arm, and the number of student parameters."""
    import patches

    patches.apply()
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import global_vars, initialize_megatron, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from torch.utils.data import default_collate

    from patches.quiet_megatron import redirect
    from remit_megatron.models.batch import to_batch
    from remit_megatron.models.build import build_chunks, megatron_arguments, model_config
    from remit_megatron.models.forward import ModelForward
    from remit_megatron.models.fp8 import frozen_arguments
    from remit_megatron.objectives import build_objective
    from remit_megatron.reference.cached import CachedScores, ScoredSamples
    from remit_megatron.reference.live import LiveReference
    from remit_megatron.reference.source import ScoreSource
    from remit_megatron.run.configuration import load_config, load_model_description
    from remit_megatron.run.megatron_args import build_arguments
    from remit_megatron.runtime import parallel
    from remit_megatron.training.step import TrainingStep

    config = load_config(run_config(args, folder))
    hf_config = load_model_description(config.model)
    arguments = build_arguments(config, megatron_arguments(hf_config), world_size=1, rank=0)
    arguments.load = None
    parallel.initialize(parallel.rank_environment())
    global_vars.set_global_variables(arguments, build_tokenizer=False)
    redirect()
    initialize_megatron()
    student = model_config(hf_config, arguments)
    container = pretrain_cfg_container_from_args(arguments, student)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder, cfg_container=container, pg_collection=groups
    )
    model_config_of_student = model[0].config
    model_config_of_student.grad_scale_func = optimizer.scale_loss
    model_config_of_student.finalize_model_grads_func = training.finalize_model_grads
    for chunk in model:
        chunk.train()
    forward = ModelForward(eod_id=0, groups=lambda: groups)

    def frozen(**precision: str) -> LiveReference:
        own = frozen_arguments(arguments, **precision)
        chunks = build_chunks(model_config(hf_config, own), groups, initialize=True)
        return LiveReference(chunks, vocab_size=args.vocabulary, forward=forward)

    reference = frozen()
    distribution = LiveReference(reference.chunks, vocab_size=args.vocabulary, forward=forward, signal="hidden")

    blend = Corpus(args)
    cached_samples = ScoredSamples(blend, filled_cache(blend, folder / "cache"))

    def microbatches(samples: Any) -> Iterator[dict[str, Any]]:
        """The step's microbatches, put together as a data loader does, in this process and in the step's time."""
        for first in range(0, len(blend), args.micro_batch):
            yield default_collate([samples[first + row] for row in range(args.micro_batch)])

    def megatron_forward(data_iterator, chunk):
        """The forward step of Megatron's own pretraining script, in its essentials."""
        batch = to_batch(next(data_iterator), device=parallel.device(), eod_id=0)
        losses = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)

        def loss(output):
            mask = batch.loss_mask.view(-1).float()
            total = torch.sum(output.view(-1).float() * mask)
            tokens = mask.sum().clone().detach().to(torch.int)
            return total, tokens, {"lm loss": torch.cat([total.clone().detach().view(1), tokens.view(1)])}

        return losses, loss

    masked = ModelForward(
        eod_id=-1,
        groups=lambda: groups,
        document_mask=True,
        packed_attention=arguments.transformer_impl == "transformer_engine",
    )

    def step(
        objective: str, source: ScoreSource | None, *, linear: bool = False, forward: ModelForward = forward
    ) -> TrainingStep:
        return TrainingStep(
            objective=build_objective(objective),
            vocab_size=args.vocabulary,
            forward=forward,
            scores=None if source is None else lambda: source,
            linear=linear,
        )

    ntp, remit, linear = step("ntp", None), step("remit", reference), step("ntp", None, linear=True)
    kd, of_documents = step("kd", distribution), step("ntp", None, forward=masked)
    names = [dataset.identity for dataset in blend.datasets]
    cached = step("remit", CachedScores(cached_samples.cache, names=names, forward=forward, on_missing="refuse"))
    schedule = get_forward_backward_func()

    def score() -> None:
        sizes = {"seq_length": args.sequence, "micro_batch_size": args.micro_batch}
        reference.score(schedule, [list(microbatches(blend))], **sizes)

    def arm(forward_step, run_schedule, samples: Any = blend) -> None:
        training.train_step(
            forward_step,
            microbatches(samples),
            model,
            optimizer,
            scheduler,
            model_config_of_student,
            run_schedule,
            iteration=0,
        )

    arms = {
        "megatron": partial(arm, megatron_forward, schedule),
        "ntp": partial(arm, ntp.forward_step, ntp.wrap_schedule(schedule)),
        "remit": partial(arm, remit.forward_step, remit.wrap_schedule(schedule)),
        "remit, cached": partial(arm, cached.forward_step, cached.wrap_schedule(schedule), cached_samples),
        "kd": partial(arm, kd.forward_step, kd.wrap_schedule(schedule)),
        "scoring only": score,
        "ntp, loss.linear": partial(arm, linear.forward_step, linear.wrap_schedule(schedule)),
    }
    if args.fp8 is not None:
        quantized = step("remit", frozen(fp8="e4m3", recipe=args.fp8))
        arms[FP8_ARM] = partial(arm, quantized.forward_step, quantized.wrap_schedule(schedule))
    for count in DOCUMENTS:
        documents = of_documents.wrap_schedule(schedule)
        arms[documents_arm(count)] = partial(arm, of_documents.forward_step, documents, Corpus(args, count))
    return arms, sum(p.numel() for p in model[0].parameters())


def documents_arm(count: int) -> str:
    """Name of the arm whose sequences hold so many documents; it is counted, not timed."""
    return f"ntp, documents: {count}"


def launches(run: Callable[[], None]) -> int:
    """What a call launches, once it has run: kernels and copies on a GPU; elsewhere operations that are dispatched."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    run()
    if not torch.cuda.is_available():
        from dispatched import Dispatched

        with Dispatched() as operations:
            run()
        return operations.count
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def measure(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each arm, one per round, after a warm-up round."""
    import torch

    def run(name: str) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        arms[name]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return interleave(list(arms), rounds, run, label="bench")


def ratio(seconds: dict[str, list[float]], arm: str) -> str:
    """What an arm is compared with, in words; nothing where that arm did not run."""
    import torch

    gpu = torch.cuda.is_available()
    if arm == "scoring only":
        bar = f" (bar: {SCORING_BAR})" if gpu else ""
        return (
            f"{median_ratio(seconds['ntp'], seconds[arm]):.2f} x the tokens/s of ntp{bar}" if "ntp" in seconds else ""
        )
    base, limit = COMPARED.get(arm, ("", None))
    if base not in seconds:
        return ""
    bar = f" (bar: {limit:.3f})" if gpu and limit is not None else ""
    return f"{median_ratio(seconds[arm], seconds[base]):.3f} x {base}{bar}"


def report(
    args: argparse.Namespace,
    seconds: dict[str, list[float]],
    parameters: int,
    without_fp8: str | None,
    launched: dict[int, int],
) -> str:
    """A table in Markdown.

    Args:
        launched: documents of a sequence -> launches of a step.
    """
    import torch

    tokens = args.micro_batch * args.microbatches * args.sequence
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    if args.student_fp8:
        precision += f", products in FP8 ({args.fp8})"
    lines = [
        heading("training step"),
        f"Llama with {parameters / 1e6:.1f}M parameters, vocabulary {args.vocabulary}, {tokens} tokens a step in "
        f"{args.microbatches} microbatches of {args.micro_batch} x {args.sequence}, {precision}, one process; "
        f"{versions('megatron-core')}. Arms interleaved, {args.rounds} rounds after one warm-up round.",
        "",
        "| arm | median s | p20 | p80 | ratio (median over rounds) |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        figures = (statistics.median(values), quantile(values, 0.2), quantile(values, 0.8))
        lines.append(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} | {ratio(seconds, name)} |")
    if without_fp8 is not None:
        lines += ["", f"Without FP8: {without_fp8}."]
    what = "kernels and copies on the GPU" if torch.cuda.is_available() else "operations that are dispatched"
    found = ", ".join(f"{number} with {count}" for count, number in launched.items())
    if launched:
        lines += ["", f"Of a step of ntp by documents in a sequence, {what}: {found}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    args = parse()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    without_fp8 = left_out(args)
    if without_fp8 is not None:
        args.fp8, args.student_fp8 = None, False
    with tempfile.TemporaryDirectory() as folder:
        arms, parameters = setup(args, Path(folder))
        seconds = measure({name: arms[name] for name in args.arms if name in arms}, args.rounds)
        launched, failure = {}, None
        try:
            launched = {count: launches(arms[documents_arm(count)]) for count in DOCUMENTS}
        except Exception as error:  # whatever it is, the times that were measured go into the record
            failure = f"{type(error).__name__}: {error}"
    text = report(args, seconds, parameters, without_fp8, launched)
    if failure is not None:
        text += f"\nLaunches were not counted: {failure}\n"
    sys.stdout.write(text)
    if args.record is not None:
        raw = {"arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": seconds, "launches": launched}
        record(args.record, "step", title="Training step", text=text, raw=raw)
    one, many = (launched.get(count, 0) for count in DOCUMENTS)
    return 0 if one and many <= MORE_LAUNCHES * one else 1


if __name__ == "__main__":
    sys.exit(main())
