"""The data set helpers come compiled in the wheel; do not compile them again.

Target    megatron-core 0.19.2, megatron.core.datasets.utils.compile_helpers
Why       The wheel has helpers_cpp and no Makefile: ``make`` fails, rank 0 exits, the other ranks wait for ever.
Test      tests/unit/test_patches.py::test_compile_helpers_does_not_call_make
Upstream  not reported
Drop when compile_helpers returns where helpers_cpp can be imported
"""

from __future__ import annotations

import importlib.util

from patches import Patch


def _install() -> None:
    from megatron.core.datasets import utils

    original = utils.compile_helpers

    def compile_helpers() -> None:
        """Compiles the helpers where no compiled form can be found."""
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    utils.compile_helpers = compile_helpers


PATCH = Patch(
    name="compile_helpers",
    target="megatron.core.datasets.utils.compile_helpers",
    package="megatron-core",
    versions=("0.19.2",),
    why="the wheel holds the compiled helper and no Makefile, so make fails and rank 0 exits while the others wait",
    test="tests/unit/test_patches.py::test_compile_helpers_does_not_call_make",
    upstream="not reported",
    drop_when="compile_helpers returns where helpers_cpp can be imported",
    install=_install,
)
