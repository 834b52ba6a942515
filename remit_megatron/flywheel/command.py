"""``remit quickstart`` and ``remit flywheel``."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from remit_megatron.runtime.errors import EXIT_DONE, UserError
from remit_megatron.runtime.extras import require
from remit_megatron.runtime.files import write_atomic

if TYPE_CHECKING:
    from remit_megatron.flywheel.plan import Plan

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

    require("trl", field="remit quickstart")
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


_ACTIONS = ("status", "explain", "step")


def add_flywheel_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``remit flywheel``."""
    parser.usage = "remit flywheel [status|explain|step] CONFIG [STAGE] [a.b=c ...] [options]"
    parser.add_argument("config", metavar="CONFIG", help="the flywheel (YAML); before it perhaps what to do with it:")
    parser.add_argument(
        "overrides",
        metavar="...",
        nargs="*",
        help="values that replace the file's; `status CONFIG`: how it stands; `explain CONFIG STAGE`: why a stage "
        "would run again; `step CONFIG STAGE`: runs exactly one",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, and print what would run")
    parser.add_argument("--slurm", action="store_true", help="submit the whole chain to Slurm instead of running it")
    parser.add_argument("--verify", action="store_true", help="compare what is done by content, not by size and time")
    parser.add_argument("--retry", action="store_true", help="also start stages again that ended with exit code 70")
    parser.add_argument("--json", action="store_true", help="status: for programs")
    parser.add_argument("--key", help=argparse.SUPPRESS)  # step: what the stage had when its job was submitted


def run_flywheel(args: argparse.Namespace) -> int:
    """Runs ``remit flywheel``; returns the exit code."""
    from remit_megatron.flywheel.plan import Plan

    words = [args.config, *args.overrides]
    action = words.pop(0) if words[0] in _ACTIONS else "run"
    if not words:
        raise UserError("CONFIG", "nothing", f"remit flywheel {action} CONFIG")
    path, rest = words[0], words[1:]
    name = ""
    if action in ("explain", "step"):
        if not rest or "=" in rest[0]:
            raise UserError("STAGE", "nothing", f"remit flywheel {action} CONFIG STAGE")
        name, rest = rest[0], rest[1:]
    _check_options(args, action)
    plan = Plan(path, rest)
    if action == "status":
        return _status(plan, as_json=args.json)
    if action == "explain":
        from remit_megatron.flywheel.state import explain

        print(explain(plan, name), end="")
        return EXIT_DONE
    if args.dry_run:
        from remit_megatron.flywheel.state import dry_run

        print(dry_run(plan, name or None), end="")
        return EXIT_DONE
    if args.slurm:
        from remit_megatron.flywheel.slurm import submit

        submit(plan, retry=args.retry)
        return EXIT_DONE
    from remit_megatron.flywheel.runner import Runner

    runner = Runner(plan, retry=args.retry, verify=args.verify)
    return runner.step(plan.chain.find(name), key=args.key) if action == "step" else runner.run()


def _check_options(args: argparse.Namespace, action: str) -> None:
    """Refuses options that an action would not do anything with."""
    fitting = {
        "dry_run": ("run", "step"),
        "slurm": ("run",),
        "verify": ("run", "step"),
        "retry": ("run", "step"),
        "json": ("status",),
        "key": ("step",),
    }
    for option, actions in fitting.items():
        if getattr(args, option) and action not in actions:
            expected = " or ".join(f"remit flywheel {one}".removesuffix(" run") for one in actions)
            raise UserError(f"--{option.replace('_', '-')}", f"with {action}", f"{expected}, which it is an option of")
    if args.slurm and args.verify:
        raise UserError("--verify", "with --slurm", "one of them")


def _status(plan: Plan, *, as_json: bool) -> int:
    from remit_megatron.flywheel.state import status, status_text

    print(json.dumps(status(plan), indent=1) if as_json else status_text(plan), end="\n" if as_json else "")
    return EXIT_DONE
