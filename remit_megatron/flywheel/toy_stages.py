"""Stages of the toy chains: which of them can start, in children of this process, as many at a time as there are cores.

A stage that is complete has a record with its key, the digest of what it does and of the keys of what it needs; it is
not run again. One that was stopped goes on inside where its command can, and begins again where it cannot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from remit_megatron.runtime import stop, warm
from remit_megatron.runtime.errors import EXIT_DONE, EXIT_START_ME_AGAIN
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.progress import format_duration

# What a child's command imports, loaded once in this process before the child is forked.
MEGATRON = (
    "remit_megatron.training.command",
    "remit_megatron.training.engine",
    "remit_megatron.conversion.command",
    "remit_megatron.conversion.to_huggingface",
    "remit_megatron.conversion.to_megatron",
    "remit_megatron.scoring.check_reference",
    "megatron.training",
    "megatron.training.argument_utils",
    "transformers.models.llama.modeling_llama",
)
TRL = (
    "datasets",
    "trl.trainer.grpo_trainer",
    "remit_megatron.posttrain.command",
    "remit_megatron.posttrain.trl_engine",
)


@dataclass(frozen=True)
class Command:
    """``remit WORDS``.

    Attributes:
        words: of the command line.
        reads: content of files of ours that the command reads, such as a configuration; part of the key.
    """

    words: tuple[object, ...]
    reads: str = ""

    def work(self) -> warm.Work:
        """What the child does."""
        return warm.command(self.words)

    def key(self) -> list[Any]:
        """What decides its result."""
        return [*map(str, self.words), self.reads]


@dataclass(frozen=True)
class Call:
    """A function of this package with arguments that JSON can hold (paths as text)."""

    function: Callable[..., None]
    arguments: Mapping[str, Any]

    def work(self) -> warm.Work:
        """What the child does."""
        return lambda: self.function(**self.arguments)

    def key(self) -> list[Any]:
        """What decides its result."""
        return [self.function.__qualname__, json.loads(json.dumps(dict(self.arguments), default=str))]


@dataclass(frozen=True)
class Stage:
    """A part of a chain, done by one child.

    Attributes:
        name: a path below the folder of records and logs.
        about: what the terminal says when it starts; empty says nothing.
        steps: one after the other; the first that fails ends it.
        needs: names of stages that come before.
        loads: modules that its commands import.
        outputs: removed before it begins anew.
        resumes: whether its command goes on from what a stopped one left in ``outputs``.
        tells: a JSON file of its own whose ``verdict`` the terminal says when it is done.
        seconds: that it takes on a quiet machine, for the time that is said to be left.
    """

    name: str
    about: str
    steps: tuple[Command | Call, ...]
    needs: tuple[str, ...] = ()
    loads: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    resumes: bool = False
    tells: Path | None = None
    seconds: float = 5.0


@dataclass
class Stages:
    """The stages of one directory.

    Args:
        root: records go to ``stages/``, logs to ``logs/`` below it.
        stages: in the order in which they start where several can; each after those it needs.
        cores: children at a time, a thread each.
        write: a line for the terminal.
    """

    root: Path
    stages: Sequence[Stage]
    cores: int
    write: Callable[[str], None]
    _keys: dict[str, str] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _running: dict[str, warm.Child] = field(default_factory=dict)
    _stopped: bool = False

    def run(self) -> int:
        """Runs what is not complete. Returns 0, 75 after a signal, or the exit code of the first stage that failed."""
        for stage in self.stages:
            keys = [self._keys[name] for name in stage.needs]
            content = json.dumps([[step.key() for step in stage.steps], keys])
            self._keys[stage.name] = hashlib.sha256(content.encode()).hexdigest()
        self._done = {stage.name for stage in self.stages if self._complete(stage)}
        self._started, self._ran = time.monotonic(), 0.0
        try:
            with _on_signal(self._stop):
                return self._loop()
        finally:
            for child in self._running.values():
                child.stop()

    def seconds(self) -> dict[str, float]:
        """How long each complete stage took."""
        return {stage.name: self._record(stage)["seconds"] for stage in self.stages if self._complete(stage)}

    def _loop(self) -> int:
        while len(self._done) < len(self.stages):
            if self._stopped:
                self.write("stopped; start it again to go on")
                return EXIT_START_ME_AGAIN
            for name, child in list(self._running.items()):
                code = child.poll()
                if code is None:
                    continue
                del self._running[name]
                stage = next(stage for stage in self.stages if stage.name == name)
                if code != EXIT_DONE:
                    return self._failed(stage, child, code)
                write_atomic(
                    self._place(stage), json.dumps({"key": self._keys[name], "seconds": round(child.seconds or 0, 1)})
                )
                if stage.tells is not None:
                    self.write(f"      {json.loads(stage.tells.read_text())['verdict']}")
                self._ran += stage.seconds
                self._done.add(name)
            ready = self._ready()
            if ready is not None and len(self._running) < self.cores:
                self._start(ready)
            else:
                time.sleep(0.02)
        return EXIT_DONE

    def _ready(self) -> Stage | None:
        begun = self._done | self._running.keys()
        return next((s for s in self.stages if s.name not in begun and self._done.issuperset(s.needs)), None)

    def _start(self, stage: Stage) -> None:
        if stage.loads:
            _load(stage.loads)
        place = self._place(stage)
        begun = place.with_suffix(".begun")
        goes_on = stage.resumes and begun.exists() and begun.read_text() == self._keys[stage.name]
        if not goes_on:
            for path in stage.outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(begun, self._keys[stage.name])
        if stage.about:
            self.write(f"[{format_duration(time.monotonic() - self._started)}{self._left()}] {stage.about}")
        steps = [step.work() for step in stage.steps]
        self._running[stage.name] = warm.Child(lambda: _one_after_the_other(steps), self._log(stage))

    def _left(self) -> str:
        """How long it takes from here, by what the stages took so far; nothing before there is something to go by."""
        whole = sum(stage.seconds for stage in self.stages if stage.name not in self._done)
        spent = time.monotonic() - self._started
        if not self._ran or spent < 15:
            return ""
        return f", about {format_duration(whole * spent / self._ran)} left"

    def _failed(self, stage: Stage, child: warm.Child, code: int) -> int:
        if self._stopped and code in (EXIT_START_ME_AGAIN, 128 + signal.SIGTERM):
            return EXIT_START_ME_AGAIN
        lines = child.log.read_text(errors="replace").strip().splitlines()[-12:]
        self.write(f"{stage.name} failed (exit code {code}); the end of {child.log}:")
        for line in lines:
            self.write(f"  {line}")
        return code

    def _stop(self) -> None:
        self._stopped = True

    def _place(self, stage: Stage) -> Path:
        return self.root / "stages" / f"{stage.name}.json"

    def _log(self, stage: Stage) -> Path:
        return self.root / "logs" / f"{stage.name}.log"

    def _record(self, stage: Stage) -> dict[str, Any]:
        return json.loads(self._place(stage).read_text())

    def _complete(self, stage: Stage) -> bool:
        place = self._place(stage)
        if not place.exists() or not all(path.exists() for path in stage.outputs):
            return False
        return self._record(stage)["key"] == self._keys[stage.name]


def _one_after_the_other(steps: Sequence[warm.Work]) -> int:
    for step in steps:
        if code := step():
            return code
    return EXIT_DONE


def _load(modules: tuple[str, ...]) -> None:
    missing = [module for module in modules if module not in sys.modules]
    if missing:
        if any(module in MEGATRON for module in missing):
            import patches

            patches.apply()
        warm.load(missing)


@contextlib.contextmanager
def _on_signal(ask: Callable[[], None]) -> Iterator[None]:
    def handler(_: int, __: FrameType | None) -> None:
        ask()

    with stop.handled_by(dict.fromkeys((signal.SIGINT, *stop.stop_signals()), handler)):
        yield
