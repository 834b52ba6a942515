"""Stages in children: their order, what is run again and what is not, failures and signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from remit_megatron.flywheel.toy_stages import Call, Stage, Stages


def append(path: str, word: str) -> None:
    with Path(path).open("a") as file:
        file.write(word + "\n")


def make(path: str) -> None:
    place = Path(path)
    place.mkdir(exist_ok=True)
    (place / f"{len(list(place.iterdir()))}").touch()


def fail(code: int) -> None:
    raise SystemExit(code)


def overlap(path: str, word: str) -> None:
    append(path, f"{word} begins")
    time.sleep(0.4)
    append(path, f"{word} ends")


def stage(name: str, place: Path, *needs: str, word: str | None = None) -> Stage:
    return Stage(name, f"about {name}", (Call(append, {"path": str(place), "word": word or name}),), needs=needs)


def run(root: Path, *stages: Stage, cores: int = 2) -> tuple[int, list[str]]:
    said: list[str] = []
    return Stages(root, stages, cores, said.append).run(), said


def test_order_and_records(tmp_path) -> None:
    """Each after what it needs; a second start runs nothing; a stage that changed runs again with what needs it."""
    log = tmp_path / "words"
    chain = (stage("a", log), stage("deep/b", log, "a"), stage("c", log, "deep/b"), stage("d", log, "a"))
    code, said = run(tmp_path, *chain, cores=1)
    assert code == 0 and log.read_text().split() == ["a", "deep/b", "c", "d"]
    assert [line.partition("] ")[2] for line in said] == ["about a", "about deep/b", "about c", "about d"]
    assert run(tmp_path, *chain) == (0, [])
    changed = (chain[0], stage("deep/b", log, "a", word="other"), *chain[2:])
    assert run(tmp_path, *changed)[0] == 0
    assert log.read_text().split()[4:] == ["other", "c"]


def test_as_many_at_a_time_as_cores(tmp_path) -> None:
    def at_once(cores: int) -> int:
        log = tmp_path / f"words{cores}"
        stages = [Stage(f"s{n}", "", (Call(overlap, {"path": str(log), "word": str(n)}),)) for n in range(4)]
        assert run(tmp_path / str(cores), *stages, cores=cores)[0] == 0
        running = most = 0
        for line in log.read_text().splitlines():
            running += 1 if line.endswith("begins") else -1
            most = max(most, running)
        return most

    assert at_once(1) == 1
    assert at_once(2) == 2


def test_outputs_that_are_gone_are_made_again(tmp_path) -> None:
    made = tmp_path / "made"
    stages = (Stage("make", "", (Call(make, {"path": str(made)}),), outputs=(made,)),)
    assert run(tmp_path, *stages)[0] == 0 and len(list(made.iterdir())) == 1
    (made / "0").unlink()
    made.rmdir()
    assert run(tmp_path, *stages)[0] == 0 and made.exists()


def test_what_was_begun_goes_on_or_begins_anew(tmp_path) -> None:
    """After a stop: a command that resumes finds what it left; another finds nothing. With other settings, nothing."""
    for resumes, word, left in ((True, "same", 2), (False, "same", 1), (True, "other", 1)):
        root = tmp_path / f"{resumes}{word}"
        made = root / "made"

        def stages(word: str, made: Path = made, root: Path = root, resumes: bool = resumes) -> Stage:
            steps = (Call(append, {"path": str(root / "words"), "word": word}), Call(make, {"path": str(made)}))
            return Stage("make", "", steps, outputs=(made,), resumes=resumes)

        root.mkdir()
        assert run(root, stages("same"))[0] == 0
        (root / "stages/make.json").unlink()  # as if it had been killed before its end
        assert run(root, stages(word))[0] == 0
        assert len(list(made.iterdir())) == left


def test_a_failure_ends_it_with_its_code(tmp_path) -> None:
    log = tmp_path / "words"
    broken = Stage("broken", "", (Call(fail, {"code": 70}), Call(append, {"path": str(log), "word": "never"})))
    code, said = run(tmp_path, broken, stage("after", log, "broken"))
    assert code == 70 and not log.exists()
    assert said[0] == f"broken failed (exit code 70); the end of {tmp_path}/logs/broken.log:"


def test_a_signal_stops_it_and_it_goes_on(tmp_path) -> None:
    log = tmp_path / "words"
    first = stage("first", log)
    long = Stage("long", "", (Call(wait_unless, {"path": str(tmp_path / "go")}),), needs=("first",))
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    code, said = run(tmp_path, first, long, stage("last", log, "long"))
    assert code == 75 and said[-1] == "stopped; start it again to go on"
    (tmp_path / "go").touch()
    assert run(tmp_path, first, long, stage("last", log, "long"))[0] == 0
    assert log.read_text().split() == ["first", "last"]


def wait_unless(path: str) -> None:
    if not Path(path).exists():
        time.sleep(600)
