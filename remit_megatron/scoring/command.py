"""``remit score`` fills the reference score cache of a run's data; ``remit logprobs`` scores the texts of a file.

Forward only; any number of ranks, and of scoring jobs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from remit_megatron.conversion.source import ModelSource, resolve
from remit_megatron.data.blend import BlendedDataset
from remit_megatron.data.shuffle import stream_key
from remit_megatron.reference.score_work import CorpusWork, RunWork
from remit_megatron.run.configuration import RunConfig, load_config
from remit_megatron.run.prepare import Prepared, prepare
from remit_megatron.run.samples import open_datasets
from remit_megatron.run.score_cache import open_cache
from remit_megatron.runtime import launch, parallel
from remit_megatron.runtime.errors import EXIT_DONE, UserError
from remit_megatron.runtime.extras import require

# Beginnings of Megatron's arguments that belong to training; a job that only runs forward has none of them.
_TRAINING = (
    "accumulate_allreduce", "adam", "align_", "async_", "check_for_nan", "check_weight_hash", "ckpt_", "clip_grad",
    "data_parallel", "ddp_", "decoupled_", "defer_embedding", "delay_wgrad", "end_weight_decay", "eval_", "exit_",
    "exp_avg", "first_last_layers", "fp4", "fp8", "global_batch_size", "grad_reduce", "gradient_", "hysteresis",
    "initial_loss_scale", "keep_fp8", "lion_", "loss_scale", "lr", "main_", "micro_batch_size", "min_loss_scale",
    "min_lr", "muon_", "num_distributed_optimizer", "optimizer", "overlap_cpu", "overlap_grad", "overlap_param",
    "rampup_batch_size", "recompute", "rerun_", "reuse_grad", "save", "sgd_", "start_weight_decay", "train_",
    "use_distributed", "use_precision_aware", "weight_decay", "wgrad_",
)  # fmt: skip
# A rank that is done waits for the others, and these perhaps for the lease of a job that was killed.
_TIMEOUT_MINUTES = 30


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit score``."""
    parser.add_argument("config", metavar="CONFIG", help="run configuration (YAML), with reference.cache_dir")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace the file's")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="start N ranks on this machine (default: 1)")
    parser.add_argument("--all", action="store_true", help="score the data sets whole, not only what the run reads")
    parser.add_argument("--check", action="store_true", help="first read every score and mark damaged ones as missing")
    parser.add_argument("--follow", metavar="RUN", help="score ahead of the run in this directory, in its order")
    parser.add_argument(
        "--verify", type=int, nargs="?", const=64, metavar="N", help="score N random samples again (64) and compare"
    )


def run_score(args: argparse.Namespace) -> int:
    """Runs ``remit score``; returns the exit code."""
    if args.verify is not None and args.verify < 1:
        raise UserError("--verify", args.verify, "1 sample or more")
    config = load_config(args.config, args.overrides)
    if args.nproc > 1 and not launch.under_launcher():
        command = ["score", args.config, *args.overrides, *(["--all"] if args.all else [])]
        command += ["--check"] if args.check else []
        command += ["--follow", args.follow] if args.follow else []
        command += ["--verify", str(args.verify)] if args.verify else []
        prepare_scoring(config, world_size=args.nproc)  # a mistake is found once, before ranks are started
        return launch.launch(args.nproc, command)
    return score(config, whole=args.all, check=args.check, follow=args.follow, verify=args.verify)


def score(
    config: RunConfig,
    *,
    whole: bool = False,
    check: bool = False,
    follow: str | Path | None = None,
    verify: int | None = None,
) -> int:
    """Scores on this rank (start it on all ranks of the job). Returns the exit code.

    Args:
        config: the run; ``reference`` and ``data`` say what is scored with what, ``megatron`` the layout.
        whole: all samples of the data sets, not only those that the run reads.
        check: read every score first; damaged ones are computed again.
        follow: directory of a run, to be scored ahead of.
        verify: score so many random samples again and compare, in place of scoring.

    Raises:
        UserError: the input is wrong; or ``verify`` found other scores.
    """
    environment = parallel.rank_environment()
    prepared = prepare_scoring(config, world_size=environment.world_size, rank=environment.rank)
    arguments = prepared.arguments
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.scoring.job import ScoringJob

    with process_groups(**forward_layout(arguments)) as groups:
        blend: Any = None
        for turn in (environment.rank == 0, environment.rank != 0):
            with parallel.same_fate("opening the data"):
                if turn:
                    blend, _ = open_datasets(prepared, run_samples(config, whole=whole))
        cache = open_cache(prepared, blend, rank=environment.rank, create=verify is None)
        needed = [np.arange(len(dataset)) for dataset in blend.datasets]
        if not whole:
            needed = blend.samples_between(0, len(blend))
        job = ScoringJob(prepared, blend, cache, groups, needed=needed)
        if verify is not None:
            return job.verify(verify)
        if check:
            job.repair()
        if follow is not None:
            work = _followed_work(config, blend, Path(follow), sequence_length=arguments.seq_length)
        else:
            work = partial(CorpusWork, job.names, needed, sequence_length=arguments.seq_length)
        return job.fill(work)


