"""Each weight is read by one of the replicas that hold it, and sent to the others.

With d replicas of a model every byte of its files would otherwise be read d times, by as many ranks at once. Replicas
take turns: of d parameters in a row each reads one, then each sends its own. A failure to read is one of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.parallel import device

Read = Callable[[], Tensor]


def read_in_turns(
    parameters: Sequence[tuple[torch.nn.Parameter, Read]], group: dist.ProcessGroup | None
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Each parameter with its value; collective over the group, whose ranks all hold these parameters in this order.

    Memory beyond the parameters is two of them: what this rank has read, and what it is given.

    Args:
        parameters: and what reads the value, in any dtype, on the CPU.
        group: the replicas; None or one rank reads everything itself.

    Raises:
        UserError: of the first rank that failed with one, on all of them.
        RuntimeError: another failure of another rank.
    """
    size = 1 if group is None else group.size()
    if size == 1:
        for parameter, read in parameters:
            yield parameter, read()
        return
    assert group is not None
    ranks, own = dist.get_process_group_ranks(group), group.rank()
    for first in range(0, len(parameters), size):
        turn = parameters[first : first + size]
        value = _read_together(turn[own][1] if own < len(turn) else None, group)
        for number, (parameter, _) in enumerate(turn):
            dtype = value.dtypes[number]
            if number == own:
                assert value.read is not None
                sent = value.read.contiguous().to(device())
            else:
                sent = torch.empty(parameter.shape, dtype=dtype, device=device())
            # As bytes: not every backend knows every dtype.
            dist.broadcast(sent.view(-1).view(torch.uint8), src=ranks[number], group=group)
            yield parameter, sent


class _Turn:
    """What this rank has read, and the dtypes of what each rank has read."""

    def __init__(self, read: Tensor | None, dtypes: list[torch.dtype]):
        self.read, self.dtypes = read, dtypes


def _read_together(read: Read | None, group: dist.ProcessGroup) -> _Turn:
    value: Tensor | None = None
    error: Exception | None = None
    try:
        value = None if read is None else read()
    except Exception as caught:
        error = caught
    # Errors cross the process boundary as text: not every exception can be pickled.
    described: tuple[str, object] = ("read", None if value is None else value.dtype)
    if isinstance(error, UserError):
        described = ("wrong", (error.field, str(error.found), error.expected))
    elif error is not None:
        described = ("failed", repr(error))
    everybody: list[tuple[str, object]] = [described] * group.size()
    dist.all_gather_object(everybody, described, group=group)
    if error is not None:
        raise error
    for rank, (outcome, detail) in enumerate(everybody):
        if outcome == "wrong":
            assert isinstance(detail, tuple)
            raise UserError(*detail)
        if outcome == "failed":
            raise RuntimeError(f"reading weights failed on replica {rank}: {detail}")
    dtypes = [detail if isinstance(detail, torch.dtype) else torch.float32 for _, detail in everybody]
    return _Turn(value, dtypes)
