"""What is installed with this package and found by its place, not by its name: the configurations and ``patches``.

The repository (and an editable install of it) has ``configs`` and ``patches`` beside ``remit_megatron``. A wheel has
``patches`` there too, and the configurations inside the package: ``configs`` in site-packages would be nobody's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]
_SAID = "REMIT_SAID"


class BrokenInstallation(Exception):
    """A part of this package is missing or is somebody else's: one line, exit code 70."""


# Configurations.


def shipped_configs() -> Path:
    """Folder of the configurations that came with this package.

    Raises:
        BrokenInstallation: there is none.
    """
    repository = PACKAGE.parent
    if (PACKAGE / "configs").is_dir():
        return PACKAGE / "configs"
    # Beside an installed package, a folder of this name would be another distribution's.
    if (repository / "configs").is_dir() and (repository / "pyproject.toml").is_file():
        return repository / "configs"
    raise BrokenInstallation(f"configs: found none in {PACKAGE}; expected what comes with remit: install it again")


def names_config(path: str | os.PathLike[str]) -> bool:
    """Whether a path has the form of a shipped configuration: relative, and in ``configs``."""
    return Path(os.path.normpath(path)).parts[:1] == ("configs",)


def find_config(path: str | os.PathLike[str], *, announce: bool = True) -> Path:
    """The file that ``path`` means: as it stands or, for ``configs/…`` that is not here, the shipped one of that name.

    Args:
        path: any path, relative to the working directory; other forms than ``configs/…`` are returned as they are.
        announce: whether a shipped file is named on standard error, for paths that somebody gave.

    Returns:
        A path that exists where one of the two does; else ``path``.

    Raises:
        BrokenInstallation: see :func:`shipped_configs`.
    """
    path = Path(path)
    if not names_config(path) or os.path.lexists(path):
        return path
    shipped = shipped_configs().joinpath(*Path(os.path.normpath(path)).parts[1:])
    if not shipped.is_file():
        return path
    if announce:
        say_once(f"{path}: not in this directory; the one that comes with remit is used ({shipped})")
    return shipped


def config_names(folder: str) -> list[str]:
    """Names, without ``.yaml``, of what is in ``configs/FOLDER`` of the working directory and of this package."""
    places = (Path("configs") / folder, shipped_configs() / folder)
    return sorted({file.stem for place in places for file in place.glob("*.yaml")})


def shipped_namesake(path: str | os.PathLike[str]) -> str:
    """``; did you mean configs/…?`` with a shipped file of the same name as a missing ``path``, or an empty string."""
    configs = shipped_configs()
    for file in sorted(configs.glob("*/*.yaml")):
        if file.name == Path(path).name:
            return f"; did you mean configs/{file.relative_to(configs)}, which comes with remit?"
    return ""


# Patches.


def use_own_patches() -> str | None:
    """Makes ``import patches`` mean ours in this process, whatever of that name stands first on ``sys.path``.

    For processes that are remit's: a program that only imports this package may have a module ``patches`` of its own.

    Returns:
        The place of a module of somebody else that Python would have taken, or None.

    Raises:
        BrokenInstallation: what stands at the place of ours is not ours.
    """
    file = (PACKAGE.parent / "patches" / "__init__.py").resolve()
    loaded = sys.modules.get("patches")
    found = _place(loaded) if loaded else _first_on_path()
    if loaded and found == str(file):
        return None
    _check_marked(file)
    # Also its submodules: one that is loaded would be taken for ours of the same name.
    for name in [name for name in sys.modules if name.partition(".")[0] == "patches"]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location("patches", file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["patches"] = module
    try:
        spec.loader.exec_module(module)
        for name in module.MODULES:
            _check_patch(file.with_name(f"{name}.py"))
    except BaseException:
        del sys.modules["patches"]
        raise
    return None if found == str(file) else found


def foreign_patches_line(place: str) -> str:
    """The line that says what :func:`use_own_patches` passed over."""
    return (
        f"patches: found {place}, which is not remit's; it is left alone, and remit uses {PACKAGE.parent / 'patches'}"
    )


def _first_on_path() -> str | None:
    spec = importlib.util.find_spec("patches")
    if spec is None:
        return None
    return os.path.realpath(spec.origin or next(iter(spec.submodule_search_locations or []), "patches"))


def _place(module: ModuleType) -> str:
    return os.path.realpath(getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "patches"))


def _check_marked(file: Path) -> None:
    if not re.search(r'^OWNER = "remit_megatron"$', _text(file), re.MULTILINE):
        raise BrokenInstallation(_not_ours(file))


def _check_patch(file: Path) -> None:
    if not re.search(rf'^PATCH = Patch\(\s*name="{file.stem}"', _text(file), re.MULTILINE):
        raise BrokenInstallation(_not_ours(file))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise BrokenInstallation(f"patches: found no {file}; expected remit's: install it again") from None


def _not_ours(file: Path) -> str:
    return (
        f"patches: found a file of another distribution in {file}; expected remit's: remove the other one, then "
        "install remit again"
    )


# What is said.


def say_once(line: str) -> None:
    """Writes a line to standard error once per command: not from rank 1 up, nor again from ranks that it starts."""
    said = os.environ.get(_SAID, "").splitlines()
    if line in said:
        return
    os.environ[_SAID] = "\n".join([*said, line])
    if _rank() == "0":
        sys.stderr.write(line + "\n")


def _rank() -> str:
    rank = os.environ.get("RANK", "0")
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        from remit_megatron.runtime.parallel import started_by_srun  # imports torch, so only where it is asked

        rank = os.environ["SLURM_PROCID"] if started_by_srun() else "0"
    return rank
