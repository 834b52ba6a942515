"""An hour for each door: ``python -m tests.fuzz.long MINUTES [DOOR…] [--record FILE]``.

Every fuzzer runs again and again on new examples until it has had so many minutes of processor time, the one with the
least first. FILE (default: fuzz.jsonl) gets a line after each run, and a later call goes on from there. A run that
fails ends it with pytest's words, among them the example.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
DOORS = tuple(
    sorted(path.name.removeprefix("test_").removesuffix("_fuzz.py") for path in FOLDER.glob("test_*_fuzz.py"))
)
EXAMPLES = 3000  # of each property, in one run: minutes


def processor_seconds() -> float:
    """Of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def spent(record: Path) -> dict[str, float]:
    """Processor seconds of each door in the runs that passed."""
    total = dict.fromkeys(DOORS, 0.0)
    for line in map(json.loads, record.read_text().splitlines() if record.exists() else []):
        total[line["door"]] += line["processor_seconds"] if line["passed"] else 0.0
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, help="processor time for each door")
    parser.add_argument("doors", nargs="*", choices=[[], *DOORS], default=[], help="default: all")
    parser.add_argument("--record", type=Path, default=Path("fuzz.jsonl"))
    arguments = parser.parse_args()
    while True:
        total = spent(arguments.record)
        door = min(arguments.doors or DOORS, key=total.__getitem__)
        print("  ".join(f"{name} {total[name] / 60:.1f} min" for name in DOORS), flush=True)
        if total[door] >= 60 * arguments.minutes:
            return 0
        began = processor_seconds()
        words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", "36000", "--show-capture", "no"]
        done = subprocess.run(
            [sys.executable, *words, str(FOLDER / f"test_{door}_fuzz.py")],
            env={**os.environ, "REMIT_FUZZ": str(EXAMPLES), "OMP_NUM_THREADS": "1"},
            cwd=FOLDER.parent.parent,
            capture_output=True,
            text=True,
        )
        took = round(processor_seconds() - began, 1)
        with open(arguments.record, "a") as file:
            file.write(json.dumps({"door": door, "processor_seconds": took, "passed": done.returncode == 0}) + "\n")
        if done.returncode:
            print(done.stdout[-8000:], done.stderr[-5000:], sep="\n")
            return 1


if __name__ == "__main__":
    sys.exit(main())
