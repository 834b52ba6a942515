"""Runs what a model wrote, with limits: time, memory, no network where the kernel allows that, an empty directory.

This keeps accidents small: endless loops, full memories, files left behind. It is no security boundary: the code runs
as the same user and can read what that user can read. docs/evaluation.md says so too.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_PASSED = "passed-8c1f6e0d"  # printed after the last line of the tests; an exit in the middle does not print it


@dataclass(frozen=True)
class Limits:
    """Of one program.

    Attributes:
        seconds: of the clock, and of processor time.
        memory: bytes of address space of each of its processes.
        file: bytes of the largest file it may write.
        processes: at once, of the whole user: a limit against fork bombs only.
    """

    seconds: float = 10.0
    memory: int = 4 << 30
    file: int = 16 << 20
    processes: int = 4096


@functools.cache
def isolation() -> tuple[str, ...]:
    """The command that takes network and process table away; empty where this machine does not let a user do that."""
    command = ("unshare", "--user", "--map-current-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
    if shutil.which(command[0]) is None:
        return ()
    try:
        done = subprocess.run([*command, "--", "true"], capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return ()
    return command if done.returncode == 0 else ()


def run_program(program: str, limits: Limits = Limits()) -> str:
    """Runs one Python program; returns ``passed``, ``timed out``, or the last line of what it said.

    Args:
        program: the whole text, tests at its end.
    """
    with tempfile.TemporaryDirectory(prefix="remit-code-") as folder:
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
        environment["OPENBLAS_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = "1"
        text = f"{program}\nprint({_PASSED!r})\n"
        process = subprocess.Popen(
            # -I: nothing of this project, of the environment or of the directory is imported by accident.
            [*isolation(), sys.executable, "-I", "-B", "-c", _MAIN, str(limits.memory), str(limits.file),
             str(limits.processes), str(math.ceil(limits.seconds))],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(text.encode(errors="replace"), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            output = None
        finally:
            # Whatever it started and left running, too.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        if output is None:
            process.communicate()
            return "timed out"
    lines = output[-65536:].decode(errors="replace").strip().splitlines()
    if process.returncode == 0 and lines and lines[-1].endswith(_PASSED):
        return "passed"
    if process.returncode == -signal.SIGXCPU:
        return "timed out"
    return f"failed: {lines[-1][:200] if lines else f'exit code {process.returncode}'}"


# The limits are set inside: a limit on processes or memory would already hold for `unshare` itself.
_MAIN = """
import resource, sys
memory, file, processes, seconds = map(int, sys.argv[1:5])
for name, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, file), (resource.RLIMIT_NPROC, processes),
                    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
    hard = resource.getrlimit(name)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(name, (value, value))
text = sys.stdin.read()
sys.argv = ["program"]
exec(compile(text, "program", "exec"), {"__name__": "__main__"})
"""


class CodeMetric:
    """Takes the place of the metric ``code_eval`` of Hugging Face's ``evaluate``: same call and result, limited child.

    The original is a script that is fetched from the hub when a task is loaded. It forks this process for each program.
    """

    def __init__(self, limits: Limits = Limits()):
        self._limits = limits

    def compute(
        self, *, references: list[str], predictions: list[list[str]], k: list[int] | tuple[int, ...] = (1,), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k over the problems.

        Args:
            references: the tests of each problem.
            predictions: the candidates of each problem.
            k: for which k, each at most the number of candidates.

        Returns:
            ``{"pass@1": …}`` and, by problem, ``(candidate, {"passed", "result"})``.
        """
        jobs = [
            (problem, candidate, f"{text}\n{tests}")
            for problem, (candidates, tests) in enumerate(zip(predictions, references, strict=True))
            for candidate, text in enumerate(candidates)
        ]
        with ThreadPoolExecutor(max_workers=max(1, len(os.sched_getaffinity(0)) // 2)) as threads:
            said = list(threads.map(lambda job: run_program(job[2], self._limits), jobs))
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for (problem, candidate, _program), words in zip(jobs, said, strict=True):
            entry = {"task_id": problem, "passed": words == "passed", "result": words, "completion_id": candidate}
            results.setdefault(problem, []).append((candidate, entry))
        scores = {}
        for number in [k] if isinstance(k, int) else k:
            if all(len(candidates) >= number for candidates in predictions):
                scores[f"pass@{number}"] = math.fsum(_pass_at(results[i], number) for i in results) / len(results)
        return scores, results


def _pass_at(candidates: list[tuple[int, dict[str, Any]]], k: int) -> float:
    """The chance that one of k candidates, drawn from those that were tried, passes (Chen et al. 2021, equation 1)."""
    total, good = len(candidates), sum(entry["passed"] for _, entry in candidates)
    return 1.0 - math.comb(total - good, k) / math.comb(total, k)


@contextmanager
def code_metric(limits: Limits = Limits()) -> Iterator[None]:
    """While task files are loaded, ``evaluate.load("code_eval")`` gives :class:`CodeMetric` and nothing is fetched."""
    import evaluate

    original = evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        return CodeMetric(limits) if path == "code_eval" else original(path, *args, **kwargs)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original


def warn_where_not_isolated() -> bool:
    """Says so, once, where programs keep their network. Returns whether they lose it."""
    if isolation():
        return True
    logger.warning("code that the model writes runs with this machine's network: unshare is not permitted here")
    return False
