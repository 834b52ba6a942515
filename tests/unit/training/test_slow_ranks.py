"""Who is slow, from the seconds of all ranks."""

from __future__ import annotations

import time

from remit_megatron.training.slow_ranks import OwnTime, Place, SlowRanks


def places(*, stages: int = 1, replicas: int, tensor: int = 1) -> list[Place]:
    """Ranks in Megatron's order: tensor-parallel ones together, then replicas, then stages; four on a host."""
    ranks = [(stage, replica) for stage in range(stages) for replica in range(replicas) for _ in range(tensor)]
    return [Place(stage, replica, f"node{rank // 4}") for rank, (stage, replica) in enumerate(ranks)]


def said(ranks: SlowRanks, seconds: list[float], times: int) -> list:
    return [ranks.interval(seconds) for _ in range(times)]


def test_a_slow_rank_is_named_after_three_intervals_and_forgotten_after_three():
    ranks = SlowRanks(places(replicas=8), factor=1.5)
    late = [1.0] * 8
    late[5] = 2.0
    first, second, third, fourth = said(ranks, late, 4)
    assert first is second is fourth is None
    (slow,) = third
    assert (slow.ranks, slow.hosts, slow.ratio) == ((5,), ("node1",), 2.0)
    assert slow.text() == (
        "rank 5 on node1 is slow: reading and forward passes take 2.0 times as long as in the other replicas"
    )
    assert said(ranks, [1.0] * 8, 3) == [None, None, []]


def test_one_slow_interval_is_an_accident():
    ranks = SlowRanks(places(replicas=4), factor=1.5)
    late = [1.0, 9.0, 1.0, 1.0]
    for _ in range(5):
        assert said(ranks, late, 2) == [None, None]
        assert ranks.interval([1.0] * 4) is None


def test_stages_do_not_the_same_work():
    """The last stage has the output layer and takes three times as long: no rank of it is slow."""
    ranks = SlowRanks(places(stages=2, replicas=3), factor=1.5)
    assert said(ranks, [1.0, 1.0, 1.0, 3.0, 3.1, 2.9], 5) == [None] * 5
    (slow,) = said(ranks, [1.0, 1.0, 1.0, 3.0, 6.0, 3.0], 3)[-1]
    assert slow.ranks == (4,) and slow.ratio == 2.0


def test_ranks_that_wait_for_each_other_are_slow_together():
    ranks = SlowRanks(places(replicas=3, tensor=2), factor=1.5)
    (slow,) = said(ranks, [1.0, 1.0, 1.0, 1.0, 2.0, 1.9], 3)[-1]
    assert slow.ranks == (4, 5) and "ranks 4, 5 on node1 are slow" in slow.text()


def test_two_of_many_and_one_replica_alone():
    ranks = SlowRanks(places(replicas=6), factor=1.5)
    found = said(ranks, [1.0, 3.0, 1.0, 2.0, 1.0, 1.0], 3)[-1]
    assert [slow.ranks for slow in found] == [(1,), (3,)], "the slowest first"
    alone = SlowRanks(places(stages=2, replicas=1), factor=1.5)
    assert said(alone, [1.0, 50.0], 4) == [None] * 4, "nobody does the same work"


def test_own_time_is_measured_when_asked_for():
    own = OwnTime()
    with own.measure():
        time.sleep(0.02)
    assert own.take() == 0.0
    own.measures = True
    for _ in range(2):
        with own.measure():
            time.sleep(0.02)
    assert own.take() >= 0.04 and own.take() == 0.0
