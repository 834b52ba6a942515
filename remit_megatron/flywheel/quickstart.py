"""``remit quickstart``: one true turn of the flywheel at toy size, on two CPU cores, every part real.

    text -> base -> reinforcement learning -> reference -> mid-training with each objective -> evaluation
         -> reinforcement learning again -> results.json, report.html

Every stage is a command that can be run by hand; ``commands.txt`` has them all.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from remit_megatron.flywheel.toy import ToyText
from remit_megatron.flywheel.toy_chain import Chain, Lengths
from remit_megatron.flywheel.toy_stages import Command, Stage, Stages
from remit_megatron.runtime.errors import EXIT_DONE
from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.progress import format_duration

FULL = Lengths()
QUICK = Lengths(base=450, rl=30, mid=120, again=12, every=4)
COMMANDS_FILE = "commands.txt"


@dataclass(frozen=True)
class Quickstart:
    """The chain over one or several seeds.

    Args:
        output: receives everything; the first seed's runs lie in it, those of others in ``seeds/N``.
        lengths: of the trainings.
        seeds: one or more; the effect of more is their spread.
        documents: of the corpus.
    """

    output: Path
    lengths: Lengths
    seeds: tuple[int, ...]
    documents: int = ToyText.documents

    def chains(self) -> list[Chain]:
        """One a seed."""
        return [
            Chain(
                self.output,
                ToyText(seed=seed, documents=self.documents),
                self.lengths,
                cell="" if number == 0 else f"seeds/{seed}",
                label=f"Seed {seed}. " if len(self.seeds) > 1 else "",
            )
            for number, seed in enumerate(self.seeds)
        ]

    def run(self) -> int:
        """Runs what is not complete, and reports. Returns the exit code."""
        from remit_megatron.flywheel.quickstart_report import Report, gather

        started = time.monotonic()
        chains = self.chains()
        stages = [stage for chain in chains for stage in chain.stages()]
        cores = len(os.sched_getaffinity(0))
        write_atomic(self.output / COMMANDS_FILE, command_lines(stages))
        _say(
            f"One turn of the flywheel in {self.output}, {min(cores, 2)} of {cores} cores: about "
            f"{format_duration(sum(stage.seconds for stage in stages) / min(cores, 2))} on a quiet machine."
        )
        machine = Stages(self.output, stages, min(cores, 2), _say)
        code = machine.run()
        if code != EXIT_DONE:
            return code
        report = Report(gather(chains), self.lengths, self.documents)
        report.write(self.output, [chain.directory for chain in chains])
        for line in report.lines():
            _say(line)
        elapsed = format_duration(time.monotonic() - started)
        _say(
            f"{self.output / 'report.html'} shows it, {self.output / COMMANDS_FILE} has the commands. "
            f"All of it took {elapsed}."
        )
        return EXIT_DONE


def command_lines(stages: list[Stage]) -> str:
    """Every command of the stages, one a line, to be run by hand."""
    lines = []
    for stage in stages:
        for step in stage.steps:
            if isinstance(step, Command):
                lines.append("remit " + " ".join(shlex.quote(str(word)) for word in step.words))
            else:
                lines.append(f"# {step.function.__name__} {json.dumps(dict(step.arguments))}")
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
