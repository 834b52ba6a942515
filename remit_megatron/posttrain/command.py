"""``remit posttrain sft | dpo | rlvr``, and ``lines`` for data that was published."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from remit_megatron.posttrain.configuration import STAGES, PosttrainSettings, load_settings
from remit_megatron.runtime import launch
from remit_megatron.runtime.errors import EXIT_DONE, UserError
from remit_megatron.runtime.extras import require


def add_sft_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit posttrain sft``."""
    _add_arguments(parser)


def add_dpo_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit posttrain dpo``."""
    _add_arguments(parser)


def add_rlvr_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit posttrain rlvr``."""
    _add_arguments(parser)


def add_lines_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit posttrain lines``."""
    parser.add_argument("stage", choices=STAGES, help="what the lines are for")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="Parquet or JSON lines: files, patterns, folders"
    )
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="receives the lines")
    parser.add_argument(
        "--leave-out", action="store_true", help="leave out and count records that cannot be a line (default: refuse)"
    )


def run_lines(args: argparse.Namespace) -> int:
    """Runs ``remit posttrain lines``; returns the exit code."""
    from remit_megatron.posttrain.published import convert

    result = convert(args.input, Path(args.output), stage=args.stage, leave_out=args.leave_out)
    verifiers = ", ".join(f"{count:,} {name}" for name, count in sorted(result.verifiers.items()))
    sys.stdout.write(f"{args.output}: {result.written:,} lines{f' ({verifiers})' if verifiers else ''}\n")
    for reason, count in result.left_out.most_common():
        sys.stdout.write(f"left out: {count:,} records, the first {result.first[reason]}\n")
    return EXIT_DONE


def run_sft(args: argparse.Namespace) -> int:
    """Runs ``remit posttrain sft``; returns the exit code."""
    return _run("sft", args)


def run_dpo(args: argparse.Namespace) -> int:
    """Runs ``remit posttrain dpo``; returns the exit code."""
    return _run("dpo", args)


def run_rlvr(args: argparse.Namespace) -> int:
    """Runs ``remit posttrain rlvr``; returns the exit code."""
    return _run("rlvr", args)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="configuration (YAML)")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace the file's")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="start N ranks on this machine (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the resolved configuration")


def _run(stage: str, args: argparse.Namespace) -> int:
    settings = load_settings(args.config, args.overrides, stage=stage)
    if args.nproc < 1 or (args.nproc > 1 and settings.engine != "trl"):
        raise UserError("--nproc", args.nproc, "at least 1" if args.nproc < 1 else "1: the engine starts its own ranks")
    if settings.engine == "command":
        from remit_megatron.posttrain import command_engine

        return command_engine.run(settings, dry_run=args.dry_run)
    if settings.engine == "nemo_rl":
        from remit_megatron.posttrain import nemo_rl

        return nemo_rl.run(settings, dry_run=args.dry_run)
    return _run_trl(settings, args)


def _run_trl(settings: PosttrainSettings, args: argparse.Namespace) -> int:
    require("trl", field="engine trl")
    from remit_megatron.posttrain import trl_engine

    if args.nproc > 1 and not launch.under_launcher():
        words = ["posttrain", settings.stage, args.config, *args.overrides, *(["--dry-run"] if args.dry_run else [])]
        return launch.launch(args.nproc, words)
    if args.dry_run:
        text = trl_engine.describe(settings)
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.write(text)
        return EXIT_DONE
    return trl_engine.run(settings)
