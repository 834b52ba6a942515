"""A place around the pipeline schedule: the reference runs over a step's microbatches before the student does.

Target    megatron-core 0.19.2, megatron.training.training.get_forward_backward_func
Why       The scores of all microbatches of a step are needed before the student's schedule starts. Inside
          ``forward_step`` the reference's pipeline communication would meet the student's, and deadlock.
Test      tests/distributed/training/test_training.py::test_layouts_agree
Upstream  no hook of this kind; training and evaluation each look the schedule up when they start
Drop when Megatron accepts a schedule from its caller

``wrapper`` is set by remit_megatron.training.engine before training; without one the schedule is Megatron's.
"""

from __future__ import annotations

from collections.abc import Callable

from patches import Patch

Schedule = Callable[..., list]

wrapper: Callable[[Schedule], Schedule] | None = None


def _install() -> None:
    from megatron.training import training

    original = training.get_forward_backward_func

    def get_forward_backward_func(*args, **kwargs) -> Schedule:
        schedule = original(*args, **kwargs)
        return schedule if wrapper is None else wrapper(schedule)

    training.get_forward_backward_func = get_forward_backward_func


PATCH = Patch(
    name="schedule",
    target="megatron.training.training.get_forward_backward_func",
    package="megatron-core",
    versions=("0.19.2",),
    why="the reference scores a step's microbatches before the student's schedule starts; inside it, it would deadlock",
    test="tests/distributed/training/test_training.py::test_layouts_agree",
    upstream="no hook of this kind",
    drop_when="Megatron accepts a schedule from its caller",
    install=_install,
)
