"""The rules of the house, held by the code itself: who imports whom, where patches live, what is tracked."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import patches
from remit_megatron import cli

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = sorted(REPOSITORY.glob("remit_megatron/**/*.py"))
PATCH_FILES = sorted(path for path in REPOSITORY.glob("patches/*.py") if path.name != "__init__.py")
SOURCES = sorted(
    path
    for folder in ("remit_megatron", "patches", "scripts", "tests")
    for path in REPOSITORY.glob(f"{folder}/**/*.py")
)
MAXIMUM_LINES = 600

# The rooms, lowest first: a room imports from those below it and its own files. Rooms of one line stand side by side
# and do not see each other. Some have not moved in yet; their place is kept.
ROOMS: list[tuple[str, ...]] = [
    ("kernels", "runtime"),
    ("objectives", "models", "evaluation"),
    ("conversion", "analysis"),
    ("reference",),
    ("data",),
    ("run", "posttrain"),
    ("scoring",),
    ("training",),  # a run scores its suite between steps
    ("cluster", "flywheel", "doctor"),
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# Beside the rooms: the table of commands, which imports a room only when its command is asked for.
LOOSE = {"__init__.py", "__main__.py", "cli.py"}
# What a room may see of the rooms below it, where that is less than all of them: Hugging Face models and files. The
# weights that analysis shows are the objectives' own and its scores are evaluation's, so it stands above them; what
# posttrain learns from are lines of JSON, which data reads.
NARROW = {
    "evaluation": {"runtime"},
    "analysis": {"runtime", "kernels", "objectives", "evaluation"},
    "posttrain": {"runtime", "data"},
}
# room -> packages that it must not import.
FORBIDDEN = {
    "kernels": ("megatron", "patches"),
    "objectives": ("megatron", "patches"),
    "data": ("torch.distributed", "megatron.training"),
    "evaluation": ("megatron", "patches"),
    "analysis": ("megatron", "patches"),
    "posttrain": ("megatron", "patches"),
}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def room(path: Path) -> str:
    """The folder below remit_megatron that a file is in; of a file beside the folders, its name."""
    return path.relative_to(REPOSITORY / "remit_megatron").parts[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, also inside functions; ``from a import b`` gives a.b."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: found a relative import; expected absolute ones"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def may_import(importer: str, imported_room: str) -> bool:
    """Whether a file of the room ``importer`` may import from ``imported_room``."""
    if importer == imported_room:
        return True
    return LEVEL[imported_room] < LEVEL[importer] and imported_room in NARROW.get(importer, LEVEL)


def test_import_direction() -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line}: {room(path)} imports {name}"
        for path in MODULES
        if room(path) not in LOOSE
        for line, name in imported(path)
        if name.startswith("remit_megatron.") and name != "remit_megatron.__version__"
        if not may_import(room(path), name.split(".")[1])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_place() -> None:
    folders = {path.name for path in (REPOSITORY / "remit_megatron").iterdir() if any(path.glob("*.py"))}
    assert {"kernels", "objectives", "models", "reference", "data"} <= folders
    assert folders <= LEVEL.keys(), "a new folder needs its place in ROOMS"


def test_no_loose_files() -> None:
    assert {path.name for path in (REPOSITORY / "remit_megatron").glob("*.py")} == LOOSE


def test_commands_live_in_their_rooms() -> None:
    """``command.py`` of a room has the arguments and the run of each of its commands, and no other file has any."""
    commands = {**cli._COMMANDS, **cli._DATA_COMMANDS, **cli._ANALYZE_COMMANDS}
    for name, (place, _) in commands.items():
        defined = {
            node.name
            for node in parse(REPOSITORY / f"remit_megatron/{place}/command.py").body
            if isinstance(node, ast.FunctionDef)
        }
        assert {f"add_{name}_arguments", f"run_{name}"} <= defined
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in MODULES
        if path.name not in {"command.py", "cli.py"}
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr == "add_argument"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_forbidden_packages(name: str) -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line}: {imports}"
        for path in MODULES
        if room(path) == name
        for line, imports in imported(path)
        if any(within(imports, package) for package in FORBIDDEN[name])
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_patches_megatron_from_outside_patches() -> None:
    wrong = []
    for path in MODULES:
        bound = set()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and within(node.module or "", "megatron"):
                bound |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                bound |= {alias.asname or "megatron" for alias in node.names if within(alias.name, "megatron")}
        for node in ast.walk(parse(path)):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AugAssign | ast.AnnAssign):
                targets = [node.target]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                targets = [ast.Attribute(node.args[0], "any", ast.Store())]
            for target in targets:
                owner = target
                while isinstance(owner, ast.Attribute):
                    owner = owner.value
                if isinstance(target, ast.Attribute) and isinstance(owner, ast.Name) and owner.id in bound:
                    wrong.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}: sets an attribute of {owner.id}")
    assert not wrong, "\n".join(wrong)


def test_print_is_left_to_the_command_line() -> None:
    """Commands may print their result; the rest logs."""
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in MODULES
        if path.name != "command.py"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_file_length(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAXIMUM_LINES


def test_function_length() -> None:
    """A bench sets up what it times in one place, and may be as long as that takes."""
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}: {node.name} has {length} lines"
        for path in SOURCES
        if not path.name.startswith("bench_")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (length := node.end_lineno - node.lineno + 1) > (150 if "kernels" in path.parts else 80)  # type: ignore[operator]
    ]
    assert not wrong, "\n".join(wrong)


# Patches.


def test_every_patch_file_is_registered() -> None:
    assert sorted(patches.MODULES) == [path.stem for path in PATCH_FILES]


@pytest.mark.parametrize("path", PATCH_FILES, ids=lambda path: path.stem)
def test_patch_header(path: Path) -> None:
    """The header says what the record says, and the test that it names exists."""
    header = ast.get_docstring(parse(path)) or ""
    found = {
        match[1]: match[2]
        for match in re.finditer(r"^(Target|Why|Test|Upstream|Drop when)\s+(\S.*)$", header, re.MULTILINE)
    }
    assert found.keys() == {"Target", "Why", "Test", "Upstream", "Drop when"}
    patch = next(patch for patch in patches.registered() if patch.name == path.stem)
    assert all((patch.target, patch.package, patch.versions, patch.why, patch.upstream, patch.drop_when))
    assert found["Test"] == patch.test
    file, _, name = patch.test.partition("::")
    assert (REPOSITORY / file).is_file(), f"{patch.test}: no such file"
    functions = {node.name for node in ast.walk(parse(REPOSITORY / file)) if isinstance(node, ast.FunctionDef)}
    assert name in functions, f"{patch.test}: no such test"


# What is tracked.


@functools.cache
def tracked_text() -> dict[str, str]:
    """Relative path -> content of every text file that is, or will be, part of the repository."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0:
        names = listing.stdout.splitlines()
    else:  # an unpacked archive
        names = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.rglob("*") if path.is_file()]
        names = [name for name in names if not name.startswith((".venv", ".git/", "runs/"))]
    content = {}
    for name in names:
        path = REPOSITORY / name
        if path.is_file() and b"\0" not in (data := path.read_bytes())[:8192]:
            content[name] = data.decode(errors="replace")
    return content


