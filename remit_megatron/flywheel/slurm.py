"""A flywheel as jobs of Slurm: the whole chain submitted at once, each job one ``remit flywheel step``.

A job waits for those it needs (``afterok``) and is cancelled where one of them fails (``--kill-on-invalid-dep``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from remit_megatron.flywheel.plan import SHORT, Plan, Planned
from remit_megatron.flywheel.records import now, write_event
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.locks import DirectoryLock

JOBS = "jobs.json"
SCRIPT = "scripts/slurm/flywheel_step.sbatch"
UNKNOWN = "unknown"
_TIMEOUT_SECONDS = 60


def submit(plan: Plan, *, retry: bool = False) -> int:
    """Submits every stage that is not done and has no job; returns how many that were.

    Raises:
        UserError: no sbatch here, or it refuses a job; what was submitted before stays, and is found the next time.
    """
    if not Path(SCRIPT).is_file():
        raise UserError("--slurm", f"no {SCRIPT} in the current directory", "to be started from the repository")
    lock = DirectoryLock(plan.run_dir)
    try:
        standing = plan.standing()
        plan.check_inputs(standing)
        plan.check_arguments(standing)
        plan.check_jobs(standing)
        plan.make_directory()
        return _submit_all(plan, retry=retry)
    finally:
        lock.release()


def _submit_all(plan: Plan, *, retry: bool) -> int:
    jobs = _read_jobs(plan.run_dir)
    known = _queue([str(job["id"]) for job in jobs.values()])
    standing = plan.standing()
    waiting: dict[str, str] = {}  # id of a stage -> job that will have done it
    at_work: dict[Path, str] = {}  # stages of one key are one job
    submitted = 0
    for id_, planned in plan.planned.items():
        one = standing[id_]
        if one.status == "done":
            continue
        if one.must_not_restart and not retry:
            raise UserError(id_, f"a stage that failed: {one.note}", "its cause mended, and --retry")
        if planned.directory in at_work:
            waiting[id_] = at_work[planned.directory]
            continue
        job = jobs.get(id_)
        alive = known is not None and job is not None and job["id"] in known
        if alive and job is not None and job["key"] == planned.key:
            waiting[id_] = at_work[planned.directory] = job["id"]
            sys.stdout.write(f"{id_}: job {job['id']} is in the queue\n")
            continue
        if alive and job is not None:
            raise UserError(
                f"job {job['id']} of {id_}", f"key {job['key'][:SHORT]}", f"{planned.key[:SHORT]}; scancel it"
            )
        waiting[id_] = at_work[planned.directory] = _submit(plan, planned, waiting, retry=retry)
        jobs[id_] = {"id": waiting[id_], "key": planned.key, "submitted": now()}
        write_atomic(plan.run_dir / JOBS, json.dumps(jobs, indent=1) + "\n")
        write_event(plan.run_dir, event="submitted", stage=id_, job=waiting[id_])
        sys.stdout.write(f"{id_}: job {waiting[id_]}\n")
        submitted += 1
    return submitted


def _submit(plan: Plan, planned: Planned, waiting: dict[str, str], *, retry: bool) -> str:
    stage = planned.stage
    words = ["sbatch", "--parsable", f"--job-name={stage.id}"]
    if before := [waiting[id_] for id_ in (*stage.needs, *stage.waits) if id_ in waiting]:
        words += [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"]
    words.append(f"--output={plan.run_dir.absolute()}/slurm-%j.out")
    for name, value in {**plan.config.slurm, **(stage.settings.get("slurm") or {})}.items():
        if value is not False and value is not None:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    words += [SCRIPT, plan.path, stage.id, f"--key={planned.key}", *plan.overrides, *(["--retry"] if retry else [])]
    done = _run(words)
    if done is None:
        raise UserError("--slurm", "no sbatch on the PATH", "a login node of a cluster with Slurm")
    number = done.stdout.strip().partition(";")[0]
    if done.returncode or not number.isdigit():
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"sbatch for {stage.id}", reason, "a job that Slurm takes")
    return number


def job_states(run_dir: Path) -> dict[str, dict[str, str]]:
    """Job and state of each stage that was submitted; ``unknown`` where Slurm does not say."""
    jobs = _read_jobs(run_dir)
    if not jobs:
        return {}
    numbers = [str(job["id"]) for job in jobs.values()]
    queue = _queue(numbers) or {}
    past = _accounting([number for number in numbers if number not in queue])
    return {
        id_: {"id": str(job["id"]), "state": queue.get(job["id"]) or past.get(job["id"]) or UNKNOWN}
        for id_, job in jobs.items()
    }


def _queue(numbers: list[str]) -> dict[str, str] | None:
    """Jobs that Slurm still has in its queue, and their states; None where it cannot be asked."""
    if not numbers:
        return {}
    # All of this user's: squeue refuses a list of which one job is long gone.
    done = _run(["squeue", "--me", "--noheader", "--format=%i %T"])
    if done is None or done.returncode:
        return None
    pairs = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2 and pair[0] in numbers}


def _accounting(numbers: list[str]) -> dict[str, str]:
    if not numbers:
        return {}
    done = _run(
        ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", "-j", ",".join(numbers)]
    )
    if done is None or done.returncode:
        return {}
    pairs = (line.split("|") for line in done.stdout.splitlines())
    return {pair[0]: pair[1].partition(" ")[0] for pair in pairs if len(pair) == 2}


def _read_jobs(run_dir: Path) -> dict[str, Any]:
    path = run_dir / JOBS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(str(path), f"no JSON ({error})", "what remit flywheel --slurm wrote") from None


def _run(words: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, stdin=subprocess.DEVNULL)
    except (FileNotFoundError, PermissionError):
        return None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"no answer from {words[0]} in {_TIMEOUT_SECONDS} s")
