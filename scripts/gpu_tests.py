#!/usr/bin/env python
"""tests/gpu, where passing means that tests ran: python scripts/gpu_tests.py [pytest arguments]

pytest is content where every test is skipped, as all of these are where torch finds no GPU. Here at most two may be,
which need more memory than a GPU that others use has left. Exit code: pytest's, or 1 where too many were left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_LEFT_OUT = 2


class Count:
    """Counts what ran and what was left out."""

    def __init__(self) -> None:
        self.passed = self.left_out = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """pytest's hook, for each phase of each test."""
        self.passed += report.when == "call" and report.passed
        self.left_out += report.skipped


def main(arguments: list[str]) -> int:
    count = Count()
    code = pytest.main(["-q", "-rs", str(ROOT / "tests" / "gpu"), *arguments], plugins=[count])
    too_few = count.passed == 0 or count.left_out > MOST_LEFT_OUT
    if code == 0 and too_few:
        sys.stdout.write(
            f"{count.passed} tests ran, {count.left_out} were left out; expected at most {MOST_LEFT_OUT}\n"
        )
        return 1
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
