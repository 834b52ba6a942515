"""``remit evaluate MODEL… --suite NAME`` and ``remit evaluate compare A B …``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from remit_megatron.runtime import launch
from remit_megatron.runtime.errors import EXIT_DONE, UserError
from remit_megatron.runtime.extras import require

_COMPARE = "compare"


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit evaluate``."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="[NAME=]DIR: a Hugging Face directory, a run, or a checkpoint; or `compare` and then [NAME=]DIR[,DIR…], "
        "outputs of this command: the first is compared with each of the others, several of one side are seeds",
    )
    parser.add_argument("--suite", metavar="S", help="a suite's name (pretrain10, …), a file, or one lm-eval task")
    parser.add_argument("--output", metavar="DIR", help="where results go; the same command again goes on there")
    parser.add_argument("--data", metavar="DIR", help="local files: DIR/TASK/SPLIT.jsonl; nothing is fetched then")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task (and subtask)")
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf", help="what runs the model (default: hf)")
    parser.add_argument("--batch-size", default="auto", metavar="N", help="items at once (default: auto)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the model's own)")
    parser.add_argument("--max-length", type=int, metavar="N", help="positions to use (default: the model's own)")
    parser.add_argument(
        "--model-arg", action="append", default=[], metavar="A=B", help="argument of lm-eval's model class"
    )
    parser.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="processes that share the items (one per GPU)"
    )
    parser.add_argument("--chat-template", choices=("suite", "yes", "no"), default="suite", help="(default: suite)")
    parser.add_argument("--allow-code", action="store_true", help="run tasks that execute what the model writes")
    parser.add_argument("--cache", metavar="DIR", help="answers and exported models (default: OUTPUT/cache)")
    parser.add_argument("--keep-exported", action="store_true", help="keep exported models in the cache")


def run_evaluate(args: argparse.Namespace) -> int:
    """Runs ``remit evaluate``; returns the exit code."""
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError("--output", f"{args.output} (a file)", "a directory")
    if args.models[0] == _COMPARE:
        return _compare(args)
    if not args.suite:
        raise UserError("--suite", "nothing", "a suite's name, a file, or one lm-eval task")
    if not args.output:
        raise UserError("--output", "nothing", "a directory for the results")
    for name in ("limit", "max_length", "nproc"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}", value, "1 or more")
    data = Path(args.data) if args.data else None
    if data and not data.is_dir():
        raise UserError("--data", data, "a directory")
    _before_imports(offline=data is not None)

    from remit_megatron.evaluation import lm, results, runner
    from remit_megatron.evaluation.models import find_models, forget_export, hugging_face_directory
    from remit_megatron.evaluation.suites import load_suite

    pairs = [word.partition("=") for word in args.model_arg]
    if wrong := [word for word, (_, equals, _) in zip(args.model_arg, pairs, strict=True) if not equals]:
        raise UserError("--model-arg", wrong[0], "NAME=VALUE")
    backend = lm.Backend(
        name=args.backend,
        batch_size=args.batch_size,
        dtype=args.dtype,
        max_length=args.max_length,
        arguments=tuple((name, value) for name, _, value in pairs),
        nproc=args.nproc,
    )
    lm.check_backend(backend)
    suite = load_suite(args.suite)
    models = find_models(args.models)
    output = Path(args.output)
    request = runner.Request(
        suite=suite,
        output=output,
        cache=Path(args.cache) if args.cache else output / "cache",
        backend=backend,
        data=data,
        limit=args.limit,
        chat={"suite": None, "yes": True, "no": False}[args.chat_template],
        allow_code=args.allow_code,
        keep_exported=args.keep_exported,
    )
    ready = runner.prepare(request, models)
    if args.nproc > 1 and args.backend == "hf" and not launch.under_launcher():
        for model in models:
            hugging_face_directory(model, request.cache / "exported")
        code = launch.launch(args.nproc, _same_command(args))
        if code:
            return code
        for model in models if not args.keep_exported else []:
            forget_export(model, request.cache / "exported")
    else:
        runner.evaluate(request, ready, models)
        _leave_together()
    if int(os.environ.get("RANK", "0")) == 0 and not launch.under_launcher():
        print((output / results.TABLE).read_text(encoding="utf-8"), end="")
    return EXIT_DONE


def _leave_together() -> None:
    """Ends the process group that accelerate has made: its threads, left to the end of the interpreter, can abort it
    when another process has gone first."""
    from torch import distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _same_command(args: argparse.Namespace) -> list[str]:
    """The command line once more, for the processes that share the work."""
    words = ["evaluate", *args.models]
    for name in (
        "suite",
        "output",
        "data",
        "limit",
        "backend",
        "batch_size",
        "dtype",
        "max_length",
        "chat_template",
        "cache",
    ):
        value = getattr(args, name)
        words += [f"--{name.replace('_', '-')}={value}"] if value is not None else []
    words += [f"--model-arg={word}" for word in args.model_arg]
    words += ["--allow-code"] if args.allow_code else []
    return [*words, "--keep-exported", f"--nproc={args.nproc}"]


def _before_imports(*, offline: bool) -> None:
    """What the libraries read when they are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def _compare(args: argparse.Namespace) -> int:
    for name in ("suite", "data", "limit"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}", getattr(args, name), "nothing: compare takes results as they are")
    require("scipy", "statsmodels", field="remit evaluate compare")
    from remit_megatron.evaluation import compare

    sides = compare.find_sides(args.models[1:])
    text = compare.compare(sides, output=Path(args.output) if args.output else None)
    print(text, end="")
    return EXIT_DONE
