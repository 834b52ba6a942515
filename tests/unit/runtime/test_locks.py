"""A directory's lock where the operating system's does not reach: no locks, or locks of one machine only.

A process that takes itself for another machine's has another boot of the kernel. ``scripts/test_network_files.sh`` does
the same on real network file systems.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remit_megatron.runtime import locks
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.locks import DirectoryLock

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = """
import errno, fcntl, os, sys, time
from pathlib import Path
from remit_megatron.runtime import locks
from remit_megatron.runtime.errors import UserError
directory, machine, system = sys.argv[1:4]
locks._TOUCH_SECONDS, locks._WATCH_SECONDS = 0.1, float(os.environ.get("WATCH", "2"))
if machine:
    locks.kernel = lambda: [machine, ""]
def flock(*_):  # "granted": to whoever asks on this machine
    if system != "granted":
        raise OSError(getattr(errno, system), os.strerror(getattr(errno, system)))
if system:
    fcntl.flock = flock
take = lambda: locks.DirectoryLock(Path(directory))
"""
# Of a program that has said how it takes its lock: holds it until its standard input is closed.
HOLD = """
try:
    lock = take()
except UserError as error:
    print(f"refused: {error}", flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


def start(directory: Path, machine: str = "", system: str = "", *, watch: float = 2.0) -> subprocess.Popen[str]:
    """Another process that wants the directory; holds it until its standard input is closed."""
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + HOLD, str(directory), machine, system],
        env=environment | {"PYTHONPATH": str(REPOSITORY), "WATCH": str(watch)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def process(*args, **named) -> Iterator[subprocess.Popen[str]]:
    """One that is ended when the test is."""
    child = start(*args, **named)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def says(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


WITHOUT = ["ENOLCK", "ENOSYS", "EOPNOTSUPP"]


@pytest.mark.parametrize(
    ("system", "machine"),
    [*((system, "") for system in WITHOUT), ("ENOLCK", "elsewhere"), ("granted", "elsewhere")],
)
def test_one_holds_it_and_a_dead_one_does_not(tmp_path, system, machine) -> None:
    with process(tmp_path, machine, system) as first:
        assert says(first) == "held"
        with process(tmp_path, "", system) as second:
            assert says(second).startswith(f"refused: run_dir: found {tmp_path}, in use by process {first.pid} on ")
        first.kill()
        first.wait()
        with process(tmp_path, "", system) as third:
            assert says(third) == "held"
            _, errors = third.communicate()
    assert ("without locks" in errors) is (system in WITHOUT)
    assert ("watching for 2 s whether it lives" in errors) is (machine == "elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "what a holder has put there goes with it"


def test_of_many_that_come_at_once_one_has_it(tmp_path) -> None:
    children = [start(tmp_path, f"machine {number}", "granted") for number in range(6)]
    try:
        answers = [says(child) for child in children]
        assert sorted(answer.partition(":")[0] for answer in answers) == ["held"] + ["refused"] * 5
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_the_operating_systems_word_is_enough_on_one_machine_and_mount(tmp_path, monkeypatch) -> None:
    """A container that was killed, started again: another namespace of processes, the same kernel. Nobody waits."""
    lock = DirectoryLock(tmp_path)
    mine = tmp_path / ".lock.1"
    record = json.loads(mine.read_text())
    lock.release()
    (tmp_path / ".lock.4").write_text(json.dumps(record | {"processes": "pid:[1]", "process": 1}))
    started = time.monotonic()
    DirectoryLock(tmp_path).release()
    assert time.monotonic() - started < locks._WATCH_SECONDS / 2


def test_a_number_that_another_process_has_now_is_nobody(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    lock = DirectoryLock(tmp_path)
    record = json.loads((tmp_path / ".lock.1").read_text())
    lock.release()
    held = tmp_path / ".lock.1"
    held.write_text(json.dumps(record | {"mount": -1}))
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        DirectoryLock(tmp_path)
    held.write_text(json.dumps(record | {"mount": -1, "started": "1"}))
    DirectoryLock(tmp_path).release()


def test_one_that_was_taken_for_dead_ends_when_it_wakes(tmp_path) -> None:
    with process(tmp_path, "other", "granted") as first:
        assert says(first) == "held"
        first.send_signal(signal.SIGSTOP)
        with process(tmp_path, "", "granted", watch=1.0) as second:
            assert says(second) == "held"
            first.send_signal(signal.SIGCONT)
            assert first.wait(timeout=60) == 2 and first.stderr is not None
            errors = first.stderr.read()
            assert f"taken over by process {second.pid} on " in errors and len(errors.splitlines()) == 1
            assert second.poll() is None


def test_a_holder_of_long_ago_is_not_waited_for(tmp_path) -> None:
    held = tmp_path / ".lock.7"
    held.write_text("")  # it was killed before it could say who it is
    os.utime(held, (1e9, 1e9))
    started = time.monotonic()
    DirectoryLock(tmp_path).release()
    assert time.monotonic() - started < locks._WATCH_SECONDS / 2


def test_a_full_disk_leaves_no_holder(tmp_path, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        DirectoryLock(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_list_of_names_that_is_old_hides_nobody(tmp_path, monkeypatch) -> None:
    """As a client of NFS keeps it for a while: the holder is not in it yet."""
    with process(tmp_path, "other", "granted") as first:
        assert says(first) == "held"
        names, old = locks._numbers, [[], [], []]
        monkeypatch.setattr("fcntl.flock", lambda *_: None)
        monkeypatch.setattr(locks, "_TOUCH_SECONDS", 0.1)
        monkeypatch.setattr(locks, "_numbers", lambda directory: old.pop() if old else names(directory))
        with pytest.raises(UserError, match=f"in use by process {first.pid}"):
            DirectoryLock(tmp_path)
        assert not old
