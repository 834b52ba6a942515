"""A place after each save: a checkpoint counts when its manifest is written, not when its files begin to appear.

Target    megatron-core 0.19.2, megatron.training.training.save_checkpoint and .maybe_finalize_async_save
Why       Megatron moves its pointer by a plain open-for-writing and its checkpoints carry no content checksums: a job
          killed at the wrong moment leaves an empty pointer, or a pointer to files that are not whole.
Test      tests/integration/test_resume.py::test_sigkill_then_resume_is_bit_exact
Upstream  not reported
Drop when Megatron commits checkpoints atomically and verifies them when it loads

``before`` and ``after`` receive the iteration, on every rank; ``after`` is called when the files are complete on disk,
for asynchronous saves when they have been finalized.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from patches import Patch

before: Callable[[int], None] | None = None
after: Callable[[int], None] | None = None
_pending: list[int] = []


def _install() -> None:
    from megatron.training import async_utils, get_args, training

    save = training.save_checkpoint
    finalize = training.maybe_finalize_async_save

    @functools.wraps(save)
    def save_checkpoint(iteration, *args, **kwargs):
        if before is not None:
            before(iteration)
        save(iteration, *args, **kwargs)
        settings: Any = get_args()
        if settings.async_save:
            _pending.append(iteration)
        elif after is not None:
            after(iteration)

    @functools.wraps(finalize)
    def maybe_finalize_async_save(*args, **kwargs):
        finalize(*args, **kwargs)
        # Saves are finalized in the order in which they were started, on all ranks alike.
        calls = async_utils._async_calls_queue
        unfinished = 0 if calls is None else calls.get_num_unfinalized_calls()
        while len(_pending) > unfinished:
            iteration = _pending.pop(0)
            if after is not None:
                after(iteration)

    training.save_checkpoint = save_checkpoint
    training.maybe_finalize_async_save = maybe_finalize_async_save


PATCH = Patch(
    name="checkpoint_commit",
    target="megatron.training.training.save_checkpoint, .maybe_finalize_async_save",
    package="megatron-core",
    versions=("0.19.2",),
    why="the pointer is written by a plain open and checkpoints carry no checksums, so half a one can look whole",
    test="tests/integration/test_resume.py::test_sigkill_then_resume_is_bit_exact",
    upstream="not reported",
    drop_when="Megatron commits checkpoints atomically and verifies them when loading",
    install=_install,
)
