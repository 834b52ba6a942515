"""A Slurm of two nodes on this machine to try things on: ``./scripts/test_cluster.sh --shell [COMMAND…]``.

Its programs and ``remit`` are on the PATH, the container is off; it ends with the shell, and its jobs with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.slurm import REPOSITORY, Cluster


def main(command: Sequence[str]) -> int:
    """Runs a command, or the user's shell, with a Slurm that is up; returns its exit code."""
    cluster = Cluster(Path(os.environ["REMIT_CLUSTER_FOLDER"]))
    try:
        cluster.start()
        words = list(command) or [os.environ.get("SHELL", "/bin/sh")]
        sys.stderr.write("test_cluster: Slurm is up, with the nodes n1 and n2\n")
        return subprocess.run(words, env=cluster.environment, cwd=REPOSITORY).returncode
    finally:
        cluster.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
