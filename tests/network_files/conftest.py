"""Two nodes with one network file system between them; of each kind that scripts/test_network_files.sh serves.

Collected only there. A node is a mount of its own, and either a process that is told that its machine is another (the
name of the host and the boot of the kernel, in namespaces of its own), or a kernel of its own, which is asked by ssh.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = os.environ.get("REMIT_NETWORK_FILES")
if not ROOT:
    collect_ignore_glob = ["test_*.py"]

_ELSEWHERE = 'hostname "$0"; mount --bind "$1" /proc/sys/kernel/random/boot_id; shift; exec "$@"'


class Process(subprocess.Popen[str]):
    """One on a node."""

    @property
    def number(self) -> int:
        """Its number there."""
        return self.pid


class ThroughSsh(Process):
    """One that another kernel runs; here there is the ssh that talks with it."""

    def __init__(self, ssh: list[str], command: str, **named: Any):
        self._ssh = ssh
        self._file = Path(ROOT or "") / "processes" / uuid.uuid4().hex
        inner = f"echo $$ > {self._file}.new; mv {self._file}.new {self._file}; {command}"
        # Through a shell that outlives it: ssh has one exit code for all signals.
        super().__init__([*ssh, f"bash -c {shlex.quote(inner)}; exit $?"], **named)

    @cached_property
    def number(self) -> int:
        while not self._file.exists():
            time.sleep(0.05)
        return int(self._file.read_text())

    def kill(self) -> None:
        subprocess.run([*self._ssh, f"kill -KILL {self.number}"], check=True, stdin=subprocess.DEVNULL, timeout=60)


@dataclass(frozen=True)
class Node:
    """One of the two.

    Attributes:
        name: of its host.
        files: where it has the file system.
        boot: what it takes for its kernel's boot, a file; None where it has a kernel of its own.
    """

    name: str
    files: Path
    boot: Path | None

    def start(self, *words: object) -> Process:
        """A Python process on this node."""
        command = [sys.executable, *map(str, words)]
        environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
        ours = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
        named: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True}
        if self.boot is None:
            words_there = ["exec", "env", *(f"{key}={value}" for key, value in ours.items()), *command]
            there = f"cd {shlex.quote(str(REPOSITORY))}; {shlex.join(words_there)}"
            return ThroughSsh(["ssh", "-F", f"{ROOT}/ssh/config", self.name], there, **named)
        elsewhere = ["unshare", "--mount", "--uts", "--propagation", "private", "bash", "-euc", _ELSEWHERE]
        told = [*elsewhere, self.name, str(self.boot), *command]
        return Process(told, env=environment | ours, cwd=REPOSITORY, **named)

    def remit(self, *words: object) -> Process:
        """``remit WORDS`` on this node."""
        return self.start("-m", "remit_megatron", *words)


@pytest.fixture(scope="session", params=os.environ.get("REMIT_NETWORK_KINDS", "").split())
def kind(request) -> str:
    return request.param


@pytest.fixture
def nodes(kind: str, tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes with an empty directory of the file system that both see."""
    folder = uuid.uuid4().hex
    made = []
    for name in ("n1", "n2"):
        boot = tmp_path / f"boot.{name}"
        boot.write_text(f"{uuid.uuid4()}\n")
        made.append(Node(name, Path(ROOT or "") / kind / name / folder, None if kind.startswith("nfs") else boot))
    made[0].files.mkdir()
    deadline = time.monotonic() + 30
    while not made[1].files.is_dir() and time.monotonic() < deadline:  # sshfs knows a list of names for 20 s
        time.sleep(0.2)
    yield made[0], made[1]
