"""The warm rank processes, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Processes that run a function as ranks of a job."""
    ranks = RankPool()
    yield ranks
    ranks.close()
