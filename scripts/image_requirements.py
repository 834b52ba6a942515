#!/usr/bin/env python3
"""What to install with --no-deps on top of an image: image_requirements.py constraints.txt > requirements.txt

constraints.txt names every package, so that it can be installed without resolving. Where the image's Python has torch,
torch and what belongs to its build (triton, nvidia-*, cuda-*) are left out: they were compiled to fit each other and
the image's Transformer Engine, and a second copy in the virtual environment would shadow them. On an image without
torch nothing is left out. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

FROM_THE_IMAGE = re.compile(r"torch|triton|nvidia-.+|cuda-.+")


def requirements(lines: Iterable[str], *, image_has_torch: bool) -> Iterator[str]:
    """The pins to install, one per line of a constraints file that names a package."""
    for line in lines:
        pin = line.split("#", 1)[0].strip()
        name = re.split(r"[=<>!~;\[ ]", pin, maxsplit=1)[0].lower().replace("_", "-")
        if pin and not (image_has_torch and FROM_THE_IMAGE.fullmatch(name)):
            yield pin


def installed(distribution: str) -> bool:
    """Whether this Python (or, in a virtual environment with system packages, the system's) has the distribution."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """Writes the requirements to standard output, and what was decided to standard error."""
    if len(arguments) != 1:
        sys.stderr.write("usage: image_requirements.py constraints.txt\n")
        return 2
    has_torch = installed("torch")
    pins = list(requirements(Path(arguments[0]).read_text().splitlines(), image_has_torch=has_torch))
    sys.stdout.write("".join(f"{pin}\n" for pin in pins))
    source = "the image" if has_torch else "constraints.txt"
    sys.stderr.write(f"torch comes from {source}; {len(pins)} packages to install\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
