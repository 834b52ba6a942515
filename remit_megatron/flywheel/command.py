"""``remit quickstart``."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from remit_megatron.flywheel.quickstart import Quickstart, Scale
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import write_atomic


def add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit quickstart``."""
    parser.add_argument(
        "--output", default="runs/quickstart", metavar="DIR", help="where everything goes (default: %(default)s)"
    )
    parser.add_argument(
        "--nproc", type=int, default=Scale.nproc, metavar="N", help="ranks for mid-training (default: 2)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the text, the weights and the order of the data")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier quickstart left in DIR")
    # For tests of the whole chain; smaller is not more instructive.
    parser.add_argument("--steps", type=int, default=None, help=argparse.SUPPRESS)


def run_quickstart(args: argparse.Namespace) -> int:
    """Runs ``remit quickstart``; returns the exit code."""
    output = Path(args.output)
    if args.fresh and output.exists():
        if not (output / "quickstart.json").exists():
            raise UserError("--output", f"{output}, which is not a quickstart's", "a directory that --fresh may remove")
        shutil.rmtree(output)
    scale = Scale(nproc=args.nproc)
    if args.steps is not None:
        scale = Scale(2_000, args.steps, args.steps, args.steps, args.nproc)
    output.mkdir(parents=True, exist_ok=True)
    settings, record = {"seed": args.seed, "scale": scale.__dict__}, output / "quickstart.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        raise UserError("--output", f"{output}, made with other settings", "another directory, or --fresh")
    write_atomic(record, json.dumps(settings) + "\n")
    return Quickstart(output, scale, args.seed).run()
