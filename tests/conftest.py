"""What all tests share: the data folder beside the repository, and a floor under the number of tests collected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.distributed.pool import RankPool

# The same examples on every machine, and no test that fails because the machine is slow today.
settings.register_profile("remit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("remit")

REPOSITORY = Path(__file__).resolve().parent.parent
# A test file that no pattern collects, or a folder that is not looked into, passes unnoticed otherwise. Raise it as
# tests are added.
MINIMUM_TESTS = 2000


class SharedData:
    """Real data beside the repository (``../shared/data``), which is not part of it."""

    folder = REPOSITORY.parent / "shared" / "data"

    def __truediv__(self, name: str) -> Path:
        """Path of one file or folder; skips the test, naming it, where it is missing."""
        path = self.folder / name
        if not path.exists():
            pytest.skip(f"missing: ../shared/data/{name}")
        return path


@pytest.fixture(scope="session")
def shared_data() -> SharedData:
    """``shared_data / "gsm8k_train.jsonl"`` is the path of that file, or skips the test."""
    return SharedData()


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Warm processes that run a function as ranks of a job, shared by all tests."""
    ranks = RankPool()
    yield ranks
    ranks.close()


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    option = config.option
    chosen = option.keyword or option.markexpr or option.ignore or option.deselect or config.getoption("lf", False)
    if everything and not chosen and len(session.items) < MINIMUM_TESTS:
        raise pytest.UsageError(f"found {len(session.items)} tests; expected at least {MINIMUM_TESTS} in a full run")
