"""The command line: ``remit COMMAND …``. Each command lives where its work is done; this file names them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from remit_megatron import __version__
from remit_megatron.runtime import first_signals
from remit_megatron.runtime.errors import (
    EXIT_BAD_INPUT,
    EXIT_DO_NOT_RESTART,
    EXIT_START_ME_AGAIN,
    DoNotRestart,
    StartAgain,
    UserError,
)
from remit_megatron.runtime.float32 import exact_float32
from remit_megatron.runtime.installed import BrokenInstallation, foreign_patches_line, say_once, use_own_patches
from remit_megatron.runtime.launcher_variables import check_variables
from remit_megatron.runtime.stop import StopInSetUp, Stopped, follow_launcher, leave, say_stopped

# command -> (room, one line for --help). What a command NAME takes and does is in the room's command.py:
# add_NAME_arguments and run_NAME.
_COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "versions, device, optional parts, patches, what would be used"),
    "quickstart": ("flywheel", "the whole method at toy size, in minutes, on two CPU cores"),
    "flywheel": ("flywheel", "rounds of training, post-training and evaluation, from one file"),
    "import": ("conversion", "Hugging Face model to a Megatron checkpoint"),
    "export": ("conversion", "Megatron checkpoint to a Hugging Face model"),
    "evaluate": ("evaluation", "benchmark suites on models, and comparisons of their results"),
    "logprobs": ("scoring", "log-probability of every token of a text, through Megatron"),
    "train": ("training", "mid-training"),
    "plan": ("cluster", "memory, time and layout of a run on a cluster, by arithmetic"),
    "status": ("cluster", "how a run is doing: progress, rate, time left, last checkpoint, faults"),
    "score": ("scoring", "the reference's score of every token of a run's data, into a cache"),
    "report": ("analysis", "one page about one or several runs, to look at"),
}
_DATA_COMMANDS: dict[str, tuple[str, str]] = {
    "build": ("data", "documents to token files"),
    "merge": ("data", "token files that were built side by side, as one"),
    "mix": ("data", "the sources of a recipe to token files and a blend for a run"),
    "select": ("data", "the samples of token files that are worth training on (MiniPLM)"),
}
_CHECK_COMMANDS: dict[str, tuple[str, str]] = {
    "reference": ("scoring", "whether a reference is ahead of the student, on held-out text and a suite"),
}
_ANALYZE_COMMANDS: dict[str, tuple[str, str]] = {
    "heatmap": ("analysis", "log p of the reference less log p of the student, on every token of a text"),
    "shift": ("analysis", "how far checkpoints' distributions are from each other and from the reference"),
    "kl": ("analysis", "KL divergence to the reference over the full vocabulary"),
    "weights": ("analysis", "which tokens weigh most, by text and by class, over checkpoints"),
    "gradients": ("analysis", "gradient norms of runs side by side"),
    "efficiency": ("analysis", "score against tokens and device hours, with the speed-up to a baseline's score"),
    "posttrain": ("analysis", "curves of post-training, seeds of an arm as one"),
}
_POSTTRAIN_COMMANDS: dict[str, tuple[str, str]] = {
    "sft": ("posttrain", "supervised fine-tuning"),
    "dpo": ("posttrain", "preferences between answers"),
    "rlvr": ("posttrain", "reinforcement learning with verifiable rewards (GRPO)"),
    "lines": ("posttrain", "published data in open-instruct's forms to the lines of a stage"),
}
# word -> (one line for --help, its commands).
_GROUPS: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "data": ("corpora to token files", _DATA_COMMANDS),
    "check": ("what is worth knowing before a run", _CHECK_COMMANDS),
    "analyze": ("real checkpoints, texts and runs to figures", _ANALYZE_COMMANDS),
    "posttrain": ("a model to a better one: by examples, preferences, verified rewards", _POSTTRAIN_COMMANDS),
}

# What somebody can mend outside the program; every other OSError is a fault and keeps its traceback.
_USER_ERRNOS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def _command(room: str, function: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"remit_megatron.{room}.command"), function)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, str, str]:
    """Arguments, room and run function of the command; imports only that room, so that --help stays quick."""
    parser = argparse.ArgumentParser(prog="remit", description="RL-guided mid-training (ReMiT) on Megatron-Core.")
    parser.add_argument("--version", action="version", version=f"remit {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    words = [word for word in argv if not word.startswith("-")][:2]

    def add(subparsers, name: str, command: tuple[str, str], wanted: bool) -> None:
        room, summary = command
        child = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        child.set_defaults(_room=room, _run=f"run_{name}")
        if wanted:
            _command(room, f"add_{name}_arguments")(child)

    for name, command in _COMMANDS.items():
        add(commands, name, command, words[:1] == [name])
    for group, (summary, members) in _GROUPS.items():
        children = commands.add_parser(group, help=summary).add_subparsers(metavar="COMMAND", required=True)
        for name, command in members.items():
            add(children, name, command, words == [group, name])
    namespace, rest = parser.parse_known_args(argv)
    # argparse takes a list of words only in one piece; `train CONFIG --nproc 2 a.b=c` has it in two.
    if rest and hasattr(namespace, "overrides") and not any(word.startswith("-") for word in rest):
        namespace.overrides = [*namespace.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return namespace, namespace._room, namespace._run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Wrong input is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A file's name may be any bytes: saying what was written must not fail after the work is done.
        sys.stdout.reconfigure(errors="backslashreplace")
    # The CUDA driver reads it when it starts, which the first question for a GPU may do: kernels of tensor and context
    # parallelism start in the order in which they were issued. Megatron demands it on GPUs before Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    exact_float32()
    try:
        # Before the imports, which take longest.
        with _stop(argv):
            follow_launcher()
            check_variables()
            namespace, room, run = _parse(argv)
            if room != "doctor":  # which reports it
                foreign = use_own_patches()
                if foreign:
                    say_once(foreign_patches_line(foreign))
            return _command(room, run)(namespace)
    except UserError as error:
        _one_line(str(error))
        return EXIT_BAD_INPUT
    except BrokenInstallation as error:
        _one_line(str(error))
        return EXIT_DO_NOT_RESTART
    except Stopped as stop:
        if first_signals.speaks():
            say_stopped(stop.number)
        leave()
        return EXIT_START_ME_AGAIN
    except StartAgain as stop:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(" ".join(str(stop).split()) + "\n")
        return EXIT_START_ME_AGAIN
    except DoNotRestart as failure:
        if failure.alone or os.environ.get("RANK", "0") == "0":
            _one_line(str(failure))
        return EXIT_DO_NOT_RESTART
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        _one_line(f"{error.filename or 'output'}: {error.strerror}")
        return EXIT_BAD_INPUT
    except Exception as error:
        if type(error).__name__ == "UnsupportedVersion":
            _one_line(str(error))
            return EXIT_DO_NOT_RESTART
        raise


def _stop(argv: Sequence[str]) -> contextlib.AbstractContextManager[Any]:
    """What stop signals do to a command until it does something else with them."""
    found = first_signals.STOPPED.get(argv[0]) if argv else None
    return contextlib.nullcontext() if found is None else StopInSetUp(cleans_up=found[0], when=found[1])


def _one_line(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(("" if rank == "0" else f"rank {rank}: ") + "error: " + " ".join(text.split()) + "\n")


if __name__ == "__main__":
    sys.exit(main())
