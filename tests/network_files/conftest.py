"""Two nodes with one network file system between them; of each kind that scripts/test_network_files.sh serves.

Collected only there. A node is a mount of its own, and a process that is told that its machine is another: the name of
the host and the boot of the kernel, in namespaces of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = os.environ.get("REMIT_NETWORK_FILES")
if not ROOT:
    collect_ignore_glob = ["test_*.py"]

_ELSEWHERE = 'hostname "$0"; mount --bind "$1" /proc/sys/kernel/random/boot_id; shift; exec "$@"'


@dataclass(frozen=True)
class Node:
    """One of the two.

    Attributes:
        name: of its host.
        files: where it has the file system.
        boot: what it takes for its kernel's boot, a file.
    """

    name: str
    files: Path
    boot: Path

    def start(self, *words: object, **named: Any) -> subprocess.Popen[str]:
        """A Python process on this node."""
        elsewhere = ["unshare", "--mount", "--uts", "--propagation", "private", "bash", "-euc", _ELSEWHERE]
        command = [*elsewhere, self.name, str(self.boot), sys.executable, *map(str, words)]
        environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
        return subprocess.Popen(
            command,
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **named,
        )

    def remit(self, *words: object) -> subprocess.Popen[str]:
        """``remit WORDS`` on this node."""
        return self.start("-m", "remit_megatron", *words)


@pytest.fixture(params=["glusterfs", "sshfs"])
def nodes(request, tmp_path: Path) -> tuple[Node, Node]:
    """Two nodes with an empty directory of the file system that both see."""
    folder = uuid.uuid4().hex
    made = []
    for name in ("n1", "n2"):
        boot = tmp_path / f"boot.{name}"
        boot.write_text(f"{uuid.uuid4()}\n")
        made.append(Node(name, Path(ROOT or "") / request.param / name / folder, boot))
    made[0].files.mkdir()
    return made[0], made[1]
