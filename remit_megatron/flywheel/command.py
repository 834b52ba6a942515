"""``remit quickstart``."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import write_atomic

_RECORD = "quickstart.json"


def add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit quickstart``."""
    parser.add_argument(
        "--output", default="runs/quickstart", metavar="DIR", help="where everything goes (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="shorter trainings: half of the time, noisier figures")
    parser.add_argument("--seed", type=int, default=1234, help="of the text, the weights and the order of the data")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs so many seeds, from --seed on, and gives their spread"
    )
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier quickstart left in DIR")
    # For tests of the whole chain; smaller is not more instructive.
    parser.add_argument("--steps", type=int, default=None, help=argparse.SUPPRESS)


def run_quickstart(args: argparse.Namespace) -> int:
    """Runs ``remit quickstart``; returns the exit code."""
    from remit_megatron.runtime import warm

    warm.prepare()  # before torch comes
    from remit_megatron.flywheel.quickstart import FULL, QUICK, Quickstart
    from remit_megatron.flywheel.toy_chain import Lengths

    output = Path(args.output)
    for field, value in (("--seed", args.seed), ("--seeds", args.seeds)):
        if value < 1:
            raise UserError(field, value, "1 or more")
    if output.exists() and not output.is_dir():
        raise UserError("--output", f"{output} (a file)", "a directory")
    if args.fresh and output.exists():
        if not (output / _RECORD).exists():
            raise UserError("--output", f"{output}, which is not a quickstart's", "a directory that --fresh may remove")
        shutil.rmtree(output)
    lengths = QUICK if args.quick else FULL
    documents = {}
    if args.steps is not None:
        lengths, documents = Lengths(args.steps, args.steps, args.steps, args.steps, args.steps), {"documents": 2_000}
    output.mkdir(parents=True, exist_ok=True)
    settings, record = (
        {"seed": args.seed, "seeds": args.seeds, "lengths": asdict(lengths), **documents},
        output / _RECORD,
    )
    if record.exists() and json.loads(record.read_text()) != settings:
        raise UserError("--output", f"{output}, made with other settings", "another directory, or --fresh")
    write_atomic(record, json.dumps(settings) + "\n")
    return Quickstart(output, lengths, tuple(range(args.seed, args.seed + args.seeds)), **documents).run()
