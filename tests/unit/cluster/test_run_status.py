"""What ``remit status`` says of run directories in every state, written as the run itself writes them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from remit_megatron.cli import main
from remit_megatron.cluster.run_status import run_status, status_text
from remit_megatron.run.events import RunEvents
from remit_megatron.runtime.checkpoints import iteration_directory, write_manifest
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.locks import Holder

NOW = time.time()


class Run:
    """A run directory of 100 steps of 2 s each."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        (folder / "config.yaml").write_text("megatron: {train-iters: 100, global_batch_size: 4}\n")

    def events(self) -> RunEvents:
        """As a start of ``remit train`` has them."""
        return RunEvents(self.folder, writes=True)

    def steps(self, first: int, last: int, *, age: float = 0.0, **changes) -> None:
        """The last of them was finished ``age`` seconds ago."""
        path = self.folder / "metrics.jsonl"
        with open(path, "a") as file:
            for iteration in range(first, last + 1):
                record = {"iteration": iteration, "consumed_tokens": 1000 * iteration, "lm_loss": 2.5, "grad_norm": 1.0}
                record |= {"step_seconds": 2.0, "reference_seconds": 0.5, "tokens_per_second": 500.0, "tflops": 1.5}
                record |= {"mfu": None, "memory_gib": None, "dropped_tokens": 3}
                file.write(json.dumps(record | changes) + "\n")
        os.utime(path, (NOW - age, NOW - age))

    def checkpoint(self, iteration: int, *, complete: bool = True) -> None:
        directory = iteration_directory(self.folder / "checkpoints", iteration)
        directory.mkdir(parents=True)
        (directory / "weights").write_text("w")
        if complete:
            write_manifest(directory, iteration=iteration)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_run_that_goes_on(run: Run, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run.events().start(step=0, ranks=4)
    run.steps(1, 60, age=5)
    run.checkpoint(40)
    run.checkpoint(60, complete=False)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 61, "lm_l')  # is being written
    os.utime(run.folder / "metrics.jsonl", (NOW - 5, NOW - 5))
    found = run_status(run.folder, now=NOW)
    assert (found.state, found.step, found.total_steps, found.seconds_left) == ("running", 60, 100, 80.0)
    assert (found.tokens_per_second, found.tokens_per_second_per_rank, found.reference_share) == (500.0, 125.0, 0.25)
    assert (found.checkpoint, found.incomplete_checkpoints) == (40, [60])
    assert (found.job, found.ranks, found.dropped_tokens, found.starts, found.crashes) == ("77", 4, 180, 1, 0)
    said = status_text(found)
    for part in ("60 of 100 (60.0%)", "1:20 of training", "step 40, ", "60 not complete", "job 77", "25.0% of a step"):
        assert part in said, said


def test_starts_stops_and_crashes(run: Run) -> None:
    first = run.events()
    first.start(step=0, ranks=2)
    first.end(step=20, code=75)
    run.events().start(step=20, ranks=2)  # killed
    third = run.events()
    third.handle(logging.LogRecord("remit_megatron.run", logging.WARNING, "", 0, "skipping %d", (30,), None))
    third.handle(logging.LogRecord("other.library", logging.WARNING, "", 0, "noise", None, None))
    third.start(step=20, ranks=2)
    third.end(step=25, reason="RuntimeError: connection closed")
    run.steps(1, 25, age=1000)
    found = run_status(run.folder, now=NOW)
    assert (found.state, found.starts, found.stops, found.crashes) == ("crashed", 3, 1, 2)
    texts = [fault.text for fault in found.faults]
    assert len(texts) == 3 and "start 2 on" in texts[0] and texts[1] == "skipping 30"
    assert texts[2] == "step 25: RuntimeError: connection closed"
    assert "3, 1 stopped on purpose, 2 crashed" in status_text(found)


@pytest.mark.parametrize(
    ("code", "state"), [(0, "done"), (75, "stopped"), (70, "failed")], ids=["done", "stopped", "failed"]
)
def test_how_it_ended(run: Run, code: int, state: str) -> None:
    events = run.events()
    events.start(step=0, ranks=1)
    run.steps(1, 10)
    events.end(step=10, code=code, **({"reason": "DoNotRestart: step 10"} if code == 70 else {}))
    found = run_status(run.folder, now=NOW)
    assert (found.state, found.crashes) == (state, 0)


def test_a_run_that_says_nothing_any_more(run: Run) -> None:
    run.events().start(step=0, ranks=1)
    assert run_status(run.folder, now=NOW + 30).state == "starting"
    assert run_status(run.folder, now=NOW + 3600).state == "quiet"
    run.steps(1, 3, age=-1)
    assert run_status(run.folder, now=NOW + 30).state == "running"
    assert run_status(run.folder, now=NOW + 3600).state == "quiet"
    run.steps(4, 6, age=-1, step_seconds=1000.0)
    assert run_status(run.folder, now=NOW + 3600).state == "running", "long steps are no silence"


HOLDS = """
import sys, time
from pathlib import Path
from remit_megatron.runtime.locks import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def test_what_the_holder_of_the_directory_tells(run: Run) -> None:
    """The set-up of a new run and of one that goes on, and a run that is killed, before anybody starts it again."""
    config = run.folder / "config.yaml"
    text = config.read_text()
    config.unlink()
    with pytest.raises(UserError, match=r"no config\.yaml"):
        run_status(run.folder, now=NOW)
    command = [sys.executable, "-c", HOLDS, str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        assert run_status(run.folder, now=NOW).state == "starting" and "starting" in status_text(
            run_status(run.folder, now=NOW)
        )
        config.write_text(text)
        assert run_status(run.folder, now=NOW).state == "starting"
        run.steps(1, 10, age=1)
        events = run.events()
        events.start(step=0, ranks=1)
        assert run_status(run.folder, now=NOW).state == "running"
        events.end(step=10, code=75)
        assert run_status(run.folder, now=NOW).state == "starting", (
            "the one that is stopped has let go of the directory"
        )
        run.events().start(step=10, ranks=1)
        run.steps(11, 20, age=1)
        assert run_status(run.folder, now=NOW).state == "running"
        holder.kill()
    found = run_status(run.folder, now=NOW)
    assert (found.state, found.crashes, found.stops) == ("crashed", 1, 1)


def test_a_holder_on_another_machine(run: Run) -> None:
    """It is known by the age of its file alone."""
    run.events().start(step=0, ranks=1)
    run.steps(1, 10, age=1)
    holder = run.folder / ".lock.3"
    holder.write_text(json.dumps(asdict(replace(Holder.this_process(run.folder), machine="another"))))
    for age, state in ((1.0, "running"), (600.0, "running"), (4000.0, "crashed")):
        os.utime(holder, (NOW - age, NOW - age))
        assert run_status(run.folder, now=NOW).state == state
    assert run_status(run.folder, now=NOW + 400).state == "crashed"
    os.utime(holder, (NOW, NOW))
    assert run_status(run.folder, now=NOW + 400).state == "quiet", "it can only be watched"


def test_a_run_of_an_earlier_version(run: Run) -> None:
    """Without events; its last checkpoint says that it is done."""
    run.steps(1, 100, age=86400)
    run.checkpoint(100)
    found = run_status(run.folder, now=NOW)
    assert (found.state, found.starts, found.ranks) == ("done", 0, None)
    assert "1d 00:00:00 ago" in status_text(found)


def test_nothing_is_written_before_the_start(run: Run) -> None:
    events = run.events()
    events.handle(logging.LogRecord("remit_megatron", logging.WARNING, "", 0, "refused soon", None, None))
    events.end(step=0, code=2)
    assert not (run.folder / "events.jsonl").exists()


def test_the_command(run: Run, tmp_path: Path, capsys) -> None:
    run.steps(1, 5)
    assert main(["status", str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 5
    assert main(["status", str(run.folder), str(run.folder), "--json"]) == 0
    assert [entry["step"] for entry in json.loads(capsys.readouterr().out)] == [5, 5]
    assert main(["status", str(run.folder)]) == 0
    assert "5 of 100 (5.0%)" in capsys.readouterr().out
    assert main(["status", str(tmp_path)]) == 2
    assert "which has no config.yaml; expected the run_dir" in capsys.readouterr().err
