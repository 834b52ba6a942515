"""``state.json`` and what ``remit flywheel status`` and ``explain`` say: for programs, and in words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from remit_megatron.flywheel.keys import difference, source_digest
from remit_megatron.flywheel.plan import SHORT, Plan, Planned, Standing
from remit_megatron.flywheel.records import Record, now, read_record
from remit_megatron.flywheel.slurm import job_states
from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.progress import format_duration

STATE = "state.json"


def state(plan: Plan) -> dict[str, Any]:
    """How the flywheel stands, by stage."""
    return {"updated": now(), "stages": _stages(plan, plan.standing())}


def _stages(plan: Plan, standing: dict[str, Standing]) -> dict[str, Any]:
    found = {}
    for id_, planned in plan.planned.items():
        one = standing[id_]
        record = one.record
        found[id_] = {
            "kind": planned.stage.kind,
            "status": one.status,
            "key": planned.key,
            "directory": str(planned.directory.relative_to(plan.run_dir)),
            "needs": [*planned.stage.needs, *planned.stage.waits],
            "starts": len(record.starts) if record else 0,
            "seconds": round(record.seconds, 3) if record else 0.0,
            "code": record.code if record else None,
            "note": one.note,
        }
    return found


def write_state(plan: Plan) -> None:
    """Replaces ``state.json``."""
    write_atomic(plan.run_dir / STATE, json.dumps(state(plan), indent=1) + "\n")


def status(plan: Plan) -> dict[str, Any]:
    """What ``status --json`` prints: the state, with the jobs of a cluster where stages have some."""
    found = state(plan)
    for id_, job in job_states(plan.run_dir).items():
        if id_ in found["stages"]:
            found["stages"][id_]["job"] = job
    return found


def status_text(plan: Plan) -> str:
    """The same for a person."""
    found = status(plan)["stages"]
    rows = [["stage", "kind", "status", "time", "starts", "directory"]]
    with_jobs = any("job" in one for one in found.values())
    rows[0] += ["job"] if with_jobs else []
    for id_, one in found.items():
        time = format_duration(one["seconds"]) if one["starts"] else "-"
        row = [id_, one["kind"], one["status"], time, str(one["starts"]), Path(one["directory"]).name]
        job = one.get("job")
        rows.append([*row, *([f"{job['id']} {job['state']}" if job else "-"] if with_jobs else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    done = sum(one["status"] == "done" for one in found.values())
    notes = [f"{id_}: {one['note']}" for id_, one in found.items() if one["note"]]
    return "\n".join([f"{plan.run_dir}: {done} of {len(found)} stages done", *lines, *notes]) + "\n"


def explain(plan: Plan, name: str) -> str:
    """Why a stage would run, or would not, in lines.

    Raises:
        UserError: no such stage.
    """
    planned = plan.planned[plan.chain.find(name).id]
    standing = plan.standing()[planned.stage.id]
    lines = [f"{planned.stage.id}: {standing.status}, key {planned.key[:SHORT]}, {planned.directory}"]
    lines += [standing.note] if standing.note else []
    record = standing.record
    if record is not None:
        lines += _of_record(record)
    else:
        lines += _of_others(plan, planned)
    lines += [f"not there yet, and part of the key when it is: {what}" for what in planned.absent]
    return "\n".join(lines) + "\n"


def dry_run(plan: Plan, name: str | None = None) -> str:
    """What would run: every stage, how it stands, its command, and what it reads that is not there.

    Raises:
        UserError: a stage names an argument that Megatron or TRL does not have.
    """
    lines, standing = [], plan.standing()
    plan.check_arguments(standing)
    wanted = plan.chain.find(name).id if name else None
    for id_, planned in plan.planned.items():
        if wanted in (None, id_):
            lines.append(f"{id_}: {standing[id_].status}, {planned.directory}")
            lines.append(f"  {shlex.join(planned_words(plan, planned))}")
            lines += [f"  not found here: {what} (the stage needs it)" for what in planned.absent]
    return "\n".join(lines) + "\n"


def planned_words(plan: Plan, planned: Planned) -> list[str]:
    """The command of a stage as a person would type it."""
    command = plan.command(planned)
    words = command.words if command.program else ["remit", *command.words]
    return words + (["--nproc", str(command.nproc)] if not command.program and (command.nproc or 1) > 1 else [])


def _of_record(record: Record) -> list[str]:
    lines = {
        "done": ["it is not run again: its key is the same, and its result is what was written down"],
        "running": ["it goes on in its directory"],
        "stopped": ["it goes on in its directory"],
        "failed": ["it is started again in its directory (after exit code 70 only with --retry)"],
    }[record.status]
    if record.source != source_digest():
        lines.append("it ran with other source code of the same version; `code: source` makes that part of the key")
    return lines


def _of_others(plan: Plan, planned: Planned) -> list[str]:
    """What is different from the last stage of that name that has a record."""
    other = _nearest(plan, planned)
    if other is None:
        return ["it has not run yet"]
    directory, record = other
    lines = [f"it would run in a new directory; against {directory.name} ({record.status}):"]
    for key, before, found in difference(record.content, planned.content):
        lines.append(f"  {key}: {_shown(before)} -> {_shown(found)}")
    return [*lines, *_of_needed(plan, planned)]


def _of_needed(plan: Plan, planned: Planned) -> list[str]:
    """Which of the stages that it needs have another key, too: the cause is theirs."""
    standing = plan.standing()
    new = [id_ for id_ in planned.stage.needs if standing[id_].record is None]
    return [f"{id_} is new, too: remit flywheel explain {plan.path} {id_}" for id_ in new]


def _nearest(plan: Plan, planned: Planned) -> tuple[Path, Record] | None:
    """The directory of the same name and another key that differs least, the latest of several."""
    stem = planned.directory.name.removesuffix(planned.key[:SHORT])
    found = []
    for directory in plan.run_dir.glob(f"stages/{stem}*"):
        rest = directory.name.removeprefix(stem)
        if directory == planned.directory or len(rest) != SHORT:
            continue
        try:
            record = read_record(directory)
        except UserError:
            continue
        if record is not None:
            last = record.starts[-1]["at"] if record.starts else ""
            found.append((-len(difference(record.content, planned.content)), last, directory, record))
    return max(found, key=lambda one: one[:2])[2:] if found else None


def _shown(value: Any) -> str:
    return "not there" if value is None else show(value, limit=160)
