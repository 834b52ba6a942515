"""Output directories that are complete or absent, also where two make one at once."""

from __future__ import annotations

import os

import pytest

from remit_megatron.conversion.directories import complete_directory
from remit_megatron.runtime.errors import UserError


def test_of_two_that_make_one_the_second_is_told(tmp_path):
    """The name was free when both began."""
    output = tmp_path / "out"
    with (
        pytest.raises(UserError, match=r"--output: found .*out, which another process has made; expected a name"),
        complete_directory(output, field="--output", needed_bytes=0) as second,
    ):
        (second / "file").write_text("second")
        with complete_directory(output, field="--output", needed_bytes=0) as first:
            (first / "file").write_text("first")
    assert os.listdir(tmp_path) == ["out"] and (output / "file").read_text() == "first"
