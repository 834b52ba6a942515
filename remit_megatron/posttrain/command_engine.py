"""``engine: command``: a program of yours does the work, and its exit code is the command's.

command:
  run: "swift rlhf --model {model_in} --dataset {data} --output_dir {work} …"
  format: swift          # of the files: lines (remit's own), swift, verl (Parquet)
  environment: {NAME: value}
"""

from __future__ import annotations

import os
import shlex
import signal
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from remit_megatron.posttrain import outside
from remit_megatron.posttrain.configuration import PosttrainSettings
from remit_megatron.posttrain.formats import write_format
from remit_megatron.runtime import stop
from remit_megatron.runtime.errors import EXIT_DONE, EXIT_START_ME_AGAIN, UserError, did_you_mean, show
from remit_megatron.runtime.locks import DirectoryLock

PLACES = ("model_in", "model_out", "data", "valid", "work", "run_dir", "seed", "stage", "chat_template")
_KEYS = ("run", "format", "environment")
_FORMS = ("lines", "swift", "verl")


def command_of(settings: PosttrainSettings, values: dict[str, str]) -> list[str]:
    """The words of the command, with its places filled in.

    Raises:
        UserError: no command, a key or a place that does not exist, or one that the configuration leaves empty.
    """
    for key, value in settings.command.items():
        if key not in _KEYS:
            raise UserError(f"command.{key}", show(value), f"one of {', '.join(_KEYS)}{did_you_mean(key, _KEYS)}")
    run = words_of(settings)
    for word in run:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(word) if name is not None]
        except ValueError as error:
            raise UserError("command.run", f"{word!r} ({error})", "{places}, and braces written twice") from None
        for name in names:
            if name not in PLACES:
                raise UserError("command.run", f"{{{name}}}", f"one of {', '.join(PLACES)}{did_you_mean(name, PLACES)}")
            if name not in values:
                raise UserError(
                    "command.run", f"{{{name}}}, which the configuration does not say", f"a value for {name}"
                )
    if not any("{model_out}" in word for word in run):
        raise UserError("command.run", "no {model_out}", "the place where the command writes its Hugging Face model")
    return [word.format_map(values) for word in run]


def words_of(settings: PosttrainSettings) -> list[str]:
    """The words of the command as they are written, with their places.

    Raises:
        UserError: ``command.run`` is no command line.
    """
    run = settings.command.get("run")
    if isinstance(run, str):
        try:
            run = shlex.split(run)
        except ValueError as error:
            raise UserError("command.run", f"{show(run)} ({error})", "words as a shell splits them") from None
    if not isinstance(run, list) or not run or not all(isinstance(word, str) for word in run):
        raise UserError("command.run", show(run), "a command line, or a list of its words")
    return run


def run(settings: PosttrainSettings, *, dry_run: bool = False) -> int:
    """Runs the command; returns its exit code, or 75 where a signal that was passed on to it has ended it.

    Raises:
        UserError: the configuration, the model or the data is wrong.
        DoNotRestart: the command has succeeded and written no model.
    """
    given, run_dir = outside.prepare(settings), Path(settings.run_dir)
    form = settings.command.get("format", "lines")
    if form not in _FORMS:
        raise UserError("command.format", show(form), f"one of {', '.join(_FORMS)}{did_you_mean(str(form), _FORMS)}")
    environment = settings.command.get("environment", {})
    if not isinstance(environment, dict) or not all(isinstance(value, str) for value in environment.values()):
        raise UserError("command.environment", show(environment), "names and texts")
    suffix = ".parquet" if form == "verl" else ".jsonl"
    files = {"data": run_dir / f"data/train{suffix}", "valid": run_dir / f"data/valid{suffix}"}
    values = {
        "model_in": str(given.source.path.absolute()),
        "model_out": str((run_dir / "output").absolute()),
        "data": str(files["data"].absolute()),
        "work": str((run_dir / "work").absolute()),
        "run_dir": str(run_dir.absolute()),
        "seed": str(settings.seed),
        "stage": settings.stage,
        **({"valid": str(files["valid"].absolute())} if given.valid else {}),
        **({"chat_template": str(Path(settings.chat_template).absolute())} if settings.chat_template else {}),
    }
    words = command_of(settings, values)
    if dry_run:
        sys.stdout.write(shlex.join(words) + "\n")
        return EXIT_DONE
    lock = DirectoryLock(run_dir)
    try:
        if outside.already_done(run_dir, given.identity):
            return EXIT_DONE
        outside.write_settings(run_dir, settings)
        for name, examples in (("data", given.train), ("valid", given.valid)):
            if examples:
                write_format(files[name], examples, form=form, stage=settings.stage, verifier=settings.verifier)
        (run_dir / "work").mkdir(exist_ok=True)
        code = _child(words, {**os.environ, **environment})
        if code == EXIT_DONE:
            outside.take_model(run_dir / "output", run_dir, given)
        return code
    finally:
        lock.release()


def _child(words: Sequence[str], environment: dict[str, str]) -> int:
    """Runs a command and passes signals on to it."""
    passed: list[int] = []
    process: subprocess.Popen | None = None

    def forward(number: int, _frame: FrameType | None) -> None:
        passed.append(number)
        if process is not None:  # else it is being made
            process.send_signal(number)

    with stop.handled_by(dict.fromkeys((signal.SIGUSR1, *stop.stop_signals()), forward)):
        try:
            process = subprocess.Popen(list(words), env=environment, stdin=subprocess.DEVNULL)
            if passed:
                process.send_signal(passed[0])
            code = process.wait()
        except OSError as error:
            raise UserError("command.run", f"{words[0]} ({error.strerror})", "a program that can be started") from None
        finally:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()
    if code < 0:
        return EXIT_START_ME_AGAIN if -code in passed else 128 - code
    return code
