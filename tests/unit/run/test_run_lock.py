"""Who may have a run's directory: one run, and a job that was requeued after its earlier start is gone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from remit_megatron.run.directory import RunLock, read_config
from remit_megatron.runtime import locks
from remit_megatron.runtime.errors import StartAgain, UserError

REPOSITORY = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from remit_megatron.run.directory import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def holder(run_dir: Path, seconds: float, job: str | None) -> subprocess.Popen:
    """Another process that has the directory for a while."""
    environment = {"PYTHONPATH": str(REPOSITORY)} | ({} if job is None else {"SLURM_JOB_ID": job})
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir), str(seconds)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=r"^run_dir: found .*run, a file; expected a directory$"):
        RunLock(tmp_path / "run")


@pytest.mark.parametrize("content", [b"\xff\xfe:", b"megatron: [", b"- 1", b"7", b"[" * 100_000])
def test_a_damaged_record_of_the_configuration_is_named(tmp_path, content):
    assert read_config(tmp_path) is None
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config.yaml.*; expected the configuration that the run was last"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("run_dir: x\n")
    assert read_config(tmp_path) == "run_dir: x\n"


@pytest.mark.parametrize(("theirs", "ours"), [(None, None), (None, "7"), ("7", None), ("17", "7")])
def test_another_run_is_refused_at_once(tmp_path, monkeypatch, theirs, ours):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if ours is not None:
        monkeypatch.setenv("SLURM_JOB_ID", ours)
    process = holder(tmp_path, 60, theirs)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"in use by process {process.pid} on .*{theirs or ''}"):
        RunLock(tmp_path)
    assert time.monotonic() - started < 60  # the one that is waited for has 120 s
    process.kill()
    process.wait()
    RunLock(tmp_path).release()


def test_an_earlier_start_of_the_job_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    process = holder(tmp_path, 1.5, "7")
    lock = RunLock(tmp_path)
    assert process.wait(timeout=10) == 0 and "Slurm job 7" in (tmp_path / ".lock").read_text()
    lock.release()


def test_an_earlier_start_that_stays_is_tried_again_later(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(locks, "_OWN_JOB_SECONDS", 0.5)
    process = holder(tmp_path, 60, "7")
    with pytest.raises(StartAgain, match="still held by an earlier start of this job"):
        RunLock(tmp_path)
    process.kill()
    process.wait()
