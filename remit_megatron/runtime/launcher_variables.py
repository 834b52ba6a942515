"""What a launcher says to each rank in the environment, checked before anybody takes it for numbers. Without torch."""

from __future__ import annotations

import os

from remit_megatron.runtime.errors import UserError, show


def check_variables() -> None:
    """Refuses what no launcher sets: RANK, WORLD_SIZE and LOCAL_RANK of torchrun's form.

    Raises:
        UserError: one is no number, or the rank is none of the job's: left over in somebody's environment, it would
            be a process that keeps quiet, and leaves to rank 0 what nobody does.
    """
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    for name in numbers:
        value = os.environ.get(name)
        if value is None:
            continue
        if not (value.isascii() and value.isdecimal()):
            raise UserError(f"{name} in the environment", show(value), "a whole number, as a launcher sets it")
        numbers[name] = int(value)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        expected = f"less than WORLD_SIZE, {numbers['WORLD_SIZE']}; unset what no launcher has set"
        raise UserError("RANK in the environment", numbers["RANK"], expected)
