"""A place where a pipeline rank waits for its neighbors: other work can be done there.

Target    megatron-core 0.19.2, megatron.core.pipeline_parallel.p2p_communication._p2p_ops and ._batched_p2p_ops
Why       A frozen model whose forward passes do not depend on the student's can run in the pipeline's bubbles, but the
          schedules post a receive and wait for it in one breath.
Test      tests/distributed/reference/test_replicated.py::test_the_pauses_are_filled
Upstream  no hook of this kind
Drop when Megatron's communicator accepts work to do while it waits

Both functions return requests that somebody waits for later: the communicator itself, or a schedule that overlaps
communication with computation. Here they return requests whose ``wait`` goes through ``hook``, which is set by
remit_megatron.training.engine and receives the original ``wait``. Without a hook the requests are waited for as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from patches import Patch

Wait = Callable[[], Any]

hook: Callable[[Wait], Any] | None = None


class Requests:
    """Several requests that are waited for together."""

    def __init__(self, requests: Sequence[Any]):
        self._requests = requests

    def wait(self) -> None:
        """Waits for all of them; other work may come first."""
        if hook is None:
            self._wait_for_all()
        else:
            hook(self._wait_for_all)

    def _wait_for_all(self) -> None:
        for request in self._requests:
            request.wait()


def _install() -> None:
    from megatron.core.pipeline_parallel import p2p_communication

    single, batched = p2p_communication._p2p_ops, p2p_communication._batched_p2p_ops

    @functools.wraps(single)
    def _p2p_ops(**kwargs) -> dict[str, Requests]:
        return {name: Requests([request]) for name, request in single(**kwargs).items()}

    @functools.wraps(batched)
    def _batched_p2p_ops(**kwargs) -> list[Requests]:
        requests = batched(**kwargs)
        return [Requests(requests)] if requests else []

    p2p_communication._p2p_ops = _p2p_ops
    p2p_communication._batched_p2p_ops = _batched_p2p_ops


PATCH = Patch(
    name="pipeline_wait",
    target="megatron.core.pipeline_parallel.p2p_communication._p2p_ops, ._batched_p2p_ops",
    package="megatron-core",
    versions=("0.19.2",),
    why="the schedules post a receive and wait for it in one breath; a replicated reference runs in between",
    test="tests/distributed/reference/test_replicated.py::test_the_pauses_are_filled",
    upstream="no hook of this kind",
    drop_when="Megatron's communicator accepts work to do while it waits",
    install=_install,
)
