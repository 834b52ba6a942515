"""Variables of the environment that decide how a model computes."""

from __future__ import annotations

import os
from typing import Any

from remit_megatron.models.spec import TE
from remit_megatron.runtime.errors import UserError

# Attention that Transformer Engine may use, and Megatron's settings of it. Megatron writes the variables when a model
# is made, and ends in a bare assertion where they are there with another value.
_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_VALUES = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001"}


def check_attention_environment(backend: Any, layers: str) -> None:
    """Refuses an environment that asks for other attention than ``megatron.attention_backend`` does.

    Local layers read none of it; what is there is taken away, which Megatron would stop at.

    Args:
        backend: Megatron's ``attention_backend``, the member or its name.
        layers: ``transformer_impl``.

    Raises:
        UserError: naming the variable.
    """
    name = str(getattr(backend, "name", backend))
    for variable, expected in zip(_VARIABLES, _VALUES.get(name, ""), strict=False):
        found = os.environ.get(variable)
        if found in (None, expected):
            continue
        if layers != TE:
            del os.environ[variable]
            continue
        expected = f"{expected} or nothing with megatron.attention_backend {name}, which takes flash, fused or unfused"
        raise UserError(variable, f"{found} in the environment", expected)
