"""Runs the study at toy size, or writes its tables: see scripts/study_toy.sh."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/study_toy.sh", description=__doc__)
    parser.add_argument("--part", default="all", help="a, b (epsilon, strength, noise, base), one of these, or all")
    parser.add_argument("--seeds", default="1-5", help="first-last (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=Path("docs/study/toy.json"), help="default: %(default)s")
    parser.add_argument("--tables", action="store_true", help="train nothing: collect, and print the tables")
    parser.add_argument("--picture", type=Path, metavar="F.png", help="the main cell as the quickstart's picture")
    parser.add_argument("--trial", type=int, metavar="N", help="trainings of N steps, to see that all of it runs")
    args = parser.parse_args()

    from remit_megatron.runtime import warm

    warm.prepare()
    from remit_megatron.flywheel.toy_chain import Lengths
    from remit_megatron.flywheel.toy_stages import Stages
    from remit_megatron.flywheel.toy_study import PARTS, PARTS_B, Study, write_data
    from remit_megatron.flywheel.toy_study_tables import markdown, picture
    from remit_megatron.runtime.files import write_atomic

    def say(text: str) -> None:
        print(text, flush=True)

    parts = {"all": tuple(PARTS), "b": PARTS_B}.get(args.part, (args.part,))
    first, _, last = args.seeds.partition("-")
    if any(part not in PARTS for part in parts) or not first.isdigit() or not (last or first).isdigit():
        print(f"error: found --part {args.part} --seeds {args.seeds}; expected all, b, {', '.join(PARTS)}; 1-5")
        return 2
    code = 0
    if not args.tables:
        trial = {}
        if args.trial is not None:
            trial = {"lengths": Lengths(*[args.trial] * 5), "documents": 2000}
        study = Study(args.output, parts, range(int(first), int(last or first) + 1), **trial)
        cores = min(2, len(os.sched_getaffinity(0)))
        stages = study.stages()
        say(f"{len(stages)} stages, about {sum(stage.seconds for stage in stages) / cores / 60:.0f} minutes when quiet")
        code = Stages(args.output, stages, cores, say).run()
    if args.tables and not args.output.is_dir():  # a fresh clone: what was measured before
        data = json.loads(args.data.read_text())
    else:
        data = write_data(args.output, args.data)
    say(markdown(data))
    if args.picture is not None:
        write_atomic(args.picture, picture(data))
    return code


if __name__ == "__main__":
    sys.exit(main())
