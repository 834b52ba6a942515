"""What a process does with signals: stops at a good moment, and says where it stands.

SIGTERM and SIGUSR2 ask a command to stop, and so does SIGHUP, a terminal that is gone, unless the process was started
to outlive it (nohup). While a run trains, Megatron's own handler notes that and the step is finished and saved. Before
that, while it is set up, there is nothing to save: :class:`StopInSetUp` leaves with exit code 75. Whoever handles the
signals afterwards takes them over with :func:`handled_by`, so that at no moment nobody does. Between the two ranks
:func:`hold` what comes until all of them know of it (`parallel.leave_set_up_together`): one that left alone would leave
the others in a collective. A command that goes on nowhere cleans up behind itself and leaves, also with 75.
SIGQUIT writes the stacks of all threads to standard error and the process goes on (``kill -QUIT PID``).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from remit_megatron.runtime import first_signals
from remit_megatron.runtime.errors import EXIT_START_ME_AGAIN

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
_LEAVE_SECONDS = 5.0
_FINISH_SECONDS = 20.0  # for ranks that wait for each other, and for cleaning up
_PR_SET_PDEATHSIG = 1
_LAUNCHER = "REMIT_LAUNCHER_PID"
_in_set_up: StopInSetUp | None = None
_leave = os._exit

Handler = Callable[[int, FrameType | None], Any]


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask this process to stop.

    SIGTERM and SIGUSR2 are among them also where the process was started with those ignored, as shells and supervisors
    do; SIGHUP is not where it was ignored.
    """
    hang_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGUSR2, *hang_up)


def in_set_up() -> bool:
    """Whether a stop signal ends this process with exit code 75: its command goes on when it is started again."""
    return _in_set_up is not None and _in_set_up.active


@contextlib.contextmanager
def handled_by(handlers: Mapping[signal.Signals, Handler], *, to_the_end: bool = False) -> Iterator[None]:
    """The set-up is over: from here on these handle the signals, also those that were held.

    Afterwards a stop signal ends the program at once, with 75, unless it only ends anyway. What is a part of another
    process gets the handlers of before the set-up.

    Args:
        handlers: of each signal.
        to_the_end: afterwards the program only ends, with an exit code that stands: stop signals change nothing then.
    """
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    released = {} if _in_set_up is None else _in_set_up.release()
    held = None if _in_set_up is None else _in_set_up.take_held()
    if held is not None:
        os.kill(os.getpid(), held)
    try:
        yield
    finally:
        for number, handler in before.items():
            after: Any = released.get(number, handler)
            if released and first_signals.is_program and number in STOP_SIGNALS:
                assert _in_set_up is not None
                after = signal.SIG_IGN if to_the_end else _in_set_up.leave_at_the_end
            signal.signal(number, after)


def hold() -> None:
    """From here on a stop signal is noted, and handed to whoever takes over. Only a process that nobody takes over
    from, because it waits for ever, still leaves."""
    if _in_set_up is not None:
        _in_set_up.holding = True


def held(*, within: float = 0.0) -> int:
    """The stop signal that was noted, or that comes within so many seconds; 0 for none."""
    deadline = time.monotonic() + within
    while (number := 0 if _in_set_up is None else _in_set_up.held or 0) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    return number


def stopped_line(number: int) -> str:
    """What this command says when it is stopped before it has begun."""
    when = first_signals.STOPPED["train"][1] if _in_set_up is None else _in_set_up.when
    return first_signals.line(number, when)


def say_stopped(number: int) -> None:
    """One line on standard error: stopped in the set-up. Also out of a signal's handler."""
    line = stopped_line(number)
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except RuntimeError:  # the signal came in the middle of another line, and Python's streams are not entered twice
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
    except (OSError, ValueError):  # nobody listens any more
        pass


def launcher_environment() -> dict[str, str]:
    """What :func:`follow_launcher` needs to know, for the environment of ranks that this process starts."""
    return {_LAUNCHER: str(os.getpid())}


def follow_launcher() -> None:
    """A rank whose launcher is killed is asked to stop. It would go on alone, and hold the directory of the run."""
    launcher = os.environ.pop(_LAUNCHER, None)  # what this process starts has another parent
    if launcher is None or not launcher.isdecimal():
        return
    with contextlib.suppress(OSError, AttributeError):  # a system other than Linux
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        os.kill(int(launcher), 0)
    except ProcessLookupError:  # it was killed before this
        os.kill(os.getpid(), signal.SIGTERM)
    except PermissionError:
        pass


