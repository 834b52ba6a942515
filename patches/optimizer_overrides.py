"""A place where Megatron decides which parameters get another learning rate or weight decay.

Target    megatron-core 0.19.2, megatron.training.training.get_megatron_optimizer_config
Why       The optimizer takes overrides for groups of parameters; the training loop makes them up itself and asks
          nobody. Recipes that decay norms, or do not decay embeddings, cannot be told from the arguments.
Test      tests/distributed/training/test_weight_decay.py::test_parameter_groups
Upstream  the function says that it may be replaced; there is no argument for it
Drop when megatron.training takes overrides of parameter groups from its caller

``hook`` receives Megatron's overrides (ParamKey -> ParamGroupOverride) and returns those to use.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any

from patches import Patch

hook: Callable[[dict[Any, Any]], dict[Any, Any]] | None = None


def _install() -> None:
    from megatron.training import training

    original = training.get_megatron_optimizer_config

    @functools.wraps(original)
    def get_megatron_optimizer_config(*args, **kwargs):
        # Megatron annotates the configuration alone and returns its overrides beside it.
        config, overrides = typing.cast("tuple[Any, Any]", original(*args, **kwargs))
        return config, overrides if hook is None else hook(overrides)

    training.get_megatron_optimizer_config = get_megatron_optimizer_config


PATCH = Patch(
    name="optimizer_overrides",
    target="megatron.training.training.get_megatron_optimizer_config",
    package="megatron-core",
    versions=("0.19.2",),
    why="recipes that decay norms, or do not decay embeddings, cannot be told from Megatron's arguments",
    test="tests/distributed/training/test_weight_decay.py::test_parameter_groups",
    upstream="the function says that it may be replaced; there is no argument for it",
    drop_when="megatron.training takes overrides of parameter groups from its caller",
    install=_install,
)
