"""How a stage's command is started: the seam that a warmer way of starting can take the place of.

``Start`` is called with the words behind ``remit``, the number of ranks and the file for all output, and returns the
exit code. Signals that reach this process are passed on, so that a run saves before it leaves.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from remit_megatron.runtime import stop

# words behind `remit`, ranks (None: the command's own default), file that receives standard output and error.
Start = Callable[[list[str], int | None, Path], int]

# In the environment of everything a stage starts: its directory, behind those of flywheels around this one.
MARK = "REMIT_FLYWHEEL_STAGE"
# What stands before `remit` where a batch script has one task per GPU (scripts/slurm/flywheel_step.sbatch).
LAUNCHER = "REMIT_FLYWHEEL_LAUNCHER"
# Commands that start their ranks on one node by themselves, also there.
_ONE_TASK = ("posttrain", "evaluate")
_GRACE_SECONDS = 60.0
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(words: list[str], nproc: int | None, log: Path) -> int:
    """Runs ``remit words…`` in a process of its own, which starts its ranks by itself (``--nproc``).

    Returns:
        Its exit code; 128 + number where a signal ended it.
    """
    *launcher, remit = shlex.split(os.environ.get(LAUNCHER, "")) or [""]
    ranks = ["--nproc", str(nproc)] if nproc is not None and nproc > 1 else []
    if launcher and nproc is not None and words[0] in _ONE_TASK:
        return run_program([*launcher, "--nodes=1", "--ntasks=1", remit, *words, *ranks], log)
    if launcher and nproc is not None:
        return run_program([*launcher, remit, *words], log, keep=True)
    return run_program([sys.executable, "-m", "remit_megatron", *words, *ranks], log)


def run_program(words: list[str], log: Path, *, keep: bool = False) -> int:
    """Runs a program; its output is added to ``log``, in whose directory the stage is.

    Args:
        keep: leave the variables of a launcher in its environment.

    Returns:
        Its exit code; 127 where there is no such program.
    """
    environment = {name: value for name, value in os.environ.items() if keep or name not in _LAUNCHED}
    marks = [*os.environ.get(MARK, "").split(os.pathsep), str(log.parent.absolute())]
    environment[MARK] = os.pathsep.join(mark for mark in marks if mark)
    with open(log, "ab") as file, _Passing() as passing:
        file.write(f"$ {shlex.join(words)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it once, through what passes signals on
            )
        except OSError as error:
            file.write(f"error: {words[0]}: {error.strerror}\n".encode())
            return 127
        code = passing.wait(process)
    return 128 - code if code < 0 else code


def _signals() -> tuple[signal.Signals, ...]:
    return (signal.SIGINT, signal.SIGUSR1, *stop.stop_signals())


class _Passing:
    """Passes this process's signals on to one that it starts, and calls the handlers that were there before.

    It listens before the process exists: a signal of that moment is passed on as soon as it does.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._early: list[int] = []
        self._before: dict[int, Any] = {}

    def wait(self, process: subprocess.Popen) -> int:
        """Until the process has ended; its return code."""
        self._process = process
        while self._early:
            process.send_signal(self._early.pop())
        return process.wait()

    def __enter__(self) -> _Passing:
        for number in _signals():
            self._before[number] = signal.signal(number, self._pass)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass(self, number: int, frame: FrameType | None) -> None:
        # A terminal that is gone is none of its, which has a session of its own.
        passed = signal.SIGTERM if number == signal.SIGHUP else number
        if self._process is None:
            self._early.append(passed)
        else:
            self._process.send_signal(passed)  # does nothing where it has ended
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)


class Stopping:
    """Whether somebody has asked this process to stop; a context manager that listens."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._listening = contextlib.ExitStack()

    def __enter__(self) -> Stopping:
        self._listening.enter_context(stop.handled_by(dict.fromkeys(_signals(), self._note)))
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = number


def end_leftovers(directory: Path, *, grace: float = _GRACE_SECONDS) -> int:
    """Ends what an earlier start of a stage has left running on this host: a flywheel that is killed cannot.

    Each gets SIGTERM, on which a run saves, and SIGKILL after ``grace`` seconds.

    Returns:
        How many there were.
    """
    first = found = _marked(directory)
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while (found := _marked(directory)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not found:
            break
    return len(first)


def _marked(directory: Path) -> list[int]:
    """Processes of this host in whose environment a stage's directory is."""
    wanted = f"{MARK}=".encode()
    own, found = str(directory.absolute()).encode(), []
    for place in Path("/proc").iterdir():
        if not place.name.isdigit() or int(place.name) == os.getpid():
            continue
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or somebody else's
            continue
        marks = next((item[len(wanted) :] for item in variables if item.startswith(wanted)), b"")
        if own in marks.split(os.pathsep.encode()):
            found.append(int(place.name))
    return found
