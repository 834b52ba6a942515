"""A table of faults, each met by a run that has a checkpoint.

Afterwards it is started again, and must end as the run that met none: the losses of every step, weights and optimizer
bit for bit. docs/reliability.md has the same table in words.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import REPOSITORY, write
from tests.integration.injected import FAULTS, Killed
from tests.integration.test_resume import losses, tensors

STEPS = 6
BEGUN = 3  # checkpoints of steps 2 and 3 are there when the fault comes
KILLED, ERROR = "killed", "error"


def start(words: list[str], fault: str | None = None) -> tuple[int | str, str]:
    """One rank of ``remit train`` that meets a fault: exit code (or ``killed``, ``error``), and what it said."""
    from remit_megatron.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            with FAULTS[fault]() if fault else contextlib.nullcontext():
                code: int | str = main(words)
        except Killed:
            code = KILLED
        except SystemExit as stop:
            code = stop.code or 0
        except Exception as error:
            said.write(f"{type(error).__name__}: {error}\n")
            code = ERROR
    return code, said.getvalue()


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """The second half is gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def newest(run: Path, pattern: str = "") -> Path:
    """The newest checkpoint, or its first file of a pattern."""
    directory = run / "checkpoints" / f"iter_{BEGUN:07d}"
    return sorted(directory.glob(pattern))[0] if pattern else directory


def empty_iteration(run: Path) -> None:
    """A save that was killed before it wrote anything."""
    (run / "checkpoints" / "iter_0000004").mkdir()


def older_too(run: Path) -> None:
    """Both checkpoints: from the beginning then."""
    for weights in (run / "checkpoints").glob("iter_*/__0_0.distcp"):
        flip(weights)


# What is done to the files of the run, and what the next start says of it ("" where nothing need be said).
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit of the weights flips": (lambda run: flip(newest(run, "*.distcp")), "skipping checkpoint 3"),
    "weights are cut short": (lambda run: cut(newest(run, "*.distcp")), "skipping checkpoint 3"),
    "weights vanish": (lambda run: newest(run, "*.distcp").unlink(), "skipping checkpoint 3"),
    "a bit of the index flips": (lambda run: flip(newest(run, ".metadata")), "skipping checkpoint 3"),
    "the description of the checkpoint vanishes": (
        lambda run: newest(run, "metadata.json").unlink(),
        "skipping checkpoint 3",
    ),
    "the tokenizer vanishes": (lambda run: newest(run, "hf/tokenizer.json").unlink(), "skipping checkpoint 3"),
    "the manifest vanishes": (lambda run: newest(run, "manifest.json").unlink(), "skipping checkpoint 3"),
    "the manifest is cut short": (lambda run: cut(newest(run, "manifest.json")), "skipping checkpoint 3"),
    "the manifest is empty": (lambda run: newest(run, "manifest.json").write_text(""), "skipping checkpoint 3"),
    "both checkpoints are damaged": (older_too, "skipping checkpoint 2"),
    "the newest checkpoint vanishes": (lambda run: shutil.rmtree(newest(run)), "resuming at step 2"),
    "a save left an empty directory": (empty_iteration, "skipping checkpoint 4"),
    "the pointer is garbage": (lambda run: (run / "checkpoints" / "latest").write_text("x"), ""),
    "Megatron's pointer names no checkpoint": (
        lambda run: (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("9"),
        "",
    ),
    "the pointers vanish": (lambda run: [path.unlink() for path in (run / "checkpoints").glob("latest*")], ""),
    "the last line of metrics.jsonl is half": (lambda run: cut_line(run / "metrics.jsonl"), ""),
    "events.jsonl is garbage": (lambda run: (run / "events.jsonl").write_bytes(b"\xff\0{"), ""),
    "config.yaml vanishes": (lambda run: (run / "config.yaml").unlink(), ""),
    "index files of the data are cut short": (
        lambda run: [cut(path) for path in (run / "data_cache").rglob("*.npy")],
        "",
    ),
    "index files of the data vanish": (lambda run: shutil.rmtree(run / "data_cache"), ""),
    "logs and curves vanish": (lambda run: [shutil.rmtree(run / name) for name in ("logs", "tensorboard")], ""),
}


def cut_line(path: Path) -> None:
    """As a process leaves it that was killed while it wrote."""
    with open(path, "a") as file:
        file.write('{"iteration": 4, "lm_lo')


@dataclass(frozen=True)
class Begun:
    """A run that has come to step ``BEGUN``, and one that has come to its end without a fault."""

    config: Path
    begun: Path
    straight: Path


