"""What this repository holds on to in Megatron, tried on the version that is installed: patches, then imported names.

Prints a line for each and exits with 1 where one does not hold. Called by scripts/try_megatron.sh.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("remit_megatron", "patches", "tests")
_APPLY = "import sys, patches; [p.apply() for p in patches.registered() if p.name in sys.argv[1].split(',')]"


def main() -> int:
    """Tries everything; returns the exit code."""
    sys.path.insert(0, str(REPOSITORY))
    import patches

    broken = 0
    before: list[str] = []
    for patch in patches.registered():
        # In a process of its own, after those before it: the first that fails must not hide the others.
        done = subprocess.run(
            [sys.executable, "-c", _APPLY, ",".join([*before, patch.name])],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            broken += 1
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            sys.stdout.write(f"broken   patch {patch.name} ({patch.target}): {reason}\n         test: {patch.test}\n")
        else:
            before.append(patch.name)
            sys.stdout.write(f"ok       patch {patch.name}\n")
    missing = list(missing_names())
    for place, name, reason in missing:
        sys.stdout.write(f"broken   seam {name}, imported by {place}: {reason}\n")
    sys.stdout.write(f"{broken} patches and {len(missing)} seams broken\n")
    return 1 if broken or missing else 0


def missing_names() -> Iterator[tuple[str, str, str]]:
    """(file:line, dotted name, reason) of everything of Megatron that is imported somewhere and is not there."""
    import patches

    try:
        patches.apply()
    except Exception as error:
        sys.stdout.write(f"         names are looked for without all patches ({error})\n")
    seen: dict[tuple[str, str], str | None] = {}
    for folder in FOLDERS:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(), str(path))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
                    names = [(node.module or "", alias.name) for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "megatron"]
                else:
                    continue
                for module, name in names:
                    if (module, name) not in seen:
                        seen[module, name] = _reason(module, name)
                    if reason := seen[module, name]:
                        place = f"{path.relative_to(REPOSITORY)}:{node.lineno}"
                        yield place, f"{module}.{name}".rstrip("."), reason


def _reason(module: str, name: str) -> str | None:
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not name or hasattr(loaded, name):
        return None
    try:
        importlib.import_module(f"{module}.{name}")
    except Exception:
        return "no such name"
    return None


if __name__ == "__main__":
    sys.exit(main())
