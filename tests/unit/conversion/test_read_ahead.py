"""One item is made while its predecessor is worked on, and no more exist."""

import threading

import pytest

from remit_megatron.conversion.read_ahead import one_ahead


def test_order_and_that_it_is_ahead():
    made = [threading.Event() for _ in range(5)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in one_ahead(items()):
        if number < 4:
            assert made[number + 1].wait(10)  # while this one is worked on
        if number < 3:
            assert not made[number + 2].wait(0.05)


def test_only_two_items_exist():
    alive, most = [0], [0]

    class Item:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    for item in one_ahead(Item() for _ in range(9)):
        del item
    assert alive == [0] and most[0] <= 2


def test_exceptions_come_in_their_turn():
    def items():
        yield 1
        yield 2
        raise OSError("disk")

    got = []
    with pytest.raises(OSError, match="disk"):
        for item in one_ahead(items()):
            got.append(item)
    assert got == [1, 2]