def prepare_scoring(config: RunConfig, *, world_size: int, rank: int = 0) -> Prepared:
    """`prepare` for a job that only runs the reference: any number of ranks, its own micro-batch.

    Raises:
        UserError: the first thing that is wrong.
    """
    if config.reference is not None and not config.reference.cache_dir:
        raise UserError("reference.cache_dir", "nothing", "the directory that receives the scores")
    # Every token is scored: another run may mask others.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mask_eod_loss=False))
    return prepare_forward(config, world_size=world_size, rank=rank)


def forward_layout(arguments: argparse.Namespace) -> dict[str, Any]:
    """What :func:`remit_megatron.conversion.processes.process_groups` takes, of a run's arguments."""
    return dict(
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=arguments.virtual_pipeline_model_parallel_size,
        context_parallel_size=arguments.context_parallel_size,
        timeout_minutes=max(arguments.distributed_timeout_minutes, _TIMEOUT_MINUTES),
    )


def prepare_forward(config: RunConfig, *, world_size: int, rank: int = 0) -> Prepared:
    """`prepare` for a job that trains nothing: any number of ranks, the reference's own micro-batch.

    Raises:
        UserError: the first thing that is wrong.
    """
    import patches

    patches.apply()
    from remit_megatron.run.megatron_args import read_overrides

    settings = config.reference
    if settings is None:
        raise UserError("reference.checkpoint", "nothing", "the model that scores")
    chosen = read_overrides(config.megatron)
    kept = {name: value for name, value in chosen.items() if not name.startswith(_TRAINING)}
    kept |= {"train_iters": 1, "lr": 1.0, "min_lr": 0.0, "use_distributed_optimizer": False}
    kept["micro_batch_size"] = settings.micro_batch_size or chosen.get("micro_batch_size", 1)
    scoring = dataclasses.replace(
        config,
        megatron=kept,
        objective=dataclasses.replace(config.objective, name="remit", centering="sequence"),
        reference=dataclasses.replace(settings, micro_batch_size=None),
        data=dataclasses.replace(config.data, valid=[]),
    )
    return prepare(scoring, world_size=world_size, rank=rank)


def run_samples(config: RunConfig, *, whole: bool = False) -> int:
    """How many samples the run reads; the length of its blend.

    Raises:
        UserError: the configuration does not say it.
    """
    from remit_megatron.run.megatron_args import read_overrides

    chosen = read_overrides(config.megatron)
    if chosen.get("train_samples"):
        return chosen["train_samples"]
    if chosen.get("train_iters") and chosen.get("global_batch_size"):
        return chosen["train_iters"] * chosen["global_batch_size"]
    if whole:
        return 1
    name = "global_batch_size" if chosen.get("train_iters") else "train_iters"
    raise UserError(f"megatron.{name}", "nothing", "the run's, so that its samples are known; or --all")


def _followed_work(
    config: RunConfig, blend: BlendedDataset, run_dir: Path, *, sequence_length: int
) -> Callable[[], RunWork]:
    """The pieces of a run that is going on, checked to be of this configuration."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError("--follow", f"no {file}", "the directory of a run that has started")
    other = load_config(file)
    for name, ours, theirs in (
        ("seed", config.seed, other.seed),
        ("data.train", config.data.train, other.data.train),
        ("data.packing_seed", config.data.packing_seed, other.data.packing_seed),
        ("samples of the run", run_samples(config), run_samples(other)),
        ("reference.cache_dir", _cache_directory(config), _cache_directory(other)),
    ):
        if ours != theirs:
            raise UserError(f"--follow: {name}", theirs, f"{ours}, as in this configuration")
    key = stream_key("run", config.seed, json.dumps(config.data.train), config.data.packing_seed, run_samples(config))
    consumed = partial(_consumed, run_dir, sequence_length)
    return partial(RunWork, blend, f"run{key:x}", sequence_length=sequence_length, consumed=consumed)


def _cache_directory(config: RunConfig) -> Path | None:
    settings = config.reference
    return None if settings is None or not settings.cache_dir else Path(settings.cache_dir).resolve()


def _consumed(run_dir: Path, sequence_length: int) -> int:
    """Samples that a run has trained on, from the last whole line of its metrics."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 65536))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["consumed_tokens"] // sequence_length
    except (OSError, IndexError, ValueError, KeyError):
        return 0


