"""The local launcher: exit codes, whose words are shown, nobody left behind."""

from __future__ import annotations

import os
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
