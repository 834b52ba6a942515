"""A flywheel with its keys: what decides the result of every stage, the directory that is its own, how it stands."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from remit_megatron.flywheel import kinds
from remit_megatron.flywheel.chain import Chain, Stage, build_chain
from remit_megatron.flywheel.configuration import FlywheelConfig, load_flywheel
from remit_megatron.flywheel.keys import ABSENT, STAGE, Digests, code_content, flattened, key_of
from remit_megatron.flywheel.outputs import result_digest
from remit_megatron.flywheel.records import Record, is_alive, read_record
from remit_megatron.flywheel.references import Reference, references
from remit_megatron.runtime.errors import EXIT_DO_NOT_RESTART, UserError
from remit_megatron.runtime.files import write_atomic

SHORT = 12


@dataclass(frozen=True)
class Planned:
    """A stage of a chain with what it is known by.

    Attributes:
        content: what the key is the digest of.
        directory: ``stages/NAME-KEY`` of the flywheel's.
    """

    stage: Stage
    key: str
    content: dict[str, Any]
    directory: Path

    @property
    def absent(self) -> list[str]:
        """Keys whose path has nothing: to be there when the stage runs, and then part of its key by its content."""
        return [
            f"{key} {value.removeprefix(ABSENT)}" for key, value in _texts(self.content) if value.startswith(ABSENT)
        ]


class Plan:
    """A flywheel as it would run now.

    Args:
        path: the file.
        overrides: ``a.b=value``.

    Raises:
        UserError: anything is wrong that can be found before the first stage runs.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()):
        self.path, self.overrides = str(path), list(overrides)
        self.config: FlywheelConfig = load_flywheel(path, overrides)
        self.run_dir = self.config.run_dir
        self.chain: Chain = build_chain(self.config)
        self.digests = Digests(self.run_dir / "digests.json")
        self.planned: dict[str, Planned] = {}
        for stage in self.chain.stages.values():
            self.planned[stage.id] = self._plan(stage)
        self._check_steps()

    def _plan(self, stage: Stage) -> Planned:
        with _naming(stage):
            content = kinds.content(stage, self._filling(stage), self.digests)
        content["code"] = code_content(self.config.code)
        key = key_of(content)
        name = f"{stage.name}-{stage.objective}" if stage.objective else stage.name
        return Planned(stage, key, content, self.run_dir / "stages" / f"{name}-{key[:SHORT]}")

    def _filling(self, stage: Stage) -> kinds.Filling:
        return kinds.Filling(self._keys(stage), Path("-"), self.config.seed)

    def _keys(self, stage: Stage) -> Callable[[Reference], str]:
        """In place of a reference, the key of the stage that it means."""

        def fill(reference: Reference) -> str:
            target = self.chain.target(reference, stage, field=stage.field)
            if target.id is None:
                return str(target.path)
            step = "" if target.step is None else f" step {target.step}"
            return f"{STAGE}{target.id.partition('/')[2]} {self.planned[target.id].key[:SHORT]}{step}"

        return fill

    def _check_steps(self) -> None:
        """Refuses the model of a step that its stage will not have kept."""
        for planned in self.planned.values():
            stage = planned.stage
            for field, reference in references(stage.settings, field=stage.field):
                target = self.chain.target(reference, stage, field=field)
                if target.id is None or target.step is None:
                    continue
                producer = self.planned[target.id]
                if problem := kinds.step_problem(producer.stage, target.step, self._filling(producer.stage)):
                    found = f"{reference.text}, of a stage with {problem[0]}"
                    raise UserError(field, found, f"{problem[1]}, so that the step is kept")

    def command(self, planned: Planned) -> kinds.Command:
        """What a stage starts, with real paths."""
        stage = planned.stage

        def fill(reference: Reference) -> str:
            target = self.chain.target(reference, stage, field=stage.field)
            if target.id is None:
                return str(target.path)
            producer = self.planned[target.id]
            return str(kinds.result_place(producer.stage, producer.directory, target.step))

        return kinds.command(stage, kinds.Filling(fill, planned.directory, self.config.seed))

    def make_directory(self) -> None:
        """Makes the flywheel's directory, with its resolved file and what has been read for keys."""
        (self.run_dir / "stages").mkdir(parents=True, exist_ok=True)
        self.digests.save()
        write_atomic(self.run_dir / "config.yaml", self.resolved())

    def check_inputs(self, standing: dict[str, Standing]) -> None:
        """Refuses to begin without what a stage reads from outside: it would fail late, and under another key.

        Raises:
            UserError: naming the stage, its key and the path.
        """
        for id_, planned in self.planned.items():
            if planned.absent and standing[id_].status != "done":
                key, _, path = planned.absent[0].partition(" ")
                raise UserError(f"{id_}: {key}", f"nothing at {path}", "what the stage reads")

    def check_arguments(self, standing: dict[str, Standing]) -> None:
        """Refuses to begin where a stage that is not done names an argument that Megatron or TRL does not have.

        Raises:
            UserError: naming the stage and the argument.
        """
        for id_, planned in self.planned.items():
            if standing[id_].status != "done":
                with _naming(planned.stage):
                    kinds.check_arguments(planned.stage, self._filling(planned.stage))

    def check_jobs(self, standing: dict[str, Standing]) -> None:
        """Refuses to submit a stage whose engine submits a job of its own: 75 would requeue it until that has ended.

        Raises:
            UserError: naming the stage and the engine.
        """
        for id_, planned in self.planned.items():
            engine = kinds.job_of_its_own(planned.stage, self._filling(planned.stage))
            if engine and standing[id_].status != "done":
                found = f"{engine} with --slurm, which waits for a job of its own"
                raise UserError(f"{id_}: engine", found, "trl or command; or remit flywheel without --slurm")

    def token_data(self) -> list[str]:
        """Prefixes of all token files from outside, each once."""
        found = (kinds.token_data(one.stage, self._filling(one.stage)) for one in self.planned.values())
        return list(dict.fromkeys(prefix for prefixes in found for prefix in prefixes))

    def resolved(self) -> str:
        """The flywheel's file with what it starts from and what the command line says, as YAML."""
        content = dataclasses.asdict(self.config) | {"run_dir": str(self.run_dir)}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def consumed(self, planned: Planned) -> dict[str, str]:
        """Digests of the results that a stage takes, as they are now; of those that are done."""
        found = {}
        for id_ in planned.stage.needs:
            record = read_record(self.planned[id_].directory)
            if record is not None and record.status == "done":
                found[id_] = result_digest(record.outputs)
        return found

    def standing(self) -> dict[str, Standing]:
        """How every stage stands."""
        found: dict[str, Standing] = {}
        for planned in self.planned.values():
            found[planned.stage.id] = self._standing(planned, found)
        return found

    def _standing(self, planned: Planned, before: dict[str, Standing]) -> Standing:
        record = read_record(planned.directory)
        broken = [
            id_ for id_ in (*planned.stage.needs, *planned.stage.waits) if before[id_].status in ("failed", "blocked")
        ]
        if record is None or (record.status != "done" and broken):
            if broken:
                return Standing("blocked", record, f"needs {broken[0]}, which is {before[broken[0]].status}")
            return Standing("new", record)
        if record.status == "running" and is_alive(record.process) is False:
            return Standing("interrupted", record, "its process is gone; it goes on where it was")
        if record.status == "done" and self._taken_otherwise(planned, record):
            return Standing("outdated", record, self._taken_otherwise(planned, record))
        return Standing(record.status, record, record.note)

    def _taken_otherwise(self, planned: Planned, record: Record) -> str:
        """Which result a stage was made from is not there any more in that form; empty where all are."""
        for id_, digest in self.consumed(planned).items():
            if id_ in record.consumed and record.consumed[id_] != digest:
                return f"{id_} was made again since, and gave other contents"
        return ""


@dataclass(frozen=True)
class Standing:
    """How a stage stands.

    Attributes:
        status: ``new``, ``running``, ``interrupted``, ``stopped``, ``failed``, ``blocked``, ``outdated`` or ``done``.
        note: why, in words.
    """

    status: str
    record: Record | None = None
    note: str = ""

    @property
    def must_not_restart(self) -> bool:
        """Whether its command has said that starting it again would fail again."""
        return self.status == "failed" and self.record is not None and self.record.code == EXIT_DO_NOT_RESTART


@contextlib.contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """Puts the stage's name before what is wrong with its configuration."""
    try:
        yield
    except UserError as error:
        if error.field.startswith(stage.field):
            raise
        raise UserError(f"{stage.id}: {error.field}", error.found, error.expected) from None


def _texts(content: dict[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []

    def look(key: str, value: Any) -> None:
        if isinstance(value, str):
            found.append((key, value))
        elif isinstance(value, list):
            for item in value:
                look(key, item)

    for key, value in flattened(content).items():
        look(key, value)
    return found
