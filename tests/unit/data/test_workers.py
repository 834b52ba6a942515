"""Several processes, one order of results, and an end in every case."""

import multiprocessing
import os
import signal
import time
from functools import partial

import pytest

from remit_megatron.data.workers import WorkerDied, map_in_processes
from remit_megatron.runtime.errors import UserError

LONG = 1 << 22  # bytes; far more than a pipe holds


def doubled(factor, item):
    time.sleep(0.01 * (item % 3))  # the order of completion is not the order of the items
    return item * factor


def make_doubled(factor):
    return partial(doubled, factor)


def long_result(item):
    return b"x" * LONG


def make_long_result():
    return long_result


def refuse(item):
    if item == 3:
        raise UserError("item", item, "another one")
    return item


def make_refuse():
    return refuse


def make_nothing():
    raise ValueError("no function today")


def die(item):
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def make_die():
    return die


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = multiprocessing.active_children()
    yield
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize(("items", "workers"), [(0, 2), (1, 3), (3, 3), (11, 3)])
def test_order(items, workers):
    assert list(map_in_processes(partial(make_doubled, 2), range(items), workers=workers)) == [
        2 * item for item in range(items)
    ]


def test_no_more_processes_than_items_and_few_items_on_their_way():
    taken = []

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    before = len(multiprocessing.active_children())
    results = map_in_processes(partial(make_doubled, 1), items(), workers=2)
    for done, _ in enumerate(results, start=1):
        assert len(taken) - done <= 3
        assert len(multiprocessing.active_children()) - before == 2
    assert done == len(taken) == 20
    results = map_in_processes(partial(make_doubled, 1), range(1), workers=9)
    assert next(results) == 0 and len(multiprocessing.active_children()) - before == 1
    results.close()


def test_long_items_and_long_results_do_not_wait_for_each_other():
    """A parent that sends to a process that sends: neither pipe holds what is on its way."""
    items = [bytes(LONG)] * 6
    assert [len(result) for result in map_in_processes(make_long_result, items, workers=2)] == [LONG] * 6


def test_killed_in_the_middle_of_a_result():
    results = map_in_processes(make_long_result, range(4), workers=2)
    next(results)
    time.sleep(0.5)  # both are sending by now, and nobody receives
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
    with pytest.raises(WorkerDied):
        list(results)


def test_killed_at_work():
    with pytest.raises(WorkerDied):
        list(map_in_processes(make_die, range(9), workers=2))


def test_exceptions_come_back_in_their_turn():
    got = []
    with pytest.raises(UserError, match="item: found 3; expected another one") as caught:
        for result in map_in_processes(make_refuse, range(9), workers=2):
            got.append(result)
    assert got == [0, 1, 2]
    assert "in refuse" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="no function today"):
        list(map_in_processes(make_nothing, range(2), workers=2))


def test_exception_of_the_items_is_not_taken_for_a_dead_process():
    def items():
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(map_in_processes(make_refuse, items(), workers=2))