def write_stacks_when_asked() -> None:
    """On SIGQUIT, and on a crash (SIGSEGV, SIGABRT of NCCL's watchdog), the stacks of all threads go to standard error.

    The interpreter is not needed for it: a process that hangs inside of a library answers, too.
    """
    stream = sys.__stderr__
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a standard error that is no file
        faulthandler.enable(stream)
        faulthandler.register(signal.SIGQUIT, stream, all_threads=True)


class Stopped(BaseException):
    """A stop signal in a command that cleans up behind itself; passes through ``except Exception`` on its way out.

    Args:
        number: the signal.
    """

    def __init__(self, number: int):
        self.number = number
        super().__init__(number)


class StopInSetUp:
    """While a run is set up, a stop signal ends this process with exit code 75: nothing is lost, start it again.

    A context manager, around a whole command; :func:`handled_by` ends it earlier. A process that waits for others
    inside of a library, where no Python runs, ends after ``leave_seconds``. In a thread that is not the main one it
    does nothing.

    Args:
        when: the rest of the line that says that it was stopped.
        cleans_up: :class:`Stopped` is raised in place of leaving, also on Ctrl-C: for a command that would leave
            something behind. Libraries that are being imported may swallow it; the process then ends as one that waits.
        leave_seconds: how long a process has that does not leave by itself. More (20 s) while signals are held, and
            for cleaning up.

    Attributes:
        when: as given.
        holding: stop signals are noted and not acted upon.
        held: the first that was noted.
    """

    def __init__(
        self,
        *,
        when: str = first_signals.STOPPED["train"][1],
        cleans_up: bool = False,
        leave_seconds: float = _LEAVE_SECONDS,
    ):
        self.when, self.holding, self.held = when, False, None
        self._cleans_up, self._leave_seconds = cleans_up, leave_seconds
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1
        self._stopping = False

    @property
    def active(self) -> bool:
        """Whether it is there and not released."""
        return self._pipe is not None

    def __enter__(self) -> StopInSetUp:
        if threading.current_thread() is not threading.main_thread():
            return self
        global _in_set_up
        _in_set_up = self
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        os.set_blocking(self._pipe[0], True)
        numbers = (*stop_signals(), *((signal.SIGINT,) if self._cleans_up else ()))
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._stop) for number in numbers}
        self._before = {number: first_signals.inherited(number, handler) for number, handler in before.items()}
        arguments = (self._pipe[0], {int(number) for number in numbers})
        threading.Thread(target=self._watch, args=arguments, daemon=True, name="stop in set-up").start()
        # Whoever started this process may have blocked them; what was sent meanwhile arrives now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()
        if threading.current_thread() is threading.main_thread() and first_signals.is_program:
            for number in self._before:  # the command is over, and its exit code stands
                signal.signal(number, signal.SIG_IGN)

    def release(self) -> dict[signal.Signals, Any]:
        """From here on stop signals are not ours. Those that nobody has taken over get the handlers that they had.

        Returns:
            The handlers that were there before, the first time; then nothing.
        """
        if self._pipe is None:
            return {}
        _, write = self._pipe
        self._pipe = None
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            if self._stopping or signal.getsignal(number) == self._stop:  # else somebody has taken it over
                signal.signal(number, handler)
        os.close(write)  # which ends the thread; it closes its own end
        return self._before

    def leave_at_the_end(self, number: int, _frame: FrameType | None) -> None:
        """The handler of what comes after a command's work, as long as it takes."""
        self.when = "at the end, nothing is lost; start it again"
        if first_signals.speaks():
            say_stopped(number)
        leave()

    def take_held(self) -> int | None:
        """What was noted, once."""
        held, self.held, self.holding = self.held, None, False
        return held

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.holding:
            self.held = self.held or number
            return
        if self._cleans_up:
            self._stopping = True
            for known in self._before:  # cleaning up is quick, and a second signal would cut it short
                signal.signal(known, signal.SIG_IGN)
            raise Stopped(number)
        if first_signals.speaks():
            say_stopped(number)
        leave()

    def _watch(self, read: int, watched: set[int]) -> None:
        try:
            while data := os.read(read, 64):
                if not (numbers := watched & set(data)):
                    continue
                time.sleep(self._leave_seconds)
                if self.holding or self._stopping:
                    time.sleep(max(0.0, _FINISH_SECONDS - self._leave_seconds))
                if self._pipe is not None:
                    if first_signals.speaks():
                        say_stopped(min(numbers))
                    os._exit(EXIT_START_ME_AGAIN)
        finally:
            os.close(read)


def leave() -> None:
    """Ends this process with exit code 75, at once. No exception: libraries that are being imported swallow those, and
    are half there afterwards; and at the end of the interpreter their threads can abort it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # as in say_stopped
            stream.flush()
    _leave(EXIT_START_ME_AGAIN)
