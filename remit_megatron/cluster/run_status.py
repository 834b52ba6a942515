"""``remit status``: how a run is doing, from the files in its directory.

Reads only, so that it works beside a run that goes on elsewhere, and on one that is long over.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from remit_megatron.run.events import EVENTS_FILE
from remit_megatron.runtime import checkpoints
from remit_megatron.runtime.errors import EXIT_DO_NOT_RESTART, EXIT_DONE, EXIT_START_ME_AGAIN, UserError
from remit_megatron.runtime.files import read_whole
from remit_megatron.runtime.locks import lives
from remit_megatron.runtime.progress import format_count, format_duration
from remit_megatron.runtime.run_length import planned_steps

_RECENT_STEPS = 50  # that rate and time left are taken from
_QUIET_STEPS = 10  # a run that says nothing for so many steps' time hangs, or is gone
_QUIET_SECONDS = 300.0  # but not before: validation and saves take long
_FAULTS_SHOWN = 5


@dataclass(frozen=True)
class Fault:
    """Something that went wrong: when (seconds since 1970), and what."""

    time: float
    text: str


@dataclass(frozen=True)
class RunStatus:
    """How a run is doing. What is not known is None.

    Attributes:
        run_dir: the run's directory, absolute.
        state: ``done``, ``running``, ``quiet`` (should be running and says nothing), ``starting``, ``stopped`` (saved;
            start it again), ``failed`` (with exit code 70), ``crashed`` (also killed, as soon as that can be told) or
            ``not started``.
        step, total_steps: done, and of the whole run.
        consumed_tokens: so far.
        seconds_since: the last step.
        seconds_left: at the rate of the last steps.
        step_seconds: median of the last steps.
        tokens_per_second, tokens_per_second_per_rank, tflops, mfu, memory_gib: of the last steps; the last three of
            one GPU.
        reference_share: of a step's time, 0 to 1.
        lm_loss, grad_norm: of the last step, nats.
        dropped_tokens, skipped_steps: over all steps that are on record.
        spikes, last_spike: loss spikes that are on record, and the step of the last one.
        slow_ranks: that hold the others up, as the last start has last said: each with ``ranks``, ``hosts``, ``ratio``.
        validation_loss: of the last validation, and the step it was made at.
        checkpoint, checkpoint_seconds_ago: newest complete one.
        incomplete_checkpoints: steps of directories newer than that without a manifest: a save that goes on, or was
            killed.
        starts, stops, crashes: of the run so far. A crash is a start without an end before the next one.
        ranks, host, job: of the last start.
        faults: what the run warned of, its crashes and its errors, newest last.
    """

    run_dir: str
    state: str
    step: int = 0
    total_steps: int | None = None
    consumed_tokens: int | None = None
    seconds_since: float | None = None
    seconds_left: float | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    tokens_per_second_per_rank: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    reference_share: float | None = None
    lm_loss: float | None = None
    grad_norm: float | None = None
    dropped_tokens: int = 0
    skipped_steps: int = 0
    spikes: int = 0
    last_spike: int | None = None
    slow_ranks: list[dict[str, Any]] = field(default_factory=list)
    validation_loss: tuple[float, int] | None = None
    checkpoint: int | None = None
    checkpoint_seconds_ago: float | None = None
    incomplete_checkpoints: list[int] = field(default_factory=list)
    starts: int = 0
    stops: int = 0
    crashes: int = 0
    ranks: int | None = None
    host: str | None = None
    job: str | None = None
    faults: list[Fault] = field(default_factory=list)

    def to_json(self) -> str:
        """One object, with the names above."""
        return json.dumps(asdict(self), indent=1) + "\n"


def run_status(run_dir: str | os.PathLike, *, now: float | None = None) -> RunStatus:
    """Reads a run's directory.

    Args:
        run_dir: of ``remit train``.
        now: seconds since 1970; the present by default.

    Raises:
        UserError: it is no run's directory.
    """
    folder = Path(run_dir)
    now = time.time() if now is None else now
    held = lives(folder, now=now)
    if not (folder / "config.yaml").is_file():
        if held:  # the first start of it, that is being set up
            return RunStatus(run_dir=str(folder.absolute()), state="starting")
        raise UserError("RUN", f"{folder}, which has no config.yaml", "the run_dir of a run that has started")
    metrics = folder / "metrics.jsonl"
    steps = _records(metrics)
    last, recent = (steps[-1] if steps else {}), steps[-_RECENT_STEPS:]
    total = _total_steps(folder / "config.yaml", steps)
    events = _Events.of(_records(folder / EVENTS_FILE))
    ranks = events.last_start.get("ranks")
    step = int(last.get("iteration", events.last_start.get("step", 0)))
    seconds = _median(recent, "step_seconds")
    rate = _median(recent, "tokens_per_second")
    written = metrics.stat().st_mtime if steps else None
    complete, incomplete = _checkpoints(folder / "checkpoints")
    validation = [r for r in _records(folder / "validation.jsonl") if r.get("lm_loss") is not None]
    reference = [r["reference_seconds"] / r["step_seconds"] for r in recent if r.get("step_seconds")]
    state = _state(
        events, held=held, step=step, total=total, written=written, seconds=seconds, checkpoint=complete, now=now
    )
    left = None if seconds is None or total is None else seconds * max(total - step, 0)
    return RunStatus(
        run_dir=str(folder.absolute()),
        state=state,
        step=step,
        total_steps=total,
        consumed_tokens=last.get("consumed_tokens"),
        seconds_since=None if written is None else round(max(now - written, 0.0), 1),
        seconds_left=left,
        step_seconds=seconds,
        tokens_per_second=rate,
        tokens_per_second_per_rank=None if rate is None or not ranks else rate / ranks,
        tflops=_median(recent, "tflops"),
        mfu=_median(recent, "mfu"),
        memory_gib=max((r["memory_gib"] for r in recent if r.get("memory_gib") is not None), default=None),
        reference_share=statistics.median(reference) if reference else None,
        lm_loss=last.get("lm_loss"),
        grad_norm=last.get("grad_norm"),
        dropped_tokens=sum(r.get("dropped_tokens") or 0 for r in steps),
        skipped_steps=sum(bool(r.get("skipped")) for r in steps),
        spikes=len(events.spikes),
        last_spike=max(events.spikes, default=None),
        slow_ranks=events.slow,
        validation_loss=(validation[-1]["lm_loss"], validation[-1]["iteration"]) if validation else None,
        checkpoint=complete[0] if complete else None,
        checkpoint_seconds_ago=None if complete is None else round(max(now - complete[1], 0.0), 1),
        incomplete_checkpoints=incomplete,
        starts=events.starts,
        stops=events.stops,
        crashes=events.crashes(state),
        ranks=ranks,
        host=events.last_start.get("host"),
        job=events.last_start.get("job"),
        faults=events.faults,
    )


@dataclass
class _Events:
    starts: int = 0
    stops: int = 0
    broken: int = 0  # starts without an end, the last one not among them
    last_start: dict[str, Any] = field(default_factory=dict)
    last_end: dict[str, Any] | None = None  # of the last start
    faults: list[Fault] = field(default_factory=list)
    spikes: set[int] = field(default_factory=set)  # their steps; one that was met again after a crash is one
    slow: list[dict[str, Any]] = field(default_factory=list)  # of the last start

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> _Events:
        found = cls()
        for record in records:
            when, event = float(record.get("time", 0.0)), record.get("event")
            if event == "start":
                if found.starts and found.last_end is None:
                    found.broken += 1
                    before = found.last_start
                    where = f"start {found.starts} on {before.get('host')}, from step {before.get('step')}"
                    found.faults.append(Fault(when, f"{where}, ended without a word (killed, or its node lost)"))
                found.starts += 1
                found.last_start, found.last_end, found.slow = record, None, []
            elif event == "end":
                found.last_end = record
                found.stops += record.get("code") == EXIT_START_ME_AGAIN
                if "reason" in record:
                    found.broken += record.get("code") is None
                    found.faults.append(Fault(when, f"step {record.get('step')}: {record['reason']}"))
            elif event == "spike":
                found.spikes.add(int(record.get("iteration", 0)))
            elif event == "slow":
                found.slow = [entry for entry in record.get("ranks") or [] if isinstance(entry, dict)]
            elif event == "fault":
                found.faults.append(Fault(when, str(record.get("text"))))
        return found

    def crashes(self, state: str) -> int:
        """A last start without an end is a crash where the run is not there any more."""
        return self.broken + (state == "crashed" and self.last_end is None)


def _state(
    events: _Events,
    *,
    held: bool | None,
    step: int,
    total: int | None,
    written: float | None,
    seconds: float | None,
    checkpoint: tuple[int, float] | None,
    now: float,
) -> str:
    end = events.last_end
    if total is not None and checkpoint is not None and checkpoint[0] >= total:
        return "done"
    if held and (end is not None or not events.starts):
        return "starting"  # a start that has not come to its first event
    if not events.starts and written is None:
        return "not started"
    if end is None and events.starts and held is False:
        return "crashed"  # killed: it says nothing of its end
    if end is not None:
        return {EXIT_DONE: "done", EXIT_START_ME_AGAIN: "stopped", EXIT_DO_NOT_RESTART: "failed"}.get(
            end.get("code", -1), "crashed"
        )
    if written is None or (events.starts and step <= events.last_start.get("step", 0)):  # no step of this start yet
        begun = float(events.last_start.get("time", 0.0))
        return "starting" if now - begun < 2 * _QUIET_SECONDS else "quiet"
    return "running" if now - written < max(_QUIET_SECONDS, _QUIET_STEPS * (seconds or 0.0)) else "quiet"


def _checkpoints(root: Path) -> tuple[tuple[int, float] | None, list[int]]:
    """Step and time of the newest complete checkpoint, and newer directories that are none."""
    incomplete = []
    for iteration in checkpoints.iterations(root):
        manifest = checkpoints.iteration_directory(root, iteration) / checkpoints.MANIFEST
        try:
            return (iteration, manifest.stat().st_mtime), incomplete
        except OSError:
            incomplete.append(iteration)
    return None, incomplete


def _total_steps(config: Path, steps: list[dict[str, Any]]) -> int | None:
    try:
        megatron = (yaml.safe_load(read_whole(config)) or {}).get("megatron") or {}
    except (OSError, yaml.YAMLError, AttributeError):
        return None
    return planned_steps(megatron, steps[-1] if steps else None)


def _records(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that may be growing."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _median(records: list[dict[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return statistics.median(values) if values else None


_MEANING = {
    "done": "the run is at its end",
    "running": "training",
    "quiet": "no step for a while: it hangs (docs/operations/hang.md), saves, validates, or its job is gone",
    "starting": "setting up",
    "stopped": "stopped on purpose and saved; start it again to go on",
    "failed": "ended with exit code 70; starting it again would end the same way",
    "crashed": "ended by an error or killed; start it again to go on from its newest checkpoint",
    "not started": "no step yet",
}


def status_text(status: RunStatus) -> str:
    """For a person: a few lines."""
    lines = [f"{status.run_dir}", _line("state", f"{status.state}: {_MEANING[status.state]}")]
    step = f"{status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps else "")
    if status.total_steps:
        step += f" ({100 * status.step / status.total_steps:.1f}%)"
    if status.consumed_tokens is not None:
        step += f", {format_count(status.consumed_tokens)} tokens"
    if status.seconds_since is not None:
        step += f", the last {format_duration(status.seconds_since)} ago"
    lines.append(_line("step", step))
    if status.tokens_per_second is not None:
        rate = f"{format_count(status.tokens_per_second)} tok/s, {status.step_seconds:.3g} s a step"
        if status.tokens_per_second_per_rank is not None:
            rate += f", {format_count(status.tokens_per_second_per_rank)} tok/s for each of {status.ranks} ranks"
        if status.tflops is not None:
            rate += f", {status.tflops:.3g} TFLOP/s each"
        if status.mfu is not None:
            rate += f", MFU {100 * status.mfu:.1f}%"
        lines.append(_line("rate", rate))
        if status.reference_share is not None:
            lines.append(_line("reference", f"{100 * status.reference_share:.1f}% of a step"))
        if status.memory_gib is not None:
            lines.append(_line("memory", f"{status.memory_gib:.1f} GiB at most, on the rank that writes"))
    if status.seconds_left is not None and status.state not in ("done", "failed"):
        lines.append(_line("left", f"{format_duration(status.seconds_left)} of training at this rate"))
    if status.lm_loss is not None:
        loss = f"lm_loss {status.lm_loss:.4f}"
        loss += "" if status.grad_norm is None else f", grad {status.grad_norm:.3f}"
        if status.validation_loss is not None:
            loss += f", validation {status.validation_loss[0]:.4f} at step {status.validation_loss[1]}"
        lines.append(_line("loss", loss))
    checkpoint = "none yet"
    if status.checkpoint is not None and status.checkpoint_seconds_ago is not None:
        checkpoint = f"step {status.checkpoint:,}, {format_duration(status.checkpoint_seconds_ago)} ago"
    if status.incomplete_checkpoints:
        checkpoint += f"; {', '.join(map(str, status.incomplete_checkpoints))} not complete"
    lines.append(_line("checkpoint", checkpoint))
    health = [f"{status.dropped_tokens:,} tokens dropped", f"{status.skipped_steps} steps skipped"]
    if status.spikes:
        many = "s" * (status.spikes > 1)
        health.append(f"{status.spikes} loss spike{many}, the last at step {status.last_spike:,}")
    lines.append(_line("health", ", ".join(health)))
    for entry in status.slow_ranks:
        ranks, hosts = (", ".join(map(str, entry.get(name) or [])) for name in ("ranks", "hosts"))
        times = f"{entry.get('ratio') or 0:.1f} times the time of the others"
        lines.append(_line("slow", f"rank {ranks} on {hosts}, {times}"))
    lines.append(_line("starts", f"{status.starts}, {status.stops} stopped on purpose, {status.crashes} crashed"))
    if status.host is not None:
        job = "" if status.job is None else f", job {status.job}"
        lines.append(_line("last on", f"{status.host}, {status.ranks} ranks{job}"))
    for fault in status.faults[-_FAULTS_SHOWN:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(fault.time))
        lines.append(_line("fault", f"{when} {fault.text}"))
    if len(status.faults) > _FAULTS_SHOWN:
        lines.append(_line("", f"{len(status.faults) - _FAULTS_SHOWN} earlier faults: --json, or {EVENTS_FILE}"))
    return "\n".join(lines) + "\n"


def _line(name: str, text: str) -> str:
    return f"  {name:<11}{text}"
