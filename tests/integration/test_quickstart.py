"""``remit quickstart`` whole, at a few steps a training: killed on the way, gone on with, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # a whole chain of stages

REPOSITORY = Path(__file__).resolve().parents[2]
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEPS = 4


def start(place: Path, log: Path, *words: object) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    environment["PYTHONPATH"] = str(REPOSITORY)
    with log.open("a") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "remit_megatron", *map(str, words)],
            cwd=place, env=environment, stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(place: Path, log: Path, *words: object) -> str:
    assert start(place, log, *words).wait(timeout=600) == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """A working directory with runs/quickstart; killed while the base's first arms train, then started again."""
    pytest.importorskip("trl")
    place = tmp_path_factory.mktemp("quickstart")
    output, log = place / "runs/quickstart", place / "first.log"
    process = start(place, log, "quickstart", "--steps", STEPS)
    try:
        deadline = time.monotonic() + 400
        while not (output / "ntp/metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    records = [output / "stages" / f"{name}.json" for name in ("text", "data", "base")]
    before = [record.stat().st_mtime_ns for record in records]
    said = finish(place, place / "second.log", "quickstart", "--steps", STEPS)
    assert "] Base: " in log.read_text() and "] Base: " not in said  # what was complete does not run again
    assert [record.stat().st_mtime_ns for record in records] == before
    return place


def test_results_report_and_commands(quickstart: Path) -> None:
    output = quickstart / "runs/quickstart"
    results = json.loads((output / "results.json").read_text())
    assert {"arms", "after_rl", "seed"} <= set(results)
    assert {tuple(scores) for scores in results["arms"].values()} == {("greedy", "sampled", "book")}
    assert {name: len(curve) for name, curve in results["after_rl"].items()} == {"ntp": 2, "remit": 2}
    page = (output / "report.html").read_text()
    assert "What came out" in page and results["reference_check"].split(":")[0] in page
    assert (output / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    for arm, objective in {"ntp": "ntp", "remit": "remit", "rho1": "rho1", "kd": "kd", "control": "remit"}.items():
        lines = [json.loads(line) for line in (output / arm / "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == list(range(1, STEPS + 1))
        assert f"name: {objective}\n" in (output / arm / "config.yaml").read_text()
    # Real reinforcement learning: a reward at every step, and another model than the base.
    lines = [json.loads(line) for line in (output / "rlvr/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, STEPS + 1))
    assert all(0 <= line["reward_mean"] <= 1 for line in lines)
    commands = (output / "commands.txt").read_text().splitlines()
    assert sum(line.startswith("remit train ") for line in commands) == 6
    assert sum(line.startswith("remit posttrain rlvr ") for line in commands) == 3


def test_once_more_runs_nothing_and_says_the_same(quickstart: Path) -> None:
    said = finish(quickstart, quickstart / "third.log", "quickstart", "--steps", STEPS)
    assert "] " not in said.replace("[seed", "")

    def table(text: str) -> str:
        return text[text.index("  model ") : text.index("runs/quickstart/report.html")]

    assert table(said) == table((quickstart / "second.log").read_text())


def test_other_settings_in_the_same_place_are_refused(quickstart: Path) -> None:
    log = quickstart / "refused.log"
    assert start(quickstart, log, "quickstart", "--quick").wait(timeout=120) == 2
    assert log.read_text() == (
        "error: --output: found runs/quickstart, made with other settings; expected another directory, or --fresh\n"
    )


def test_the_main_job_of_the_readme(quickstart: Path) -> None:
    """On what the quickstart left behind, on two ranks."""
    short = ("megatron.train_iters=2", "megatron.lr_warmup_iters=0")
    words = ("train", "configs/runs/quickstart_remit.yaml", "--nproc", 2, *short)
    finish(quickstart, quickstart / "job.log", *words)
    lines = [json.loads(line) for line in (quickstart / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[-1]["weight_std"] is not None
