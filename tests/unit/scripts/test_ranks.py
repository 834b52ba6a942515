"""What the batch scripts make of the exit codes of their ranks; ``srun`` and ``scontrol`` are recorders."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.scripts.test_scripts import REPOSITORY


@pytest.mark.parametrize(
    ("ends", "code", "requeued", "says"),
    [
        ("exit 0", 0, False, "done"),
        ("exit 75", 75, True, "stopped before its end; requeued"),
        # As srun says that a task was ended by a signal that Python did not handle yet.
        ("exit 143", 75, True, "stopped before it had begun"),
        ("exit 140", 75, True, "stopped before it had begun"),
        ("exit 2", 2, False, "starting again would end the same way"),
        ("exit 70", 70, False, "starting again would end the same way"),
        ("exit 137", 137, True, "crash 1 in a row"),
        ("kill -TERM $$", 75, True, "stopped before it had begun"),
    ],
)
def test_what_becomes_of_the_job(tmp_path: Path, ends: str, code: int, requeued: bool, says: str) -> None:
    job(tmp_path, ["train.sbatch", "run.yaml"], ends, code, requeued, says)


@pytest.mark.parametrize("words", [["evaluate.sbatch", "a=b"], ["posttrain.sbatch", "sft", "run.yaml"]])
def test_what_becomes_of_a_job_of_one_task(tmp_path: Path, words: list[str]) -> None:
    """As with the ranks of a run."""
    job(tmp_path, words, "exit 75", 75, True, "stopped before its end; requeued")
    job(tmp_path, words, "exit 143", 75, True, "stopped before it had begun")


def job(tmp_path: Path, words: list[str], ends: str, code: int, requeued: bool, says: str) -> None:
    """Runs a batch script whose ``srun`` ends so."""
    programs = {
        "bin/scontrol": 'case "$1 $2" in "show hostnames") echo n7 ;; *) echo "$*" ;; esac',
        "bin/srun": ends,
        ".venv/bin/remit": "exit 1",
    }
    for name, body in programs.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)
    if not (tmp_path / "scripts").exists():
        (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    (tmp_path / "run.yaml").write_text("{}")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n7",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "REMIT_CONTAINER": "",
    }
    command = ["bash", str(REPOSITORY / "scripts" / "slurm" / words[0]), *words[1:]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "requeue 7" in done.stdout) == (code, requeued), done.stderr
    assert says in done.stderr
