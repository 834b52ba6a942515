"""The local launcher: exit codes, whose words are shown, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from remit_megatron.runtime.launch import openmp_settings, openmp_wait_policy

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def run(tmp_path):
    """Launches ``nproc`` ranks of a small program through remit_megatron.runtime.launch."""

    def launch(program: str, nproc: int = 2, *, grace: float = 20.0) -> tuple[subprocess.CompletedProcess, float]:
        (tmp_path / "program.py").write_text(
            "import os, sys, time\nrank = os.environ['RANK']\n" + textwrap.dedent(program)
        )
        starter = (
            "import sys; from remit_megatron.runtime import launch; "
            f"launch._GRACE_SECONDS = {grace}; "
            f"sys.exit(launch.launch({nproc}, [], module='program'))"
        )
        environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
        environment.pop("RANK", None)
        started = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", starter], env=environment, capture_output=True, text=True, timeout=90
        )
        return result, time.monotonic() - started

    return launch


def test_all_ranks_run_and_know_each_other(run):
    # One write per line: lines of ranks may come in any order, but not inside each other.
    program = "os.write(1, f\"{rank}/{os.environ['WORLD_SIZE']} {os.environ['MASTER_ADDR']}\\n\".encode())"
    result, _ = run(program, nproc=3)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["0/3 127.0.0.1", "1/3 127.0.0.1", "2/3 127.0.0.1"]


def test_the_same_mistake_is_said_once(run):
    result, _ = run("sys.stderr.write('error: the same\\n'); sys.exit(2)")
    assert result.returncode == 2
    assert result.stderr == "error: the same\n"


def test_a_mistake_of_another_rank_is_shown(run):
    result, seconds = run("if rank == '1':\n    sys.stderr.write('error: only here\\n'); sys.exit(2)\ntime.sleep(60)")
    assert result.returncode == 2
    assert result.stderr == "[rank 1] error: only here\n"
    assert seconds < 45, "rank 0 was told to stop"


def test_a_killed_rank_ends_the_others(run):
    result, _ = run("if rank == '1':\n    os.kill(os.getpid(), 9)\ntime.sleep(60)")
    assert result.returncode == 128 + 9


def test_a_rank_that_hangs_says_where(run):
    program = """
        from remit_megatron.runtime.stop import write_stacks_when_asked
        write_stacks_when_asked()
        import signal
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a run does that is to save
        here = os.path.dirname(__file__) + "/stuck"
        def stuck():
            open(here, "w").close()
            os.kill(os.getpid(), 19)  # SIGSTOP
            time.sleep(60)
        if rank == '1':
            stuck()
        while not os.path.exists(here):
            time.sleep(0.1)
        time.sleep(1)
        sys.exit(1)
    """
    result, _ = run(program, grace=1.0)
    assert result.returncode == 1
    assert "[rank 1]" in result.stderr and "in stuck" in result.stderr, result.stderr


def test_codes_pass_through(run):
    assert run("sys.exit(75)")[0].returncode == 75


# A signal that comes as ranks are started, at a moment of the launcher's (each a line of Python) or of a rank's.
LAUNCHER = """
import os, signal, subprocess, sys
from remit_megatron.runtime import launch
from remit_megatron.runtime.stop import StopInSetUp
number, moment = signal.Signals(int(os.environ["NUMBER"])), os.environ["MOMENT"]
def send(): os.kill(os.getpid(), number)
port, popen, started = launch.free_port, subprocess.Popen, []
def free_port():
    if moment == "before the ranks": send()
    return port()
def start(*args, **named):
    if moment == f"as rank {len(started)} is made": send()
    started.append(popen(*args, **named))
    if moment == f"when rank {len(started) - 1} is made": send()
    return started[-1]
launch.free_port, subprocess.Popen = free_port, start
with StopInSetUp():
    code = launch.launch(2, [], module="program")
sys.exit(code)
"""
# A rank that imports for a while before it handles signals; ``both`` is written when both do.
RANK = """
import os, sys, time
rank, moment, here = os.environ["RANK"], os.environ["MOMENT"], os.path.dirname(__file__)
def come(name):
    open(f"{here}/{name}.{rank}", "w").close()
    while not os.path.exists(f"{here}/{name}.{1 - int(rank)}"): time.sleep(0.01)
come("begun")
def ask():
    if rank == "0": os.kill(os.getppid(), int(os.environ["NUMBER"]))
    time.sleep(60)
if moment == "while both import" or (moment, rank) == ("while rank 1 imports", "1"): ask()
from remit_megatron.runtime.stop import StopInSetUp
with StopInSetUp():
    if moment == "while rank 1 imports": ask()
    come("both")
    ask()
"""
MOMENTS = [
    "before the ranks",
    *(f"{when} rank {rank} is made" for rank in range(2) for when in ("as", "when")),
    "while both import",
    "while rank 1 imports",
    "when both wait",
]


STARTS = [(signal.SIGTERM, moment) for moment in MOMENTS]
STARTS += [(number, "while rank 1 imports") for number in (signal.SIGUSR2, signal.SIGHUP)]


@pytest.mark.parametrize(("number", "moment"), STARTS)
def test_a_stop_as_ranks_are_started(tmp_path, number, moment):
    """It is a stop with 75 and one line, whether ranks can handle the signal yet or not."""
    (tmp_path / "program.py").write_text(RANK)
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}", "MOMENT": moment}
    environment["NUMBER"] = str(int(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where nohup has started the tests
    try:
        command = [sys.executable, "-c", LAUNCHER]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    name = "SIGTERM" if number == signal.SIGHUP else number.name  # to ranks, a terminal that is gone
    assert result.returncode == 75, result.stderr
    assert result.stderr == f"stopped by {name} before the first step, nothing is lost; start it again to go on\n"


def test_threads_sleep_where_others_compute():
    """One busy process beside two cores is enough; a machine that only runs this is not."""
    assert openmp_wait_policy(1.0, 2) == openmp_wait_policy(7.0, 16) == "passive"
    assert openmp_wait_policy(0.3, 2) is None and openmp_wait_policy(1.0, 16) is None


def test_what_the_environment_says_of_threads_stays():
    crowded = {"nproc": 2, "load": 3.0, "cores": 8}
    assert openmp_settings({}, nproc=2, load=0.0, cores=8) == {"OMP_NUM_THREADS": "4"}
    assert openmp_settings({}, **(crowded | {"load": 4.0})) == {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"}
    assert openmp_settings({}, **crowded) == {"OMP_NUM_THREADS": "4"}, "three of eight cores are few"
    for name, value in (("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "100")):
        assert openmp_settings({name: value, "OMP_NUM_THREADS": "3"}, **(crowded | {"load": 9.0})) == {}
