"""Stop signals before a command's own modules are imported, and after it is over."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from remit_megatron import cli
from remit_megatron.runtime.first_signals import STOPPED
from tests.moments import moment

TERM, USR2, HUP = signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP
AGAIN = "nothing is lost; start it again to go on"


@pytest.fixture(autouse=True)
def a_terminal() -> Iterator[None]:
    """nohup may have started the tests."""
    before = signal.signal(HUP, signal.SIG_DFL)
    yield
    signal.signal(HUP, before)


def run(folder: Path, what: str, number: signal.Signals, *words: str, **environment: str):
    """``remit WORDS`` that gets a signal at a moment."""
    variables = moment(folder, environment.get("RANK", "launcher"), what, number) | environment
    command = [sys.executable, "-m", "remit_megatron", *words]
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("what", ["remit_megatron.cli", "argparse", "remit_megatron.runtime.stop"])
@pytest.mark.parametrize("number", [TERM, USR2, HUP])
def test_a_stop_before_there_is_a_command(tmp_path: Path, what: str, number: signal.Signals) -> None:
    found = run(tmp_path, what, number, "train", "nothing.yaml")
    assert (found.returncode, found.stderr) == (75, f"stopped by {number.name} before the first step, {AGAIN}\n")


@pytest.mark.parametrize(("words", "when"), [(("data", "build"), "before the end"), (("flywheel", "x"), "before its")])
def test_other_commands_say_it_in_their_words(tmp_path: Path, words: tuple[str, ...], when: str) -> None:
    found = run(tmp_path, "argparse", TERM, *words)
    assert found.returncode == 75 and found.stderr.startswith(f"stopped by SIGTERM {when}"), found.stderr


def test_a_command_that_only_reads_is_ended_by_the_signal(tmp_path: Path) -> None:
    assert run(tmp_path, "argparse", TERM, "status", "nothing").returncode == -TERM


def test_who_is_to_outlive_its_terminal(tmp_path: Path) -> None:
    """As nohup starts it."""
    signal.signal(HUP, signal.SIG_IGN)
    found = run(tmp_path, "argparse", HUP, "train", "nothing.yaml")
    assert found.returncode == 2 and "nothing.yaml" in found.stderr


@pytest.mark.parametrize("number", [TERM, USR2, HUP])
def test_a_stop_at_the_end_changes_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """The exit code says how the command has ended, whatever comes while the interpreter is taken down."""
    found = run(tmp_path, "end", number, "train", "nothing.yaml")
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1, found.stderr


def test_every_command_that_writes_can_be_stopped() -> None:
    """What is not in the table ends with 143; those only read, or write one file at once."""
    words = {*cli._COMMANDS, *cli._GROUPS}
    assert words - STOPPED.keys() == {"doctor", "plan", "status", "report", "analyze"}
    assert STOPPED.keys() <= words


@pytest.mark.parametrize("name", ["first_signals.py", "__init__.py"])
def test_what_comes_before_is_little(name: str) -> None:
    """No import that takes longer than the interpreter's own start: before it a signal ends the process with 143."""
    text = (Path(cli.__file__).parent / "runtime" / name).read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"os", "signal", "collections"}
