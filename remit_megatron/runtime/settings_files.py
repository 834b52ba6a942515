"""YAML files of settings that start from each other (``base:``), and values given on the command line over them."""

from __future__ import annotations

import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.installed import find_config, names_config, shipped_namesake
from remit_megatron.runtime.yaml_file import line_and_problem, parse_yaml


def read_settings(path: str | Path, overrides: Sequence[str] = (), *, named: Collection[str] = ()) -> dict[str, Any]:
    """What a file and the command line say, as plain values; interpolations are left as they are written.

    Args:
        path: YAML file; ``configs/…`` that is not here is the one of the package. ``base: other.yaml`` in it starts
            from that file (relative to this one, merged key by key, lists replaced).
        overrides: ``a.b=value``, the value in YAML; the last one wins over all files.
        named: keys whose value may be a name or a mapping; a mapping over a name becomes ``{base: NAME, …}``.

    Raises:
        UserError: a missing file, bad YAML (with its line), or an override that is none.
    """
    content = read_layers(find_config(path), named=named)
    for override in overrides:
        content = merge_settings(content, _parse_override(override), named=named)
    return content


def read_layers(path: Path, *, named: Collection[str] = ()) -> dict[str, Any]:
    """What a file says, over the files that it starts from.

    Raises:
        UserError: as :func:`read_settings`; files that start from each other in a circle.
    """
    return _read_with_base(path, (), named)


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        UserError: it is not there (the shipped file of the same name is proposed), or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), "no such file", f"a readable file{shipped_namesake(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), first_line(error), "a readable text file") from None


def merge_settings(below: Any, above: Any, *, named: Collection[str] = (), key: str = "") -> Any:
    """``above`` over ``below``: mappings key by key, everything else replaced.

    Args:
        named: as for :func:`read_settings`.
        key: where in the file the two stand.
    """
    if isinstance(below, dict) and isinstance(above, dict):
        merged = dict(below)
        for name, value in above.items():
            inner = f"{key}.{name}".lstrip(".")
            merged[name] = merge_settings(below[name], value, named=named, key=inner) if name in below else value
        return merged
    if key in named and isinstance(below, str) and isinstance(above, dict) and "base" not in above:
        return {"base": below, **above}
    return above


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        plain = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        line, problem = line_and_problem(error)
        place = where if where.startswith("override ") else f"{where}{line}"
        raise UserError(place, problem or first_line(error), "valid YAML") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(where, first_line(error), "valid YAML") from None
    if not isinstance(plain, dict):
        raise UserError(where, f"a {type(plain).__name__}", "a mapping of keys to values")
    for key in plain:
        if not isinstance(key, str):
            raise UserError(where, show(key), "keys that are names")
    return typing.cast("dict[str, Any]", plain)


def _read_with_base(path: Path, seen: tuple[Path, ...], named: Collection[str]) -> dict[str, Any]:
    file = path.resolve()
    if file in seen:
        chain = " -> ".join(item.name for item in (*seen, file))
        raise UserError(f"{seen[-1].name}: base", chain, "files that do not start from each other in a circle")
    content = _parse_yaml(read_text(path), str(path))
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UserError(f"{path}: base", show(base), "the name of a file, relative to this one")
    return merge_settings(_read_with_base(_base_file(path, base), (*seen, file), named), content, named=named)


def _base_file(path: Path, base: str) -> Path:
    beside = path.parent / base
    # A file of your own, wherever it is, may start from `configs/...` as the command line may.
    return find_config(base if names_config(base) and not beside.exists() else beside)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError("override", show(override), "KEY=VALUE with a dotted key, such as objective.epsilon=0.1")
    content: Any = _parse_yaml(f"value: {value}", f"override {key}")["value"]
    for part in reversed(key.split(".")):
        content = {part.strip(): content}
    return content