def search(pattern: str) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in tracked_text().items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_the_search_sees_the_repository() -> None:
    assert {"pyproject.toml", "remit_megatron/cli.py", "tests/unit/test_architecture.py"} <= tracked_text().keys()
    assert search(r"RL-guided mid-training")


def test_no_paths_of_one_machine() -> None:
    # Written in pieces, or this file would be found.
    assert search("(?<![A-Za-z0-9_.])/(work|root" + "|home/[a-z]+)/|/tmp/" + "lab") == []


def test_no_addresses_of_package_registries() -> None:
    assert (
        search(r"https?://[^ \"']*/(simple|packages)" + r"(/|\b)|https?://(pypi|files\.pythonhosted)\." + "org") == []
    )
    assert search(r"^\s*(-i|--index-url|--extra-index-url|--find-links|-f)[ =]" + r"\S") == []


def test_no_lock_file() -> None:
    locks = {"uv.lock", "poetry.lock", "package-lock.json", "pdm.lock"}
    assert not [name for name in tracked_text() if Path(name).name in locks]


# README.


def readme_commands() -> list[str]:
    """Command lines of the fenced shell blocks of the README, continued lines joined."""
    text = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"^\s*```(?:bash|sh|shell|console)\n(.*?)^\s*```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if line.strip() and not line.strip().startswith("#")]


def test_the_commands_of_the_readme_exist() -> None:
    commands = readme_commands()
    assert "./scripts/quickstart.sh" in " ".join(commands) and "./scripts/test.sh" in " ".join(commands)
    scripts = {word for line in commands for word in re.findall(r"(?:\./)?scripts/[\w./-]+\.(?:sh|sbatch|py)", line)}
    for script in scripts:
        path = REPOSITORY / script
        assert path.is_file(), f"README: found {script}; no such file"
        assert path.suffix == ".sbatch" or os.access(path, os.X_OK), f"{script} is not executable"
    words = [line.split() for line in commands]
    for line in words:
        while line and (re.fullmatch(r"\w+=.*", line[0]) or line[0] == "srun"):
            line.pop(0)  # variables and launchers before the command
        if not line or Path(line[0]).name != "remit" or len(line) < 2 or line[1].startswith("-"):
            continue
        known = cli._GROUPS[line[1]][1] if line[1] in cli._GROUPS else cli._COMMANDS
        command = line[2] if line[1] in cli._GROUPS else line[1]
        assert command in known, f"README: found remit {' '.join(line[1:3])}; expected one of {sorted(known)}"
