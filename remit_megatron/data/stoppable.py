"""Commands that clean up behind themselves when they are stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from remit_megatron.runtime.errors import UserError


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM; passes through ``except Exception`` on its way out."""


@contextmanager
def stoppable(command: str) -> Iterator[None]:
    """Turns SIGINT and SIGTERM into a `UserError` after everything in between has been cleaned up.

    Args:
        command: what was stopped, by the name its user knows.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        for known in before:  # cleaning up is quick, and a second signal would cut it short
            signal.signal(known, signal.SIG_IGN)
        raise _Stopped(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except _Stopped as stopped:
        found = f"{stopped} before the end"
        raise UserError(command, found, "to run to the end; nothing was left behind") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
