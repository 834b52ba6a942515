"""``remit posttrain sft | dpo | rlvr``."""

from __future__ import annotations

import argparse
import sys

from remit_megatron.posttrain.configuration import PosttrainSettings, load_settings
from remit_megatron.runtime import launch
from remit_megatron.runtime.errors import EXIT_DONE


def add_sft_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit posttrain sft``."""
    _add_arguments(parser)


def add_dpo_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit posttrain dpo``."""
    _add_arguments(parser)


def add_rlvr_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit posttrain rlvr``."""
    _add_arguments(parser)


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
    return _run_trl(settings, args)


def _run_trl(settings: PosttrainSettings, args: argparse.Namespace) -> int:
    from remit_megatron.posttrain import trl_engine

    if args.dry_run:
        sys.stdout.write(trl_engine.resolved(trl_engine.prepare(settings)))
        return EXIT_DONE
    if args.nproc > 1 and not launch.under_launcher():
        return launch.launch(args.nproc, ["posttrain", settings.stage, args.config, *args.overrides])
    return trl_engine.run(settings)