def add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit check reference``."""
    parser.add_argument("config", metavar="CONFIG", help="run configuration (YAML): init, reference, data, evaluation")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace the file's")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="start N ranks on this machine (default: 1)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="sequences of held-out text (default: 64)")
    parser.add_argument("--output", metavar="F.json", help="file that receives all figures")


def run_reference(args: argparse.Namespace) -> int:
    """Runs ``remit check reference``; returns the exit code."""
    if args.samples < 1:
        raise UserError("--samples", args.samples, "1 or more")
    if args.output:
        _check_output(args.output)
    require("scipy", field="remit check reference")
    config = load_config(args.config, args.overrides)
    if args.nproc > 1 and not launch.under_launcher():
        command = ["check", "reference", args.config, *args.overrides, "--samples", str(args.samples)]
        return launch.launch(args.nproc, command + (["--output", args.output] if args.output else []))
    import patches

    patches.apply()
    from remit_megatron.scoring.check_reference import check_reference

    return check_reference(config, samples=args.samples, output=args.output)


def _check_output(name: str) -> None:
    output = Path(name).absolute()
    if output.is_dir() or not output.parent.is_dir():
        found = f"{output} (a directory)" if output.is_dir() else f"no directory {output.parent}"
        raise UserError("--output", found, "a file in a directory that exists")


def add_logprobs_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit logprobs``."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--checkpoint", metavar="CKPT", help="a checkpoint, or a run directory (its newest complete one)"
    )
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face directory")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="a second model (checkpoint, run, or Hugging Face directory): its log-probabilities, and "
        "KL(reference || model) over the vocabulary, beside the first one's",
    )
    parser.add_argument(
        "--input", required=True, metavar="F.jsonl", help='one {"text": ...} per line; also .gz and .zst'
    )
    parser.add_argument("--output", required=True, metavar="F.jsonl", help="one line per input line, in order")
    parser.add_argument("--nproc", type=int, metavar="N", help="local ranks (default: TP x PP)")
    parser.add_argument("--tp", type=int, default=1, metavar="T", help="tensor-parallel size (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="P", help="pipeline-parallel size (default: 1)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the computation (default: fp32)")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="of a microbatch (default: 8192)")


def run_logprobs(args: argparse.Namespace) -> int:
    """Scores a file; starts local ranks where more than one is asked for and no launcher has."""
    for name in ("tp", "pp", "nproc", "batch_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}", value, "at least 1")
    ranks = args.nproc or args.tp * args.pp
    if ranks % (args.tp * args.pp):
        raise UserError("--nproc", ranks, f"a multiple of TP x PP = {args.tp * args.pp}")
    if not Path(args.input).is_file():
        raise UserError("--input", f"no file {args.input}", 'a JSONL file with {"text": ...} lines')
    _check_output(args.output)
    if Path(args.output).exists() and Path(args.output).samefile(args.input):
        raise UserError("--output", f"{args.output}, the texts themselves", "another file than --input")
    source = _model(args)
    reference = resolve(args.reference, field="--reference") if args.reference else None
    if reference is not None and reference.tokenizer is None:
        raise UserError("--reference", f"no tokenizer in {reference.hf_files}", "tokenizer.json beside config.json")
    if ranks > 1 and not launch.under_launcher():
        return launch.launch(ranks, _logprobs_command(args))
    import patches

    patches.apply()
    from remit_megatron.scoring.logprobs import score_file

    score_file(
        source,
        args.input,
        args.output,
        reference=reference,
        tp=args.tp,
        pp=args.pp,
        dtype=args.dtype,
        batch_tokens=args.batch_tokens,
    )
    return EXIT_DONE


def _model(args: argparse.Namespace) -> ModelSource:
    option, path, kind = (
        ("--hf", args.hf, "huggingface") if args.hf else ("--checkpoint", args.checkpoint, "checkpoint")
    )
    source = resolve(path, field=option)
    if source.kind != kind:
        other = "--checkpoint" if args.hf else "--hf"
        raise UserError(
            option, f"{source.path}, a {source.kind} directory", f"a {kind} directory, or the option {other}"
        )
    if source.tokenizer is None:
        raise UserError(option, f"no tokenizer in {source.hf_files}", "tokenizer.json beside config.json")
    return source


def _logprobs_command(args: argparse.Namespace) -> list[str]:
    model = ["--hf", args.hf] if args.hf else ["--checkpoint", args.checkpoint]
    options = {"input": args.input, "output": args.output, "tp": args.tp, "pp": args.pp, "dtype": args.dtype}
    options["batch-tokens"] = args.batch_tokens
    options |= {"reference": args.reference} if args.reference else {}
    return ["logprobs", *model, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
