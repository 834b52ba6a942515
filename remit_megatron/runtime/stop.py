"""What a rank does with signals: stops at a good moment, and says where it stands.

SIGTERM and SIGUSR2 ask a run to stop. While it trains, Megatron's own handler notes that and the step is finished and
saved. Before that, while a run is set up, there is nothing to save: :class:`StopInSetUp` leaves with exit code 75.
SIGQUIT writes the stacks of all threads to standard error and the process goes on (``kill -QUIT PID``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from remit_megatron.runtime.errors import EXIT_START_ME_AGAIN

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
_LEAVE_SECONDS = 20.0
_in_set_up: StopInSetUp | None = None
_leave = os._exit


def take_over() -> None:
    """The set-up is over: who calls this handles the stop signals, or leaves them as they were."""
    if _in_set_up is not None:
        _in_set_up.release()


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


class StopInSetUp:
    """While a run is set up, a stop signal ends this process with exit code 75: nothing is lost, start it again.

    A context manager, around a whole command; :func:`take_over` ends it earlier. A process that waits for others inside
    of a library, where no Python runs, ends after ``leave_seconds``. In a thread that is not the main one it does
    nothing.
    """

    def __init__(self, *, leave_seconds: float = _LEAVE_SECONDS):
        self._leave_seconds = leave_seconds
        self._before: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def __enter__(self) -> StopInSetUp:
        if threading.current_thread() is not threading.main_thread():
            return self
        global _in_set_up
        _in_set_up = self
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        os.set_blocking(self._pipe[0], True)
        self._before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True, name="stop in set-up").start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """From here on stop signals are not ours."""
        if self._pipe is None:
            return
        _, write = self._pipe
        self._pipe = None
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._stop:  # else somebody has taken it over
                signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(write)  # which ends the thread; it closes its own end

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            name = signal.Signals(number).name
            sys.stderr.write(f"stopped by {name} before the first step, nothing is lost; start it again to go on\n")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # No exception: libraries that are being imported swallow those, and are half there afterwards.
        _leave(EXIT_START_ME_AGAIN)

    def _watch(self, read: int) -> None:
        watched = {int(number) for number in STOP_SIGNALS}
        try:
            while data := os.read(read, 64):
                if watched & set(data):
                    time.sleep(self._leave_seconds)
                    if self._pipe is not None:
                        os._exit(EXIT_START_ME_AGAIN)
        finally:
            os.close(read)
