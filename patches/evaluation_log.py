"""A place after each validation: its result is recorded, not only printed.

Target    megatron-core 0.19.2, megatron.training.training.evaluate
Why       The validation loss goes to the terminal and to TensorBoard only; held-out losses of several runs are compared
          by reading run_dir/validation.jsonl.
Test      tests/integration/test_train_cli.py::test_validation_is_recorded
Upstream  not reported
Drop when Megatron returns or calls back with the result of an evaluation

``hook`` receives the losses (a dict of 0-dimensional tensors; empty on ranks without the last pipeline stage).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from patches import Patch

hook: Callable[[dict[str, Any]], None] | None = None


def _install() -> None:
    from megatron.training import training

    original = training.evaluate

    @functools.wraps(original)
    def evaluate(*args, **kwargs):
        result = original(*args, **kwargs)
        losses = result[0]
        if hook is not None and losses is not None:
            hook(losses)
        return result

    training.evaluate = evaluate


PATCH = Patch(
    name="evaluation_log",
    target="megatron.training.training.evaluate",
    package="megatron-core",
    versions=("0.19.2",),
    why="the validation loss is printed and forgotten; runs are compared by validation.jsonl",
    test="tests/integration/test_train_cli.py::test_validation_is_recorded",
    upstream="not reported",
    drop_when="Megatron returns the result of an evaluation",
    install=_install,
)
