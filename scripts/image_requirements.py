#!/usr/bin/env python3
"""What the image gets on top of its base, and what goes again before it is done.

    image_requirements.py install constraints.txt > requirements.txt    to be installed with --no-deps
    image_requirements.py unneeded > unneeded.txt                       to be uninstalled, with remit_megatron there

constraints.txt names every package, so that it can be installed without resolving. Where the image's Python has torch,
torch and what belongs to its build (triton, nvidia-*, cuda-*) are left out: they were compiled to fit each other and
the image's Transformer Engine, and a second copy in the virtual environment would shadow them. On an image without
torch nothing is left out. It names what tests and checks need, too: what remit_megatron needs nowhere, in no extra but
``test``, is unneeded. Standard library only for ``install``: it runs before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

OURS = "remit-megatron"
FOR_TESTS = "test"
FROM_THE_IMAGE = re.compile(r"torch|triton|nvidia-.+|cuda-.+")


def canonical(name: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines: Iterable[str], *, image_has_torch: bool) -> Iterator[str]:
    """The pins to install, one per line of a constraints file that names a package."""
    for line in lines:
        pin = line.split("#", 1)[0].strip()
        name = canonical(re.split(r"[=<>!~;\[ ]", pin, maxsplit=1)[0])
        if pin and not (image_has_torch and FROM_THE_IMAGE.fullmatch(name)):
            yield pin


def installed(distribution: str) -> bool:
    """Whether this Python (or, in a virtual environment with system packages, the system's) has the distribution."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def needed() -> set[str]:
    """remit_megatron and all that it needs, with every extra but the one for tests; of what is installed."""
    from packaging.requirements import Requirement

    seen: set[tuple[str, str]] = set()
    extras = set(importlib.metadata.metadata(OURS).get_all("Provides-Extra") or []) - {FOR_TESTS}
    pending = [(OURS, extra) for extra in ("", *extras)]
    while pending:
        name, extra = pending.pop()
        if (name, extra) in seen or not installed(name):
            continue
        seen.add((name, extra))
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pending += [(canonical(requirement.name), wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in seen}


def unneeded(folder: Path) -> list[str]:
    """Names of the distributions in a site-packages folder that nothing of ours needs."""
    found = {canonical(item.metadata["Name"]) for item in importlib.metadata.distributions(path=[str(folder)])}
    return sorted(found - needed())


def main(arguments: list[str]) -> int:
    """Writes names to standard output, and what was decided to standard error."""
    if arguments == ["unneeded"]:
        import sysconfig

        names = unneeded(Path(sysconfig.get_path("purelib")))
        sys.stdout.write("".join(f"{name}\n" for name in names))
        sys.stderr.write(f"{len(names)} packages are for tests and checks only\n")
        return 0
    if len(arguments) != 2 or arguments[0] != "install":
        sys.stderr.write("usage: image_requirements.py install constraints.txt | unneeded\n")
        return 2
    has_torch = installed("torch")
    pins = list(requirements(Path(arguments[1]).read_text().splitlines(), image_has_torch=has_torch))
    sys.stdout.write("".join(f"{pin}\n" for pin in pins))
    source = "the image" if has_torch else "constraints.txt"
    sys.stderr.write(f"torch comes from {source}; {len(pins)} packages to install\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
