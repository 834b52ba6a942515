"""Flywheels of small programs: real processes that go on from what they find, and cost no imports."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# worker.py OUTPUT STEPS SECONDS [WORDS]: a line a step; goes on behind the lines that are there; the result when all
# are. Its code is in the file beside the output where there is one.
WORKER = """
import pathlib, sys, time
output, steps, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
code = output.with_name("code")
if code.exists():
    print("error: told to fail")
    sys.exit(int(code.read_text()))
lines = output.with_name("lines")
for number in range(len(lines.read_text().splitlines()) if lines.exists() else 0, steps):
    time.sleep(seconds)
    with open(lines, "a") as file:
        file.write(f"{number}\\n")
read = [pathlib.Path(word) for word in sys.argv[4:]]
content = [file.read_text() if file.is_file() else str(file) for file in read]
output.write_text("\\n".join([lines.read_text(), *content]))
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def worker(elsewhere) -> Callable[..., dict[str, Any]]:
    """A stage that runs the worker on what other stages gave."""
    (elsewhere / "worker.py").write_text(WORKER)

    def build(*words: str, steps: int = 1, seconds: float = 0.0, **more: Any) -> dict[str, Any]:
        command = [sys.executable, "worker.py", "{output}", steps, seconds, *words]
        return {"kind": "command", "words": command, **more}

    return build


@pytest.fixture
def flywheel(elsewhere) -> Callable[..., str]:
    """Writes the file of a flywheel; returns its name."""

    def write(stages: dict[str, Any], **more: Any) -> str:
        Path("flywheel.yaml").write_text(json.dumps({"run_dir": "out", "stages": stages, **more}))
        return "flywheel.yaml"

    return write


def events(directory: str | Path = "out") -> list[tuple[str, str]]:
    """(event, stage) of a flywheel's log, in order."""
    lines = (Path(directory) / "events.jsonl").read_text().splitlines()
    return [(line["event"], line["stage"]) for line in map(json.loads, lines)]
