"""A flywheel runs what has to run, once: after a change, a failure, a signal, a kill, an edited result."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remit_megatron.flywheel.plan import Plan
from remit_megatron.flywheel.runner import Runner
from remit_megatron.flywheel.starting import MARK
from remit_megatron.flywheel.state import explain, status, status_text
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.locks import DirectoryLock
from tests.unit.flywheel.conftest import events

REPOSITORY = Path(__file__).resolve().parents[3]


def run(path: str, *overrides: str, **options) -> int:
    return Runner(Plan(path, overrides), **options).run()


def directory(path: str, stage: str, *overrides: str) -> Path:
    return Plan(path, overrides).planned[f"round1/{stage}"].directory


@pytest.fixture
def three(worker, flywheel) -> str:
    """b and c take what a gave."""
    stages = {"a": worker("{seed}"), "b": worker("${stage:a}"), "c": worker("${stage:a}", "more")}
    return flywheel(stages, seed=7)


def test_in_order_once(three) -> None:
    assert run(three) == 0
    assert events() == [(event, f"round1/{name}") for name in "abc" for event in ("started", "done")]
    assert (directory(three, "c") / "output").read_text() == "0\n\n0\n\n7\nmore"
    assert run(three) == 0
    assert len(events()) == 6
    state = json.loads(Path("out/state.json").read_text())
    assert {one["status"] for one in state["stages"].values()} == {"done"}
    results = json.loads(Path("out/results.json").read_text())
    assert results["seed"] == 7 and list(results["stages"]) == ["round1/a", "round1/b", "round1/c"]
    assert "<html" in Path("out/report.html").read_text()


def test_what_changed_is_a_new_directory_and_says_why(three, capsys) -> None:
    assert run(three) == 0
    before = directory(three, "a")
    text = explain(Plan(three, ["seed=8"]), "b")
    assert "round1/b: new" in text and "stage a" in text and "round1/a is new, too" in text
    assert "words: ['" in explain(Plan(three, ["seed=8"]), "a") and "-> ['" in explain(Plan(three, ["seed=8"]), "a")
    assert run(three, "seed=8") == 0
    assert len(events()) == 12 and (before / "output").read_text() == "0\n\n7"
    assert (directory(three, "a", "seed=8") / "output").read_text() == "0\n\n8"
    # A program that a stage names is part of it, by its content.
    Path("worker.py").write_text(Path("worker.py").read_text() + "# changed\n")
    found = explain(Plan(three), "a")
    assert "new" in found and "files." in found


def test_a_failed_stage_stops_what_needs_it_and_nothing_else(worker, flywheel, capsys) -> None:
    path = flywheel({"a": worker(), "b": worker("${stage:a}"), "c": worker("x"), "d": worker("${stage:b}")})
    broken = directory(path, "a")
    broken.mkdir(parents=True)
    (broken / "code").write_text("2")
    assert run(path) == 2
    said = capsys.readouterr().out
    assert re.search(r"round1/a: failed in \d+:\d+, exit code 2: told to fail", said)
    assert "round1/b: not run, it needs round1/a" in said and "round1/d: not run, it needs round1/b" in said
    found = status(Plan(path))["stages"]
    assert [found[f"round1/{name}"]["status"] for name in "abcd"] == ["failed", "blocked", "done", "blocked"]
    assert "round1/b: needs round1/a, which is failed" in status_text(Plan(path))
    (broken / "code").unlink()
    assert run(path) == 0
    assert [event for event in events() if event[1] == "round1/c"] == [("started", "round1/c"), ("done", "round1/c")]


def test_what_must_not_be_restarted_is_not_unless_asked(worker, flywheel) -> None:
    path = flywheel({"a": worker()})
    broken = directory(path, "a")
    broken.mkdir(parents=True)
    (broken / "code").write_text("70")
    assert run(path) == run(path) == 70
    assert events() == [("started", "round1/a"), ("failed", "round1/a")]
    (broken / "code").unlink()
    assert run(path) == 70
    assert run(path, retry=True) == 0


def test_stopped_on_purpose_stops_the_chain(worker, flywheel) -> None:
    path = flywheel({"a": worker(), "b": worker("x")})
    stopped = directory(path, "a")
    stopped.mkdir(parents=True)
    (stopped / "code").write_text("75")
    assert run(path) == 75
    assert events() == [("started", "round1/a"), ("stopped", "round1/a")]
    (stopped / "code").unlink()
    assert run(path) == 0


def test_a_command_that_leaves_nothing_has_failed(flywheel) -> None:
    path = flywheel({"a": {"kind": "command", "words": [sys.executable, "-c", "pass"]}})
    assert run(path) == 70
    assert "ended with 0, but there is nothing at" in status(Plan(path))["stages"]["round1/a"]["note"]
    assert run(flywheel({"a": {"kind": "command", "words": ["no-such-program"]}})) == 127


def test_an_edited_result_is_found_and_named(three) -> None:
    assert run(three) == 0
    output = directory(three, "a") / "output"
    stat = output.stat()
    os.utime(output)  # touched: the content counts
    assert run(three) == 0
    output.write_text("1\n\n7")
    with pytest.raises(UserError, match=r"round1/a: .*/output: found sha256 .*put it back, or remove out/stages/a-"):
        run(three)
    os.utime(output, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time as they were
    Plan(three)
    record = json.loads((directory(three, "a") / "stage.json").read_text())
    record["outputs"]["output"][1] = stat.st_mtime_ns
    (directory(three, "a") / "stage.json").write_text(json.dumps(record))
    assert run(three) == 0
    with pytest.raises(UserError, match="found sha256"):
        run(three, verify=True)
    output.unlink()
    with pytest.raises(UserError, match="found no file; expected 4 bytes"):
        run(three)
    assert events()[-1] == ("changed", "round1/a")


def test_made_again_with_other_contents_takes_what_was_made_from_it_along(flywheel, elsewhere) -> None:
    (elsewhere / "draw.py").write_text("import os,sys; open(sys.argv[1], 'w').write(os.urandom(8).hex())")
    (elsewhere / "copy.py").write_text("import sys; open(sys.argv[1], 'w').write(open(sys.argv[2]).read())")
    path = flywheel(
        {
            "draw": {"kind": "command", "words": [sys.executable, "draw.py", "{output}"]},
            "copy": {"kind": "command", "words": [sys.executable, "copy.py", "{output}", "${stage:draw}"]},
        }
    )
    assert run(path) == 0
    first, copied = directory(path, "draw"), directory(path, "copy")
    old = (copied / "output").read_text()
    for file in first.iterdir():
        file.unlink()
    first.rmdir()
    assert run(path) == 0
    assert (copied / "output").read_text() == (first / "output").read_text() != old
    aside = copied.with_name(f"{copied.name}.before-1")
    assert (aside / "output").read_text() == old and ("set aside", "round1/copy") in events()


def test_a_step_is_one_stage_and_needs_those_before(three) -> None:
    def step(name: str, **options) -> int:
        plan = Plan(three)
        return Runner(plan).step(plan.chain.find(name), **options)

    with pytest.raises(UserError, match=r"stages\.b: found round1/a, which is new; expected a stage that is done"):
        step("b")
    assert step("a") == step("a") == 0
    assert events() == [("started", "round1/a"), ("done", "round1/a")]
    with pytest.raises(UserError, match=r"key of round1/b: found .* as it was submitted"):
        step("b", key="0" * 64)
    assert step("b", key=Plan(three).planned["round1/b"].key) == 0
    assert not Path("out/results.json").exists()
    assert step("c") == 0 and Path("out/results.json").exists()  # the last one


def test_one_at_a_time(three) -> None:
    lock = DirectoryLock(Path("out"))
    with pytest.raises(UserError, match=r"run_dir: found out, in use by process"):
        run(three)
    lock.release()
    held = DirectoryLock(directory(three, "a"))
    with pytest.raises(UserError, match=r"round1/a: found out/stages/a-.* in use by process"):
        run(three)
    held.release()
    assert run(three) == 0


class Started:
    """``remit flywheel …`` in a process of its own."""

    def __init__(self, *words: str):
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", MARK)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "remit_megatron", "flywheel", *words],
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=60)[0]
        return self.process.returncode, said


def test_a_signal_reaches_the_stage_and_the_next_start_goes_on(worker, flywheel) -> None:
    path = flywheel({"a": worker(steps=30, seconds=0.1), "b": worker("${stage:a}")})
    lines = directory(path, "a") / "lines"
    started = Started(path)
    started.wait_for(lines)
    started.process.send_signal(signal.SIGTERM)
    code, said = started.end()
    assert code == 75 and said.splitlines()[-1] == "stopped before the end; start it again to go on"
    done = len(lines.read_text().splitlines())
    assert 0 < done < 30
    assert status(Plan(path))["stages"]["round1/a"]["status"] == "stopped"
    assert run(path) == 0
    assert [line for line in lines.read_text().split()] == [str(number) for number in range(30)]


def test_what_a_killed_flywheel_left_running_is_ended_first(worker, flywheel, capsys) -> None:
    path = flywheel({"a": worker(steps=40, seconds=0.1)})
    lines = directory(path, "a") / "lines"
    started = Started(path)
    started.wait_for(lines)
    started.process.kill()
    started.process.wait()
    assert status(Plan(path))["stages"]["round1/a"]["status"] == "interrupted"
    before = len(lines.read_text())
    time.sleep(0.5)
    assert len(lines.read_text()) > before  # its stage runs on
    assert run(path) == 0
    assert "ended 1 processes that an earlier start had left behind" in capsys.readouterr().out
    # Two at once would have written numbers twice.
    assert lines.read_text().split() == [str(number) for number in range(40)]
