"""Signals at chosen moments of a real process, also of one that a test does not start itself.

A ``sitecustomize`` on the path of every Python that is started: it sends a signal as a module is imported, as a
function is called, or as the interpreter ends. Who is told is whom an operator or Slurm would tell: the launcher.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_HOOK = """
import os, sys

def send():
    rank = os.environ.get("RANK")
    target = os.getpid() if rank is None else os.getppid()
    os.kill(target, int(os.environ["MOMENT_SIGNAL"]))
    if rank is not None:  # it comes back from there; a rank that leaves does not get here
        import time
        deadline = time.monotonic() + 60
        while not noted() and time.monotonic() < deadline:
            time.sleep(0.01)

def noted():
    stop = sys.modules.get("remit_megatron.runtime.stop")
    globals_of_megatron = sys.modules.get("megatron.training.global_vars")
    handler = getattr(globals_of_megatron, "_GLOBAL_SIGNAL_HANDLER", None)
    return (stop is not None and stop.held()) or (handler is not None and handler._signal_received)

class Hook:
    def __init__(self, module, function):
        self.module, self.function = module, function

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        if not self.function:
            send()
            return None
        from importlib.machinery import PathFinder
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            owner, *path = module, *self.function.split(".")
            for part in path[:-1]:
                owner = getattr(owner, part)
            original = getattr(owner, path[-1])
            def wrapped(*args, **named):
                setattr(owner, path[-1], original)
                send()
                return original(*args, **named)
            setattr(owner, path[-1], wrapped)
        spec.loader.exec_module = exec_module
        return spec

rank, _, moment = os.environ.get("MOMENT", "").partition("|")
if moment and rank == os.environ.get("RANK", "launcher"):
    if moment == "end":
        import atexit
        atexit.register(send)
    else:
        sys.meta_path.insert(0, Hook(*moment.partition(":")[::2]))
"""
_MARK = "MOMENT_MARK"


def moment(folder: Path, who: str, what: str, number: signal.Signals = signal.SIGTERM) -> dict[str, str]:
    """Variables for the environment of a process that gets a signal.

    Args:
        folder: for files of this module, and the mark of all processes that are started so.
        who: ``launcher``, for a process that no launcher has started, or the number of a rank.
        what: ``package.module`` as it is imported, ``package.module:function`` as it is called first, or ``end``.
        number: the signal, to the launcher.
    """
    (folder / "hook").mkdir(parents=True, exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(_HOOK)
    repository = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(folder / "hook"), str(repository)])
    variables = {"MOMENT": f"{who}|{what}", "MOMENT_SIGNAL": str(int(number)), _MARK: str(folder)}
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    return kept | variables | {"PYTHONPATH": path}


def left_behind(folder: Path, *, within: float = 5.0) -> list[int]:
    """Processes that were started with :func:`moment` of ``folder`` and are still there after so many seconds."""
    mark = f"{_MARK}={folder}".encode()
    deadline = time.monotonic() + within
    while found := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if mark in _variables(pid)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return found


def _variables(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
