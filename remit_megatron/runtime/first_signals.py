"""Stop signals in the first moments of the program, while its own modules are imported.

Imports almost nothing: before :func:`take` a stop signal ends the process as the system does, and the caller sees 143
and not 75. What stands before it is Python's own start.
"""

import os
import signal
from collections.abc import Sequence

_EXIT_START_ME_AGAIN = 75  # of runtime.errors, which is imported later
_BEFORE_THE_FIRST_STEP = "before the first step, nothing is lost; start it again to go on"
_BEFORE_THE_END = "before the end, nothing half done is left behind; start it again"

# First word of a command that is stopped by a signal -> whether it cleans up behind itself, and the rest of the line.
# The others only read.
STOPPED: dict[str, tuple[bool, str]] = {
    **dict.fromkeys(("train", "score", "posttrain"), (False, _BEFORE_THE_FIRST_STEP)),
    **dict.fromkeys(("flywheel", "quickstart"), (False, "before its first stage; start it again to go on")),
    "evaluate": (True, "before the end; start it again to go on"),
    **dict.fromkeys(("data", "import", "export", "logprobs", "check"), (True, _BEFORE_THE_END)),
}

# Whether this process is the program: after its command it ends. What is only a part of another process leaves the
# signals as they were.
is_program = False
_before: dict[int, object] = {}
_when = _BEFORE_THE_FIRST_STEP


def speaks() -> bool:
    """Whether this rank is the one that says what all ranks do."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def line(number: int, when: str) -> str:
    """What a command says that was stopped."""
    return f"stopped by {signal.Signals(number).name} {when}\n"


def take(arguments: Sequence[str]) -> None:
    """From here on a stop signal ends this process with exit code 75; called by the program, first of all.

    Args:
        arguments: of the command line.
    """
    global is_program, _when
    is_program = True
    if arguments[:1] and arguments[0] in STOPPED:
        _when = STOPPED[arguments[0]][1]
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            _before[number] = signal.signal(number, _leave)


def inherited(number: int, handler: object) -> object:
    """The handler that the process was started with, where ``handler`` is the one of this module."""
    return _before[number] if handler is _leave else handler


def _leave(number: int, _frame: object) -> None:
    if speaks():
        try:  # noqa: SIM105 - contextlib takes its time to import
            os.write(2, line(number, _when).encode())
        except OSError:  # nobody listens
            pass
    os._exit(_EXIT_START_ME_AGAIN)
