"""Local ranks: ``--nproc N`` starts the same command N times, as torchrun would, and minds the exit codes.

torchrun turns every failure into exit code 1 and prints its own report over the command's one clear line; the codes
2, 70 and 75 are part of our interface, so that this small launcher takes its place on one machine.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from remit_megatron.runtime import stop
from remit_megatron.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_START_ME_AGAIN
from remit_megatron.runtime.parallel import started_by_srun

_GRACE_SECONDS = 20.0
_FIRST_PORT, _TRIES = 10_000, 100


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago, drawn from those that are not given to
    connections: ranks make many, and one of those would often be taken before rank 0 listens."""
    first = _ephemeral_start()
    # Drawn without the seed of anything that trains.
    for port in random.SystemRandom().sample(range(_FIRST_PORT, first), k=_TRIES) if first > 2 * _FIRST_PORT else ():
        with socket.socket() as sock:
            try:
                sock.bind(("", port))
            except OSError:
                continue
            return port
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


def _ephemeral_start() -> int:
    """The first port that Linux gives to connections; 0 where it does not say."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def under_launcher() -> bool:
    """Whether torchrun, srun or :func:`launch` has started this process as one of several ranks."""
    return "RANK" in os.environ or started_by_srun()


def openmp_wait_policy(load: float, cores: int) -> str | None:
    """How OpenMP's threads should wait for each other; None leaves it to the library, which spins.

    Spinning takes the cores from whoever else computes, and from the threads that are waited for
    (scripts/bench_waiting.py measures it, docs/benchmarks/waiting.md holds what it found).

    Args:
        load: average of the last minute, before the ranks are started.
        cores: that this process may use.
    """
    return "passive" if load >= 0.4 * cores else None


def openmp_settings(environment: Mapping[str, str], *, nproc: int, load: float, cores: int) -> dict[str, str]:
    """What :func:`launch` adds to the environment of its ranks for OpenMP: threads of a rank, and how they wait.

    Args:
        environment: what the user has set stays, and settles the question.
        nproc: ranks.
        load, cores: as in :func:`openmp_wait_policy`.
    """
    chosen = {}
    if "OMP_NUM_THREADS" not in environment:
        chosen["OMP_NUM_THREADS"] = str(max(1, cores // nproc))
    policy = openmp_wait_policy(load, cores)
    if policy is not None and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        chosen["OMP_WAIT_POLICY"] = policy
    return chosen


def launch(nproc: int, argv: Sequence[str], *, module: str = "remit_megatron") -> int:
    """Runs ``python -m module argv…`` as ``nproc`` ranks on this machine and waits for them.

    When one fails, the others get SIGTERM and, after a grace time, SIGKILL. Signals that reach this process are passed
    on. Rank 0 writes to the terminal as usual; what another rank wrote to standard error is shown only if it was the
    first to fail: its error is the cause of the others'. A mistake in the input, which all find alike, is said once.

    Returns:
        0 if every rank returned 0, else the exit code of the first that did not (128 + number for a signal). A stop
        signal that met ranks before they could handle it is 75 where the command goes on when it is started again.
    """
    goes_on = stop.in_set_up()
    environment = dict(os.environ) | stop.launcher_environment()
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(nproc))
    cores = len(os.sched_getaffinity(0))
    environment |= openmp_settings(environment, nproc=nproc, load=os.getloadavg()[0], cores=cores)
    processes: list[subprocess.Popen] = []
    captured: list[IO[bytes] | None] = []
    asked: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        # A terminal that is gone is none of theirs, which have sessions of their own.
        asked.append(signal.SIGTERM if number == signal.SIGHUP else number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(asked[-1])

    with stop.handled_by(dict.fromkeys((signal.SIGINT, signal.SIGUSR1, *stop.stop_signals()), forward)):
        try:
            for rank in range(nproc):
                if asked:
                    break
                errors = tempfile.TemporaryFile() if rank else None  # noqa: SIM115 - read when the ranks are done
                captured.append(errors)
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *_path_options(), "-m", module, *argv],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stderr=errors,
                        start_new_session=True,  # Ctrl-C reaches the ranks once, through forward()
                    )
                )
            if asked:  # one of them was being made, and did not get it; none has begun, and all are ended below
                return _exit_code([-asked[0]], 0, asked, goes_on=goes_on)
            first = _wait(processes)
            if first is None:
                return EXIT_DONE
            hung = _stop(processes)
            codes = [process.returncode for process in processes]
            if not codes[first] == codes[0] == EXIT_BAD_INPUT:  # else rank 0 has said it
                _show(first, captured[first])
            for rank in hung:
                _show(rank, captured[rank])
            return _exit_code(codes, first, asked, goes_on=goes_on)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _exit_code(codes: Sequence[int], first: int, asked: Sequence[int], *, goes_on: bool) -> int:
    """The exit code of a job whose rank ``first`` failed first, and the line that rank 0 could not write.

    Args:
        codes: of the ranks, as subprocess gives them.
        asked: signals that were passed on to them.
        goes_on: what was stopped goes on when it is started again.
    """
    code = codes[first]
    unhandled = {-code for code in codes} & set(asked) & set(stop.stop_signals())
    # Where one has left because it was asked to, another may have fallen over its absence first.
    if goes_on and asked and EXIT_START_ME_AGAIN in codes:
        code = EXIT_START_ME_AGAIN
    if goes_on and unhandled and (code == EXIT_START_ME_AGAIN or -code in unhandled):
        if codes[0] != EXIT_START_ME_AGAIN:  # else it has said so
            stop.say_stopped(asked[0])
        return EXIT_START_ME_AGAIN
    return 128 - code if code < 0 else code


def _path_options() -> list[str]:
    """Ranks look for modules where this process does; ``-m`` alone would put the working directory first."""
    here = {"", os.getcwd()}
    return [] if here & set(sys.path) else ["-P"]


def _wait(processes: list[subprocess.Popen]) -> int | None:
    """Waits until all are done; returns the rank that failed first, or None."""
    running = set(range(len(processes)))
    while running:
        for rank in sorted(running):
            code = processes[rank].poll()
            if code is None:
                continue
            if code != 0:
                return rank
            running.discard(rank)
        time.sleep(0.05)
    return None


def _stop(processes: list[subprocess.Popen]) -> list[int]:
    """Ends what is left; returns the ranks that did not end when they were asked, which have written their stacks."""
    # The others find the same mistake, or finish the same save, within moments: let them.
    deadline = time.monotonic() + 3.0
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    hung = [rank for rank, process in enumerate(processes) if process.poll() is None]
    for rank in hung:
        processes[rank].send_signal(signal.SIGCONT)  # one that was stopped answers nothing
        processes[rank].send_signal(signal.SIGQUIT)
    if hung:
        time.sleep(1.0)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    return hung


def _show(rank: int, errors: IO[bytes] | None) -> None:
    """Repeats what the first failing rank wrote to standard error (rank 0 has written it already)."""
    if errors is None:
        return
    errors.seek(0)
    text = errors.read().decode(errors="replace").strip()
    if text:
        sys.stderr.write("\n".join(f"[rank {rank}] {line}" for line in text.splitlines()[-40:]) + "\n")