@pytest.fixture(scope="module")
def runs(config_for, pool, tmp_path_factory) -> Begun:
    root = tmp_path_factory.mktemp("injected")
    config = config_for(root / "straight", train_iters=STEPS, eval_interval=2)
    config["data"]["num_workers"] = 0
    path = write(root / "run.yaml", config)
    assert pool.run(start, world_size=1, words=["train", str(path)])[0][0] == 0
    words = ["train", str(path), f"run_dir={root / 'begun'}", f"megatron.exit_interval={BEGUN}"]
    assert pool.run(start, world_size=1, words=words)[0][0] == 75
    assert (root / "begun" / "checkpoints" / f"iter_{BEGUN:07d}" / "manifest.json").exists()
    return Begun(path, root / "begun", root / "straight")


@pytest.fixture
def train(runs: Begun, pool, tmp_path) -> Callable[..., tuple[int | str, str]]:
    """Starts a copy of the begun run; ``train.run_dir`` is where it is."""
    shutil.copytree(runs.begun, tmp_path / "run")
    plain = ["train", str(runs.config), f"run_dir={tmp_path / 'run'}"]

    def on_a_rank(fault: str | None = None) -> tuple[int | str, str]:
        asynchronous = fault is not None and "asynchronous" in fault
        words = [*plain, *(["megatron.async_save=true"] if asynchronous else [])]
        return pool.run(start, world_size=1, words=words, fault=fault)[0]

    return on_a_rank


def assert_nothing_lost(run: Path, straight: Path) -> None:
    assert losses(run) == losses(straight)
    found, expected = tensors(run, STEPS), tensors(straight, STEPS)
    assert set(found) == set(expected) and len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(runs, train, tmp_path, name):
    damage, says = DAMAGE[name]
    damage(tmp_path / "run")
    code, said = train()
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert code == 0 and "Traceback" not in said, said
    assert says in said or says in log, said
    assert_nothing_lost(tmp_path / "run", runs.straight)


# What the start that meets the fault ends with, and says.
MET: list[tuple[str, int | str, str]] = [
    # Megatron's handler is there by then: the step is made and saved.
    ("SIGTERM while an asynchronous", 75, "which is saved; start it again to go on"),
    ("SIGTERM while the reference", 75, "which is saved; start it again to go on"),
    ("SIG(TERM|USR2) while", 75, "before the first step, nothing is lost; start it again to go on"),
    ("SIG(TERM|USR2|INT) (in|as)", 75, "which is saved; start it again to go on"),
    ("killed", KILLED, ""),
    ("the disk is full", 2, "run_dir: found 0B free at"),
    ("quota exceeded", 2, "Disk quota exceeded"),
    ("no space left", 2, "No space left on device"),
    ("the file system turns read-only", 2, "Read-only file system"),
    ("an input/output error", ERROR, "Input/output error"),
    ("a stale file handle", ERROR, "Stale file handle"),
    ("the clock", 0, ""),
    ("the student's loss", 70, "found lm_loss nan, the student's own loss"),
    ("the objective", 70, "found objective_loss nan"),
]


@pytest.mark.parametrize("name", FAULTS)
def test_faults_while_it_runs(runs, train, tmp_path, name):
    expected, says = next((code, says) for pattern, code, says in MET if re.match(pattern, name))
    code, said = train(name)
    assert code == expected and "Traceback" not in said, said
    assert says in said, said
    if code in (2, 70):
        assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, said
    if code:
        again, said = train()
        assert again == 0, said
    assert_nothing_lost(tmp_path / "run", runs.straight)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_second_run_in_the_directory(runs, train, tmp_path):
    with held(tmp_path / "run" / ".lock"):
        code, said = train()
    assert code == 2 and "a directory that no other run is using" in said
    assert train()[0] == 0
    assert_nothing_lost(tmp_path / "run", runs.straight)


def test_the_page_has_the_table():
    """docs/reliability.md names each fault, and their number."""
    page = (REPOSITORY / "docs" / "reliability.md").read_text()
    names = [*DAMAGE, *FAULTS, "a second run in the directory"]
    assert [name for name in names if f"| {name} |" not in page] == []
    assert len(names) >= 40 and f"{len(names)} of {len(names)}" in page


def test_the_table_is_about_a_run_that_moves(runs):
    """The runs that are compared differ from step to step."""
    records = [json.loads(line) for line in (runs.straight / "metrics.jsonl").read_text().splitlines()]
    assert len({record["lm_loss"] for record in records}) == STEPS
