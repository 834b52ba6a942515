"""YAML files that people write, read as OmegaConf reads run configurations: 5e-5 is a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from remit_megatron.runtime.errors import UserError


def parse_yaml(text: str) -> Any:
    """The lists, dicts and values of a YAML text.

    Raises:
        yaml.YAMLError: it is no YAML, or one bare value.
        OmegaConfBaseException: it holds what OmegaConf does not take.
    """
    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except AssertionError:  # which is how it refuses a bare number, flag or date
        raise yaml.YAMLError("one value alone") from None
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def read_yaml(path: Path, *, field: str, expected: str) -> Any:
    """What is in a YAML file, as plain lists, dicts and values.

    Args:
        field: what named the file, for messages.
        expected: what it should be, for messages.

    Raises:
        UserError: it cannot be read, or is no YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"{path}:{mark.line + 1}" if mark else str(path), error.problem or "no YAML", expected
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(str(path), next(iter(str(error).splitlines()), "no YAML"), expected) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise UserError(field, f"{path} ({reason})", expected) from None
