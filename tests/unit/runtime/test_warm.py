"""Children of a process that imports once: exit codes, logs, signals, and what becomes of them when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remit_megatron.runtime import warm

REPOSITORY = Path(__file__).resolve().parents[3]


def fail() -> int:
    raise ValueError("as it must")


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: print("to the log") or 75, 75, "to the log\n"),
        (lambda: sys.exit(2), 2, ""),
        (fail, 1, "ValueError: as it must\n"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 128 + signal.SIGKILL, ""),
    ],
)
def test_exit_codes_and_log(tmp_path, work, code, said) -> None:
    child = warm.Child(work, tmp_path / "place" / "log")
    assert child.wait() == code == child.poll()
    assert child.seconds is not None
    assert child.log.read_text().endswith(said) and bool(child.log.read_text()) == bool(said)


def test_a_command_is_what_the_program_would_do(tmp_path) -> None:
    """``remit --version``, and a command line that is refused: exit code and one line as always."""
    child = warm.Child(warm.command(["--version"]), tmp_path / "log")
    assert child.wait() == 0 and child.log.read_text().startswith("remit ")
    child = warm.Child(warm.command(["train", tmp_path / "none.yaml"]), tmp_path / "log2")
    assert child.wait() == 2
    assert child.log.read_text() == f"error: {tmp_path}/none.yaml: found no such file; expected a readable file\n"


def test_stop_reaches_what_a_child_has_started(tmp_path) -> None:
    pids = tmp_path / "pid"

    def work() -> None:
        process = subprocess.Popen(["sleep", "600"])
        pids.write_text(str(process.pid))
        process.wait()

    child = warm.Child(work, tmp_path / "log")
    wait_for(lambda: pids.exists() and pids.read_text() != "")
    child.stop()
    assert child.poll() == 128 + signal.SIGTERM
    wait_for(lambda: not running(int(pids.read_text())))


def test_a_killed_parent_takes_its_children_with_it(tmp_path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path; from remit_megatron.runtime import warm\n"
        f"place = Path({str(tmp_path)!r})\n"
        "def work():\n (place / 'pid').write_text(str(os.getpid()))\n time.sleep(600)\n"
        "warm.Child(work, place / 'log').wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text() != "")
    parent.kill()
    parent.wait()
    wait_for(lambda: not running(int(pid.read_text())))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
