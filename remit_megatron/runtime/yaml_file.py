"""YAML files that people write, read as OmegaConf reads run configurations: 5e-5 is a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.files import INT64

_TOO_LARGE = "an integer of more than 64 bits"
# libyaml puts a tree together by recursion in C, which ends the process where it is some 30,000 levels deep. A text of
# fewer characters is not.
_TOO_DEEP, _DEEPEST, _SHORT = "nested too deeply", 1000, 20_000


def parse_yaml(text: str) -> Any:
    """The lists, dicts and values of a YAML text.

    Raises:
        yaml.YAMLError: it is no YAML, or one bare value.
        OmegaConfBaseException: it holds what OmegaConf does not take.
    """
    try:
        _refuse_deep(text)
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        _refuse(content)
        return content
    except AssertionError:  # which is how it refuses a bare number, flag or date
        raise yaml.YAMLError("one value alone") from None
    except RecursionError:
        raise yaml.YAMLError(_TOO_DEEP) from None
    except OmegaConfBaseException:
        raise
    except ValueError as error:  # Python's limit of 4,300 digits, or a date that is none
        raise yaml.YAMLError(_TOO_LARGE if "digits" in str(error) else str(error)) from None


def line_and_problem(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """ ":3" for the third line, and what PyYAML found there, without its own "found", which a message of ours has
    already; either is "" where it does not say."""
    mark = error.problem_mark or error.context_mark
    return f":{mark.line + 1}" if mark else "", (error.problem or "").removeprefix("found ")


def _refuse_deep(text: str) -> None:
    if len(text) < _SHORT:
        return
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise yaml.YAMLError(_TOO_DEEP)


def _refuse(content: Any) -> None:
    """Nothing here counts beyond 64 bits, and arithmetic with such integers ends in an OverflowError somewhere; a zero
    byte ends a name for the system, and no text of ours has one."""
    if isinstance(content, dict | list):
        for item in content if isinstance(content, list) else (*content, *content.values()):
            _refuse(item)
    elif isinstance(content, int) and content not in INT64:
        raise yaml.YAMLError(_TOO_LARGE)
    elif isinstance(content, str) and "\0" in content:
        raise yaml.YAMLError(f"a text with a zero byte, {show(content)}")


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
        line, problem = line_and_problem(error)
        raise UserError(f"{path}{line}", problem or "no YAML", expected) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(str(path), next(iter(str(error).splitlines()), "no YAML"), expected) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise UserError(field, f"{path} ({reason})", expected) from None
