"""``remit doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from remit_megatron.doctor.report import examine, table
from remit_megatron.runtime.errors import EXIT_DO_NOT_RESTART, EXIT_DONE


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit doctor``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds a library may take to import"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--require-gpu", action="store_true", help="a machine without a GPU is a problem (cluster jobs)")
    group.add_argument(
        "--allow-no-gpu", action="store_true", help="libraries that need a GPU to import are no problem (image builds)"
    )


def run_doctor(args: argparse.Namespace) -> int:
    """Prints the report; 0 where training can work, else 70."""
    report = examine(timeout=args.timeout, allow_no_gpu=args.allow_no_gpu, require_gpu=args.require_gpu)
    text = json.dumps(dataclasses.asdict(report), indent=2) + "\n" if args.json else table(report)
    sys.stdout.write(text)
    return EXIT_DO_NOT_RESTART if report.problems else EXIT_DONE
