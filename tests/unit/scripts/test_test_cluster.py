"""test_cluster.sh where Slurm is missing, and what it hands to pytest: with small programs on the PATH."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.unit.scripts.test_scripts import REPOSITORY, program, run

# What the script needs of a machine besides Slurm.
TOOLS = ("bash", "env", "dirname", "readlink", "mktemp", "rm", "grep", "tail", "cat")
# Says what it was asked for, and in which environment.
PYTHON = 'echo "$*"; echo "REMIT_CLUSTER=${REMIT_CLUSTER:-} $(cd "$REMIT_CLUSTER_FOLDER" && echo folder)"'


class Machine:
    """A checkout with nothing but the script, and a PATH without Slurm's client programs."""

    def __init__(self, folder: Path):
        self.script = folder / "root" / "scripts" / "test_cluster.sh"
        self.bin = folder / "bin"
        self.script.parent.mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts" / "test_cluster.sh", self.script)
        program(self.script.parent, "setup.sh", "exit 0")
        (folder / "root" / ".venv").mkdir()
        program(folder / "root" / ".venv" / "bin", "python", PYTHON)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        program(self.bin, "sudo", 'shift; exec "$@"')

    def run(self, *words: str):
        return run(self.script, *words, cwd=self.script.parent, PATH=str(self.bin), LC_ALL="C")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_no_slurm_and_no_apt(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("test_cluster: found no ") and "sbatch srun scontrol" in done.stderr
    assert done.stderr.endswith("and no apt-get to install Slurm with\n")


def test_packages_that_cannot_be_installed(machine: Machine) -> None:
    program(machine.bin, "apt-get", 'echo "Reading..."; echo "E: Unable to locate package slurm-wlm" >&2; exit 100')
    done = machine.run()
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines() == [
        "test_cluster: installing slurm-wlm and munge",
        "test_cluster: Slurm could not be installed: E: Unable to locate package slurm-wlm",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root asks nobody")
def test_nobody_who_may_install(machine: Machine) -> None:
    program(machine.bin, "sudo", "exit 1")
    program(machine.bin, "apt-get", "exit 0")
    assert "installing Slurm needs root, or sudo without a password" in machine.run().stderr


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ((), "-m pytest --timeout=1800 --durations=0 tests/cluster"),
        (("-k", "two_nodes"), "-m pytest --timeout=1800 --durations=0 tests/cluster -k two_nodes"),
        (("tests/cluster/test_score.py",), "-m pytest --timeout=1800 --durations=0 tests/cluster/test_score.py"),
        (("--shell", "sinfo", "-N"), "-m tests.cluster.shell sinfo -N"),
    ],
)
def test_what_is_run(machine: Machine, words: tuple[str, ...], asked: str) -> None:
    """Choosing cases does not choose those of other folders."""
    program(machine.bin, "apt-get", f'echo "$*" >> {machine.bin}/asked')
    done = machine.run(*words)
    assert done.returncode == 0, done.stderr
    shell = words[:1] == ("--shell",)
    assert done.stdout.splitlines() == [asked, f"REMIT_CLUSTER={'' if shell else '1'} folder"]
    assert "install -y --no-install-recommends slurm-wlm" in (machine.bin / "asked").read_text()
