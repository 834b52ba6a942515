"""Signals in the set-up and stacks on demand, on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


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


WAITS = """
import time
from remit_megatron.runtime.stop import StopInSetUp, take_over
with StopInSetUp(leave_seconds=0.5):
    {before}
    print("ready", flush=True)
    {waits}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_stop_in_the_set_up(number: signal.Signals, rank: str) -> None:
    child = process(WAITS.format(before="", waits="time.sleep(60)"), RANK=rank)
    child.send_signal(number)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 75
    expected = f"stopped by {number.name} before the first step, nothing is lost; start it again to go on\n"
    assert said == (expected if rank == "0" else "")


def test_a_process_that_waits_inside_of_a_library_ends_too() -> None:
    """No Python runs there, so that no handler of Python does; a lock that is never released stands in for it."""
    library = "ctypes.CDLL(None).pthread_mutex_lock"
    waits = f"m = ctypes.create_string_buffer(64); {library}(m); {library}(m)"
    child = process(WAITS.format(before="import ctypes", waits=waits))
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=20)
    assert child.returncode == 75


def test_after_the_set_up_the_signals_are_as_before() -> None:
    child = process(WAITS.format(before="take_over()", waits="time.sleep(60)"))
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=20)
    assert child.returncode == -signal.SIGTERM


def test_a_handler_of_others_stays() -> None:
    before = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('theirs', flush=True)); take_over()"
    child = process(WAITS.format(before=before, waits="time.sleep(60)"))
    child.send_signal(signal.SIGTERM)
    assert child.stdout is not None and child.stdout.readline() == "theirs\n"
    time.sleep(1.0)  # longer than a process of the set-up is left
    assert child.poll() is None
    child.kill()
    child.communicate()


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
