"""A flywheel that is killed again and again: ``python -m tests.integration.flywheel_kills CONFIG KILLS SEED OUTPUT``.

Importing Megatron and TRL takes longer than the tiny stages themselves, so this process imports them once, and every
flywheel and every stage is a fork of it, through the seam that ``Runner`` has for that. CONFIG runs undisturbed into
``straight``, and again into ``killed``: in each of its stages in turn the whole flywheel gets SIGKILL at a random
moment and is started again, as often as asked; what one stage was too quick for, the next one gets.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from remit_megatron.flywheel.plan import Plan
from remit_megatron.flywheel.records import read_record
from remit_megatron.flywheel.runner import Runner

_PATIENCE_SECONDS = 600


def warm() -> None:
    """What the forks have then."""
    import patches

    patches.apply()
    import megatron.training.training  # noqa: F401

    import remit_megatron.conversion.loading
    import remit_megatron.evaluation.runner
    import remit_megatron.posttrain.trl_trainers
    import remit_megatron.training.engine  # noqa: F401


def forked(work: Callable[[], int]) -> int:
    """Runs a function in a fork; returns its process number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(words: list[str], nproc: int | None, log: Path) -> int:
    """``remit words…`` in a fork, in place of a new interpreter."""
    assert nproc in (None, 1)

    def work() -> int:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        from remit_megatron.cli import main

        return main(words)

    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])


def flywheel(path: str, run_dir: Path) -> int:
    """Starts a flywheel in a fork that leads a group of its own; returns its process number."""

    def work() -> int:
        os.setsid()
        return Runner(Plan(path, [f"run_dir={run_dir}"]), start=start).run()

    return forked(work)


def starts(run_dir: Path, stage: str) -> int:
    """How many times a stage has been started."""
    log = run_dir / "events.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return sum(f'"event": "started", "stage": "{stage}"' in line for line in lines)


def kill_in(path: str, run_dir: Path, stage: str, after: float) -> bool:
    """Starts the flywheel and kills it ``after`` seconds into a stage; False where it had ended before."""
    before = starts(run_dir, stage)
    pid = flywheel(path, run_dir)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while starts(run_dir, stage) == before:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0, f"the flywheel ended with {status} before {stage}"
            return False
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(after)
    ended = os.waitpid(pid, os.WNOHANG)[0]
    os.killpg(pid, signal.SIGKILL) if not ended else None
    if not ended:
        os.waitpid(pid, 0)
    return not ended


def main(path: str, kills: int, seed: int, output: str) -> None:
    """Undisturbed, then killed; writes what happened."""
    warm()
    straight, killed = Path("straight"), Path("killed")
    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(flywheel(path, straight), 0)[1]) == 0
    undisturbed = time.monotonic() - begun
    plan = Plan(path, [f"run_dir={straight}"])
    records = {id_: read_record(planned.directory) for id_, planned in plan.planned.items()}
    seconds = {id_: record.seconds for id_, record in records.items() if record is not None}
    generator = random.Random(seed)
    done, missed = [], 0
    for position, stage in enumerate(plan.planned):
        share = kills // len(plan.planned) + (position < kills % len(plan.planned)) + missed
        # Early ones first: a stage that goes on where it was has less left every time, and ends sooner than it did.
        # The first as soon as it has begun, so that every stage is killed also where it is quicker this time.
        moments = [0.0, *sorted(generator.uniform(0, 0.5 * seconds[stage]) for _ in range(share - 1))]
        killed_here = 0
        while killed_here < share and kill_in(path, killed, stage, moments[killed_here]):
            done.append([stage, round(moments[killed_here], 3)])
            killed_here += 1
        missed = share - killed_here
    code = os.waitstatus_to_exitcode(os.waitpid(flywheel(path, killed), 0)[1])
    result = {"kills": done, "code": code, "undisturbed_seconds": round(undisturbed, 1), "seconds": seconds}
    Path(output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
