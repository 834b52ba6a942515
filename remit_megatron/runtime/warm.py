"""Commands in children of a process that has imported what they need.

Importing Megatron takes five seconds and TRL as long, every time ``python -m remit_megatron`` starts. A process that
imports once and forks a child for each command pays it once. The child is what a new interpreter would be after its
imports: the parent must not run a tensor operation, make a process group or touch a GPU, so that there is no thread
pool, lock or CUDA context to inherit.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from remit_megatron.runtime import first_signals

_PR_SET_PDEATHSIG = 1
_CRASH = 1
_GRACE_SECONDS = 20.0

Work = Callable[[], int | None]


def prepare() -> None:
    """Call it before torch, numpy and tokenizers are imported: no threads at import, and no GPU.

    A child cannot use CUDA once its parent has asked for it; what is started this way runs on the CPU.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("OPENBLAS", "MKL", "OMP"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def load(modules: Sequence[str]) -> None:
    """Imports what the commands of coming children need."""
    for module in modules:
        importlib.import_module(module)


def command(words: Sequence[object]) -> Work:
    """``remit WORDS``, as ``python -m remit_megatron`` runs it."""

    def work() -> int:
        sys.argv = ["remit", *map(str, words)]
        try:
            return importlib.import_module("remit_megatron.__main__").main()
        except SystemExit as stop:
            return _code(stop)
        finally:
            _as_at_the_start()  # a program ignores signals at its end; here other work may follow

    return work


def _as_at_the_start() -> None:
    first_signals.is_program = False
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def _code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    sys.stderr.write(f"{stop.code}\n")
    return _CRASH


class Child:
    """A forked process; its output goes to a file.

    Args:
        work: what it does. Its return value is the exit code, None is 0; an exception is a traceback and 1.
        log: receives what it writes; appended to.
        threads: of its tensor operations.

    Attributes:
        seconds: that it took; None while it runs.
    """

    def __init__(self, work: Work, log: Path, *, threads: int = 1):
        self.log = log
        self.seconds: float | None = None
        self._started = time.monotonic()
        self._code: int | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python counts the idle threads of imported libraries, which hold no lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            _in_child(work, log, threads)

    def poll(self) -> int | None:
        """The exit code, or None while it runs; 128 + number for a signal."""
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._finished(status)
        return self._code

    def wait(self) -> int:
        """Waits for its end; returns the exit code."""
        if self._code is None:
            self._finished(os.waitpid(self._pid, 0)[1])
        assert self._code is not None
        return self._code

    def stop(self) -> None:
        """SIGTERM, which lets a run save; after a grace time SIGKILL."""
        if self.poll() is not None:
            return
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while self.poll() is None:
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
                self.wait()
                return
            time.sleep(0.05)

    def _signal(self, number: int) -> None:
        # The group: a command may have started workers of its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, number)

    def _finished(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        self._code = 128 - code if code < 0 else code
        self.seconds = time.monotonic() - self._started


def _in_child(work: Work, log: Path, threads: int) -> None:
    """Does the work and ends this process, whatever happens; nothing of the parent's runs again."""
    code = _CRASH
    try:
        os.setsid()  # Ctrl-C reaches the parent, which passes it on
        _die_with_parent()
        _as_at_the_start()
        _redirect(log)
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(threads)
        code = work() or 0
    except SystemExit as stop:
        code = _code(stop)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _die_with_parent() -> None:
    """A parent that is killed takes its children with it; they would hold the directories that a new start needs."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went in between
        os._exit(_CRASH)


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, source in ((0, null), (1, file), (2, file)):
        os.dup2(source, number)
    os.close(file)
    os.close(null)
    # Under a test runner these are not the files above.
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), _writer(1), _writer(2)  # noqa: SIM115


def _writer(number: int):
    return open(number, "w", buffering=1, closefd=False)
