"""Packages that only some commands need: those of pyproject.toml's optional extras."""

from __future__ import annotations

import importlib.util

from remit_megatron.runtime.errors import UserError

# Module -> the package's name, where it differs, and the extra that installs it.
_EXTRAS = {
    "lm_eval": ("lm-eval", "evaluate"),
    "math_verify": ("math-verify", "posttrain"),
    "matplotlib": ("matplotlib", "analysis"),
    "scipy": ("scipy", "evaluate"),
    "statsmodels": ("statsmodels", "evaluate"),
    "trl": ("trl", "posttrain"),
}


def is_installed(module: str) -> bool:
    """Whether a module is there to be imported; it is not imported."""
    return importlib.util.find_spec(module) is not None


def missing(module: str) -> tuple[str, str]:
    """What was found, and what is expected in its place, where an optional ``module`` is not installed."""
    package, extra = _EXTRAS[module]
    return f"no {package}", f"the optional extra `{extra}`: pip install 'remit-megatron[{extra}]'"


def require(*modules: str, field: str) -> None:
    """Refuses the first of ``modules`` that is not installed.

    Args:
        field: what needs it, for the message: a command, or a setting.

    Raises:
        UserError: as said.
    """
    for module in modules:
        if not is_installed(module):
            raise UserError(field, *missing(module))
