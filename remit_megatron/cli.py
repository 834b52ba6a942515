"""The command line: ``remit COMMAND …``. Each command lives where its work is done; this file names them."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from remit_megatron import __version__
from remit_megatron.runtime.errors import (
    EXIT_BAD_INPUT,
    EXIT_DO_NOT_RESTART,
    EXIT_START_ME_AGAIN,
    StartAgain,
    UserError,
)

# command -> (room, one line for --help). What a command NAME takes and does is in the room's command.py:
# add_NAME_arguments and run_NAME.
_COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "versions, device, optional parts, patches, what would be used"),
    "quickstart": ("flywheel", "the whole method at toy size, in minutes, on two CPU cores"),
    "import": ("conversion", "Hugging Face model to a Megatron checkpoint"),
    "export": ("conversion", "Megatron checkpoint to a Hugging Face model"),
    "evaluate": ("evaluation", "benchmark suites on models, and comparisons of their results"),
    "logprobs": ("scoring", "log-probability of every token of a text, through Megatron"),
    "train": ("training", "mid-training"),
    "plan": ("cluster", "memory, time and layout of a run on a cluster, by arithmetic"),
    "score": ("scoring", "the reference's score of every token of a run's data, into a cache"),
}
_DATA_COMMANDS: dict[str, tuple[str, str]] = {
    "build": ("data", "documents to token files"),
    "mix": ("data", "the sources of a recipe to token files and a blend for a run"),
    "select": ("data", "the samples of token files that are worth training on (MiniPLM)"),
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
}


def _commands_of(room: str) -> ModuleType:
    return importlib.import_module(f"remit_megatron.{room}.command")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses ``argv``; imports only the room of the command that was asked for, so that --help stays quick."""
    parser = argparse.ArgumentParser(prog="remit", description="RL-guided mid-training (ReMiT) on Megatron-Core.")
    parser.add_argument("--version", action="version", version=f"remit {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    words = [word for word in argv if not word.startswith("-")][:2]

    def add(subparsers, name: str, command: tuple[str, str], wanted: bool) -> None:
        room, summary = command
        child = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        child.set_defaults(_room=room, _name=name)
        if wanted:
            getattr(_commands_of(room), f"add_{name}_arguments")(child)

    for name, command in _COMMANDS.items():
        add(commands, name, command, words[:1] == [name])
    data = commands.add_parser("data", help="corpora to token files").add_subparsers(metavar="COMMAND", required=True)
    for name, command in _DATA_COMMANDS.items():
        add(data, name, command, words == ["data", name])
    namespace, rest = parser.parse_known_args(argv)
    # argparse takes a list of words only in one piece; `train CONFIG --nproc 2 a.b=c` has it in two.
    if rest and hasattr(namespace, "overrides") and not any(word.startswith("-") for word in rest):
        namespace.overrides = [*namespace.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Wrong input is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        namespace = _parse(argv)
        return getattr(_commands_of(namespace._room), f"run_{namespace._name}")(namespace)
    except UserError as error:
        _one_line(str(error))
        return EXIT_BAD_INPUT
    except StartAgain as stop:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(" ".join(str(stop).split()) + "\n")
        return EXIT_START_ME_AGAIN
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


def _one_line(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(("" if rank == "0" else f"rank {rank}: ") + "error: " + " ".join(text.split()) + "\n")


if __name__ == "__main__":
    sys.exit(main())
