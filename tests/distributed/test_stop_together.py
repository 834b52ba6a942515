"""The end of the set-up: all ranks stop where one was asked to, or none does."""

from __future__ import annotations

import os
import signal
import time

import pytest

from remit_megatron.runtime import parallel, stop
from remit_megatron.runtime.errors import StartAgain


def hand_over(asked: list[int], late: list[int], number: int) -> tuple[str, list[int]]:
    """A rank that is set up and then trains: what it ended with, and the signals that its training got.

    Args:
        asked: ranks that get the signal while the set-up is held.
        late: ranks that get it between the agreement of all and the handler of the training.
    """
    environment = parallel.rank_environment()
    parallel.initialize(environment)
    got: list[int] = []
    handlers = dict.fromkeys(stop.stop_signals(), lambda received, _: got.append(received))
    try:
        with stop.StopInSetUp():
            stop.hold()
            if environment.rank in asked:
                os.kill(os.getpid(), number)
            time.sleep(0.2 * environment.rank)  # they come at different times
            parallel.leave_set_up_together()
            if environment.rank in late:
                os.kill(os.getpid(), number)
            with stop.handled_by(handlers):
                parallel.gather_objects(None)
                return "trained", got
    except StartAgain as again:
        return str(again), got


@pytest.mark.parametrize("asked", [[0], [1], [0, 1]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_one_is_asked_and_all_stop(pool, asked, number):
    line = f"stopped by {number.name} before the first step, nothing is lost; start it again to go on\n"
    found = pool.run(hand_over, world_size=2, asked=asked, late=[], number=int(number))
    assert found == [(line, []), (line, [])]


@pytest.mark.parametrize("late", [[], [1], [0, 1]])
def test_what_comes_afterwards_is_the_trainings(pool, late):
    number = int(signal.SIGTERM)
    found = pool.run(hand_over, world_size=2, asked=[], late=late, number=number)
    assert found == [("trained", [number] if rank in late else []) for rank in range(2)]
