"""Runs a flywheel, or one stage of it: what is done is left alone, what was killed goes on, what changed is new."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from remit_megatron.data.manifest import read_manifest
from remit_megatron.flywheel import kinds, outputs
from remit_megatron.flywheel.chain import Stage
from remit_megatron.flywheel.keys import source_digest
from remit_megatron.flywheel.plan import Plan, Planned, Standing
from remit_megatron.flywheel.records import LOG, Record, now, read_record, this_process, write_event, write_record
from remit_megatron.flywheel.starting import Start, Stopping, end_leftovers, run_program, start
from remit_megatron.flywheel.state import planned_words, write_state
from remit_megatron.flywheel.summary import write_summary
from remit_megatron.runtime.errors import (
    EXIT_BAD_INPUT,
    EXIT_DO_NOT_RESTART,
    EXIT_DONE,
    EXIT_START_ME_AGAIN,
    UserError,
)
from remit_megatron.runtime.locks import DirectoryLock
from remit_megatron.runtime.progress import format_duration

logger = logging.getLogger(__name__)


@dataclass
class Runner:
    """Runs stages of a plan.

    Attributes:
        start: how a command of ``remit`` is started.
        retry: also start stages again that ended with exit code 70.
        verify: compare what is done by content before it is trusted.
    """

    plan: Plan
    start: Start = start
    retry: bool = False
    verify: bool = False
    stopping: Stopping = field(default_factory=Stopping)

    def run(self) -> int:
        """All stages, in order; returns the exit code.

        75 where it was stopped; else the code of the first stage that failed. What does not depend on a failed stage
        runs all the same.

        Raises:
            UserError: somebody else is at it, or a result that counts has been changed.
        """
        lock = self._open()
        try:
            with self.stopping:
                return self._run()
        finally:
            lock.release()

    def _run(self) -> int:
        standing = self.plan.standing()
        self.plan.check_inputs(standing)
        self.plan.check_arguments(standing)
        self.check_results()
        failed: dict[str, int] = {}
        stages = list(self.plan.planned.values())
        for number, planned in enumerate(stages, start=1):
            label = f"[{number}/{len(stages)}] {planned.stage.id}"
            if broken := [id_ for id_ in (*planned.stage.needs, *planned.stage.waits) if id_ in failed]:
                failed[planned.stage.id] = failed[broken[0]]
                self._say(f"{label}: not run, it needs {broken[0]}")
                continue
            if self.stopping.asked is not None:
                return self._stopped()
            standing = self.plan.standing()[planned.stage.id]
            if standing.must_not_restart and not self.retry:
                failed[planned.stage.id] = EXIT_DO_NOT_RESTART
                self._say(f"{label}: failed before ({standing.note}); --retry starts it again")
                continue
            code = self._step(planned, label)
            if code == EXIT_START_ME_AGAIN:
                return self._stopped()
            if code != EXIT_DONE:
                failed[planned.stage.id] = code
        write_state(self.plan)
        if failed:
            return next(iter(failed.values()))
        for path in write_summary(self.plan):
            self._say(f"{path}")
        return EXIT_DONE

    def step(self, stage: Stage, *, key: str | None = None) -> int:
        """One stage, once: what a job of a cluster calls. Returns its exit code.

        Args:
            key: that it had when the job was submitted.

        Raises:
            UserError: what it needs is not done; its key is another one by now; somebody else is at it.
        """
        planned = self.plan.planned[stage.id]
        if key is not None and not planned.key.startswith(key):
            raise UserError(
                f"key of {stage.id}",
                f"{planned.key[: len(key)]}",
                f"{key}, as it was submitted: submit again, or give back what has been changed",
            )
        self.plan.make_directory()
        standing = self.plan.standing()
        for id_ in (*stage.needs, *stage.waits):
            if standing[id_].status != "done":
                raise UserError(stage.field, f"{id_}, which is {standing[id_].status}", "a stage that is done")
        self.check_results(only=[*stage.needs, stage.id])
        if standing[stage.id].must_not_restart and not self.retry:
            self._say(f"{stage.id}: failed before ({standing[stage.id].note}); --retry starts it again")
            return EXIT_DO_NOT_RESTART
        with self.stopping:
            code = self._step(planned, stage.id)
        write_state(self.plan)
        if code not in (EXIT_DONE, EXIT_START_ME_AGAIN) and (waiting := self.plan.chain.after(stage.id)):
            self._say(f"{stage.id} failed with {code}: what needs it will not run: {', '.join(waiting)}")
        if code == EXIT_DONE and all(one.status == "done" for one in self.plan.standing().values()):
            write_summary(self.plan)
        return code

    def check_results(self, only: list[str] | None = None) -> None:
        """Looks at what is done: sizes and times, or contents with ``verify``; then those of token files, too.

        Raises:
            UserError: a file is not as its stage, or `remit data build`, left it.
        """
        for prefix in self.plan.token_data() if self.verify and only is None else ():
            read_manifest(prefix, verify=True)
        for planned in self.plan.planned.values():
            if only is not None and planned.stage.id not in only:
                continue
            record = read_record(planned.directory)
            if record is None or record.status != "done":
                continue
            if found := outputs.changed(planned.directory, record.outputs, contents=self.verify):
                name, _, rest = found.partition(": found ")
                what, _, expected = rest.partition("; expected ")
                write_event(self.plan.run_dir, event="changed", stage=planned.stage.id, found=found)
                raise UserError(
                    f"{planned.stage.id}: {name}",
                    what,
                    f"{expected}, as the stage left it: put it back, or remove {planned.directory} to run it again",
                )

    # -- one stage -----------------------------------------------------------------------------------------------------

    def _step(self, planned: Planned, label: str) -> int:
        """Runs a stage to its end, unless it is done; notes every change."""
        standing = self.plan.standing()[planned.stage.id]
        if standing.status == "outdated":
            self._set_aside(planned, standing)
        elif standing.status == "done":
            self._say(f"{label}: done before")
            return EXIT_DONE
        lock = DirectoryLock(planned.directory, field=planned.stage.id)
        try:
            record = read_record(planned.directory)  # what was true before the lock was held may not be any more
            if record is not None and record.status == "done":
                return EXIT_DONE
            return self._start(planned, record, label)
        finally:
            lock.release()

    def _start(self, planned: Planned, before: Record | None, label: str) -> int:
        stage, directory = planned.stage, planned.directory
        if left := end_leftovers(directory):
            self._say(f"{label}: ended {left} processes that an earlier start had left behind")
        command = self.plan.command(planned)
        record = before or Record(stage.id, planned.key, planned.content)
        again = f", start {len(record.starts) + 1}" if record.starts else ""
        self._say(f"{label}: {shlex.join(planned_words(self.plan, planned))}{again}")
        record.status, record.code, record.note = "running", None, ""
        record.consumed, record.source, record.process = self.plan.consumed(planned), source_digest(), this_process()
        record.starts.append({"at": now()})
        self._note(planned, record, "started")
        begun = time.monotonic()
        code = self._exit_code(planned, command)
        record.starts[-1] |= {"seconds": round(time.monotonic() - begun, 3), "code": code}
        record.code = code
        if code == EXIT_DONE:
            self._finish(planned, record)
        elif code == EXIT_START_ME_AGAIN:
            record.status, record.note = "stopped", "stopped before its end; it goes on where it was"
        else:
            record.status, record.note = "failed", f"exit code {code}: {_last_line(directory / LOG)}"
        self._note(planned, record, record.status, code=record.code, note=record.note)
        seconds = format_duration(record.starts[-1]["seconds"])
        self._say(f"{label}: {record.status} in {seconds}" + (f", {record.note}" if record.note else ""))
        if record.status == "failed":
            self._say(f"{label}: all of its output is in {directory / LOG}")
            return record.code or 1
        return EXIT_DONE if record.status == "done" else EXIT_START_ME_AGAIN

    def _exit_code(self, planned: Planned, command: kinds.Command) -> int:
        """Of the stage's command; 75 also where it could only be ended, because this process was asked to stop."""
        if kinds.finished(planned.stage, planned.directory):
            return EXIT_DONE
        log = planned.directory / LOG
        code = run_program(command.words, log) if command.program else self.start(command.words, command.nproc, log)
        # A command without a way to stop is ended by the signal itself.
        told = self.stopping.asked is not None and code not in (EXIT_DONE, EXIT_BAD_INPUT, EXIT_DO_NOT_RESTART)
        return EXIT_START_ME_AGAIN if told else code

    def _finish(self, planned: Planned, record: Record) -> None:
        """Looks at what a stage that ended well has left behind."""
        problem = kinds.verdict(planned.stage, planned.directory)
        try:
            record.outputs = outputs.describe(planned.stage, planned.directory)
        except FileNotFoundError as error:
            problem = f"ended with 0, but there is {error}"
        if problem:
            record.status, record.code, record.note = "failed", EXIT_DO_NOT_RESTART, problem
        else:
            record.status = "done"

    def _set_aside(self, planned: Planned, standing: Standing) -> None:
        """Keeps what was made from other inputs under another name."""
        number = 1
        while (aside := planned.directory.with_name(f"{planned.directory.name}.before-{number}")).exists():
            number += 1
        planned.directory.rename(aside)
        write_event(
            self.plan.run_dir, event="set aside", stage=planned.stage.id, directory=str(aside), note=standing.note
        )
        self._say(f"{planned.stage.id}: {standing.note}; the result so far is kept as {aside}")

    # -- around it -----------------------------------------------------------------------------------------------------

    def _open(self) -> DirectoryLock:
        lock = DirectoryLock(self.plan.run_dir)
        self.plan.make_directory()
        return lock

    def _note(self, planned: Planned, record: Record, event: str, **more: object) -> None:
        write_record(planned.directory, record)
        kept = {name: value for name, value in more.items() if value not in (None, "")}
        directory = planned.directory.name
        write_event(self.plan.run_dir, event=event, stage=planned.stage.id, directory=directory, **kept)
        write_state(self.plan)

    def _stopped(self) -> int:
        write_state(self.plan)
        self._say("stopped before the end; start it again to go on")
        return EXIT_START_ME_AGAIN

    def _say(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _last_line(log: Path) -> str:
    """The last line that says something; of a command that failed, its reason."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return "no output"
    said = [line.strip() for line in lines if line.strip() and not line.startswith("$ ")]
    return said[-1].removeprefix("error: ")[:300] if said else "no output"
