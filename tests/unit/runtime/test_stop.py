"""Signals in the set-up and stacks on demand, on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remit_megatron.runtime.stop import StopInSetUp, handled_by, stop_signals

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def own_terminal() -> Iterator[None]:
    """Tests that nohup has started hand its SIGHUP on to their processes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def process(source: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process that says ``ready`` when it can be signalled."""
    child = subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


SET_UP = """
import ctypes, os, signal, sys, time
from remit_megatron.runtime.stop import StopInSetUp, handled_by
def wait():
    print("ready", flush=True)
    time.sleep(60)
def theirs(number, frame):
    os.write(1, b"theirs\\n")
with StopInSetUp(leave_seconds={leave}):
    {body}
"""
# A process that says nothing has left by itself, after so long: a machine under load takes its time.
LATE = 30.0


def in_set_up(body: str = "wait()", *, leave: float = LATE, **environment: str) -> subprocess.Popen[str]:
    """A process in its set-up, ready to be signalled."""
    return process(SET_UP.format(body=body, leave=leave), **environment)


def said_line(number: signal.Signals) -> str:
    return f"stopped by {number.name} before the first step, nothing is lost; start it again to go on\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_stop_in_the_set_up(number: signal.Signals, rank: str) -> None:
    child = in_set_up(RANK=rank)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 75
    assert said == (said_line(number) if rank == "0" else "")


# A terminal; the process is told to stop while it writes there.
SIGNALLING = """
import io, os, signal
class Signalling(io.RawIOBase):
    def __init__(self, descriptor):
        self.descriptor = descriptor
    def writable(self):
        return True
    def write(self, data):
        os.kill(os.getpid(), signal.SIGTERM)
        return os.write(self.descriptor, data)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stop_in_the_middle_of_a_line(stream: str) -> None:
    """Python's streams refuse to be entered twice: no traceback comes of it, and the line is said."""
    body = (
        "os.write(1, b'ready\\n')\n"
        f"    terminal = io.BufferedWriter(Signalling(sys.{stream}.fileno()))\n"
        f"    sys.{stream} = io.TextIOWrapper(terminal, write_through=True)\n"
        f"    print('half a', file=sys.{stream}, flush=True)"
    )
    child = process(SIGNALLING + SET_UP.format(body=body, leave=LATE))
    _, said = child.communicate(timeout=60)
    assert child.returncode == 75 and said_line(signal.SIGTERM) in said and "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("inherited", ["ignored", "blocked"])
def test_a_stop_that_whoever_started_the_process_had_switched_off(number: signal.Signals, inherited: str) -> None:
    """Shells with ``trap '' TERM``, supervisors and containers hand such signals on through exec."""
    if inherited == "ignored":
        before = signal.signal(number, signal.SIG_IGN)
    else:
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        child = in_set_up()
    finally:
        if inherited == "ignored":
            signal.signal(number, before)
        else:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (75, said_line(number))


def test_a_process_that_is_to_outlive_its_terminal() -> None:
    """As nohup starts it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child = in_set_up()
    finally:
        signal.signal(signal.SIGHUP, before)
    child.send_signal(signal.SIGHUP)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (75, said_line(signal.SIGTERM))


def test_a_process_that_waits_inside_of_a_library_ends_too() -> None:
    """No Python runs there, so that no handler of Python does; a lock that is never released stands in for it."""
    library = "ctypes.CDLL(None).pthread_mutex_lock"
    waits = f"m = ctypes.create_string_buffer(64); {library}(m); print('ready', flush=True); {library}(m)"
    child = in_set_up(waits, leave=0.5)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (75, said_line(signal.SIGTERM))


@pytest.mark.parametrize("body", ["with handled_by({}): wait()", "with handled_by({}): pass\n    wait()"])
def test_after_the_set_up_the_signals_are_as_before(body: str) -> None:
    child = in_set_up(body)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    "body",
    [
        "signal.signal(signal.SIGTERM, theirs)\n    with handled_by({}): wait()",
        "with handled_by({signal.SIGTERM: theirs}): wait()",
    ],
)
def test_a_handler_of_others_stays(body: str) -> None:
    child = in_set_up(body, leave=0.1)
    child.send_signal(signal.SIGTERM)
    assert child.stdout is not None and child.stdout.readline() == "theirs\n"
    time.sleep(1.0)  # longer than a process of the set-up is left
    assert child.poll() is None
    child.kill()
    child.communicate()


@pytest.mark.parametrize(("to_the_end", "code"), [(True, 0), (False, 75)])
def test_a_stop_after_the_work(to_the_end: bool, code: int) -> None:
    """The program ends as it would have where it only ends, and leaves where something takes long."""
    body = f"""with handled_by({{signal.SIGTERM: theirs}}, to_the_end={to_the_end}): pass
    os.kill(os.getpid(), signal.SIGTERM)
    os.write(1, b"went on\\n")
os.kill(os.getpid(), signal.SIGTERM)"""
    child = process(
        "from remit_megatron.runtime import first_signals as f; f.take(['score']); print('ready', flush=True)\n"
        + SET_UP.format(body=body, leave=LATE)
    )
    out, said = child.communicate(timeout=60)
    line = "stopped by SIGTERM at the end, nothing is lost; start it again\n"
    assert (child.returncode, said, out) == (code, line if code else "", "" if code else "went on\n")


def test_at_no_moment_nobody_handles_a_stop(monkeypatch) -> None:
    """From the set-up to whoever takes over."""
    original, there = signal.signal, []

    def watched(number: int, handler) -> object:
        before = original(number, handler)
        there.append(signal.getsignal(signal.SIGTERM))
        return before

    with StopInSetUp():
        monkeypatch.setattr(signal, "signal", watched)
        with handled_by(dict.fromkeys(stop_signals(), print)):
            monkeypatch.undo()
            assert there and signal.SIG_DFL not in there
            assert [signal.getsignal(number) for number in stop_signals()] == [print] * len(stop_signals())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_rank_whose_launcher_is_gone_is_told_to_stop() -> None:
    """Else it would go on alone, and hold the directory of the run."""
    rank = (
        "from remit_megatron.runtime.stop import StopInSetUp, follow_launcher\nimport time\n"
        "with StopInSetUp(): follow_launcher(); print('ready', flush=True); time.sleep(60)"
    )
    launcher = (
        "import os, subprocess, sys\nfrom remit_megatron.runtime.stop import launcher_environment\n"
        "rank = [sys.executable, '-c', os.environ['OF_THE_RANK']]\n"
        "subprocess.Popen(rank, env=os.environ | launcher_environment()).wait()"
    )
    child = process(launcher, OF_THE_RANK=rank)
    child.kill()
    _, said = child.communicate(timeout=60)  # which ends when the rank has closed it, too
    assert said == said_line(signal.SIGTERM)


def test_stacks_of_a_process_that_was_stopped() -> None:
    source = (
        "import time\nfrom remit_megatron.runtime.stop import write_stacks_when_asked\nwrite_stacks_when_asked()\n"
        "def here():\n    print('ready', flush=True)\n    time.sleep(60)\nhere()"
    )
    child = process(source)
    os.kill(child.pid, signal.SIGSTOP)
    child.send_signal(signal.SIGQUIT)
    child.send_signal(signal.SIGCONT)
    assert child.stderr is not None
    lines = [child.stderr.readline() for _ in range(2)]
    assert "most recent call first" in lines[0] and "in here" in lines[1]
    assert child.poll() is None, "it goes on"
    child.kill()
    child.communicate()
