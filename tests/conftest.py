"""What all tests share: the data folder beside the repository, a floor under the number of tests collected, and no GPU
but for tests/gpu."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.distributed.pool import RankPool

# The same examples on every machine, and no test that fails because the machine is slow today.
settings.register_profile("remit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("remit")

REPOSITORY = Path(__file__).resolve().parent.parent
# A test file that no pattern collects, or a folder that is not looked into, passes unnoticed otherwise: so many tests
# are collected at least where a folder is asked for as a whole. Raise it as tests are added.
MINIMUM_TESTS = {"unit": 3700, "distributed": 650, "integration": 160, "fuzz": 180, "golden": 15, "te": 265}


def pytest_configure(config: pytest.Config) -> None:
    """The suite is about the CPU, and passes on a host with GPUs too: it does not see them. tests/gpu, asked for by
    itself, does (scripts/test.sh)."""
    if not only_gpu_tests(config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks; workers and ranks inherit it
    config.option.loadscopereorder = False  # pytest-xdist hands out files in the order that is made below


def only_gpu_tests(arguments: Sequence[str]) -> bool:
    """Whether all that pytest was asked for is in tests/gpu."""
    folder = REPOSITORY / "tests" / "gpu"
    asked = [Path(argument.split("::")[0]).resolve() for argument in arguments]
    return bool(asked) and all(path.is_relative_to(folder) for path in asked)


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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those of most tests: two workers that take file after file end together."""
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))


def pytest_collection_finish(session: pytest.Session) -> None:
    option = session.config.option
    if option.keyword or option.markexpr or option.ignore or option.deselect or session.config.getoption("lf", False):
        return
    asked = {Path(argument).resolve() for argument in session.config.args}
    for name, minimum in MINIMUM_TESTS.items():
        folder = REPOSITORY / "tests" / name
        if asked.isdisjoint({folder, folder.parent}):
            continue
        found = sum(item.path.is_relative_to(folder) for item in session.items)
        # The process that hands out tests to others collects none itself.
        if found < minimum and not (found == 0 and hasattr(option, "numprocesses") and option.numprocesses):
            raise pytest.UsageError(f"found {found} tests in tests/{name}; expected at least {minimum}")
