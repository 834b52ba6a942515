"""The study at toy size: does guidance help, when does it not, and does ``remit check reference`` say so before?

Every model of it comes out of the quickstart's stages, by the same commands. A cell is one base and what is made of it;
a part is the arms that one question needs. Parts share cells, so that nothing is trained twice. What came out is kept
as one JSON file, from which the tables and the tests are made.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remit_megatron.flywheel.toy import ToyText
from remit_megatron.flywheel.toy_chain import AGAIN, ARMS, NEXT, Arm, Chain, Lengths
from remit_megatron.flywheel.toy_controls import SHUFFLED
from remit_megatron.flywheel.toy_stages import Stage
from remit_megatron.runtime.files import write_atomic
from remit_megatron.scoring.verdicts import GAIN, HARM, beginning

MAIN = "main"
NOISES = (0.35, 0.45, 0.5, 0.6, 0.65)
STRENGTHS = (5, 10, 20)  # steps of reinforcement learning
BASES = (150, 300)  # steps of a base that is not done learning
UNCLIPPED = ("no-clip", "rho1")  # arms that follow a reference further than the clip of 0.2 lets `remit` do
_NTP, _REMIT, _RHO1 = ARMS["ntp"], ARMS["remit"], ARMS["rho1"]


def _remit(**settings: Any) -> Arm:
    return Arm({"name": "remit", **settings}, "reference")


# part -> cell -> arms. What a cell's text or lengths change is in `chain_of`.
PARTS: dict[str, dict[str, dict[str, Arm]]] = {
    "a": {
        MAIN: {
            **ARMS,
            "shuffled": Arm({"name": SHUFFLED}, "reference", control=SHUFFLED),
            "second": Arm({"name": "remit"}, NEXT),
        }
    },
    "epsilon": {
        MAIN: {
            "ntp": _NTP,
            "remit": _REMIT,
            "epsilon-0.1": _remit(epsilon=0.1),
            "epsilon-0.5": _remit(epsilon=0.5),
            "no-clip": _remit(epsilon=None),
        }
    },
    "strength": {
        MAIN: {
            "ntp": _NTP,
            "remit": _REMIT,
            **{f"rl-{steps}": Arm({"name": "remit"}, f"reference-{steps}") for steps in STRENGTHS},
        }
    },
    "noise": {
        f"noise-{noise}": {"ntp": _NTP, "remit": _REMIT, **({"no-clip": _remit(epsilon=None)} if noise > 0.6 else {})}
        for noise in NOISES
    },
    "base": {
        f"base-{steps}": {"ntp": _NTP, "remit": _REMIT, "no-clip": _remit(epsilon=None), "rho1": _RHO1}
        for steps in BASES
    },
}
PARTS_B = ("epsilon", "strength", "noise", "base")


def chain_of(root: Path, cell: str, arms: Mapping[str, Arm], seed: int, lengths: Lengths, documents: int) -> Chain:
    """The stages of one cell and seed.

    Args:
        lengths: of the main cell.
        documents: of the corpus.
    """
    kind, _, value = cell.partition("-")
    forgotten = float(value) if kind == "noise" else ToyText.forgotten
    if kind == "base":
        # As the full length is to the main cell's: 1 for the study itself, less for a trial of it.
        steps = max(1, int(value) * lengths.base // Lengths.base)
        lengths = Lengths(steps, lengths.rl, lengths.mid, lengths.again, lengths.every)
    return Chain(
        root,
        ToyText(seed=seed, forgotten=forgotten, documents=documents),
        lengths,
        arms=arms,
        again=[name for name in AGAIN if "second" in arms],
        cell=f"{cell}/seed-{seed}",
        kept=tuple(steps for steps in STRENGTHS if steps <= lengths.rl) if cell == MAIN else (),
        label=f"{cell}, seed {seed}. ",
    )


@dataclass(frozen=True)
class Study:
    """Some parts over some seeds.

    Args:
        root: receives everything.
        parts: names in ``PARTS``.
        lengths, documents: smaller ones try the study, and are no study.
    """

    root: Path
    parts: Sequence[str]
    seeds: Sequence[int]
    lengths: Lengths = field(default_factory=Lengths)
    documents: int = ToyText.documents

    def chains(self) -> list[Chain]:
        """Seed by seed, so that a study that is stopped has whole seeds."""
        return [
            chain_of(self.root, cell, arms, seed, self.lengths, self.documents)
            for seed in self.seeds
            for part in self.parts
            for cell, arms in PARTS[part].items()
        ]

    def stages(self) -> list[Stage]:
        """Of all chains; what several share is there once."""
        found: dict[str, Stage] = {}
        for chain in self.chains():
            for stage in chain.stages():
                found.setdefault(stage.name, stage)
        return list(found.values())


def collect(root: Path) -> dict[str, Any]:
    """What is complete below ``root``: cell -> seed -> models, curves and checks, as they were measured."""
    cells: dict[str, dict[str, Any]] = {}
    for scores in sorted(root.glob("*/seed-*/scores")):
        seed = scores.parent.name.removeprefix("seed-")
        found: dict[str, Any] = {"models": {}, "after_rl": {}, "checks": {}}
        for path in sorted(scores.glob("*.json")):
            content = json.loads(path.read_text())
            if path.stem.startswith("after_"):
                found["after_rl"][path.stem.removeprefix("after_")] = content
            elif path.stem.startswith("check_"):
                loss = content["text"]["loss_difference"]
                kept = {"verdict": content["verdict"], "ahead": loss["value"], "low": loss["low"], "high": loss["high"]}
                found["checks"][path.stem.removeprefix("check_")] = kept
            else:
                found["models"][path.stem] = content
        cells.setdefault(scores.parent.parent.name, {})[seed] = found
    return {"cells": cells}


@dataclass(frozen=True)
class Comparison:
    """A paired difference over seeds.

    Attributes:
        differences: one a seed.
        mean: of them.
        low, high: 95% interval of the mean, by Student's t.
        p: of a paired, two-sided t-test against no difference; None with fewer than three seeds.
    """

    differences: list[float]
    mean: float
    low: float
    high: float
    p: float | None

    @property
    def ahead(self) -> int:
        """Seeds in which it is above 0."""
        return sum(difference > 0 for difference in self.differences)

    def cells(self) -> list[str]:
        """Of a table: mean, interval, seeds ahead, p."""
        p = "–" if self.p is None else f"{self.p:.1g}"
        interval = "–" if math.isnan(self.low) else f"[{self.low:+.3f}, {self.high:+.3f}]"
        return [f"{self.mean:+.3f}", interval, f"{self.ahead} of {len(self.differences)}", p]


def compare(differences: Iterable[float]) -> Comparison:
    """Tests paired differences."""
    from scipy import stats

    values = list(differences)
    mean = statistics.fmean(values)
    if len(values) < 3:
        return Comparison(values, mean, math.nan, math.nan, None)
    spread = statistics.stdev(values)
    if spread < 1e-12:
        return Comparison(values, mean, mean, mean, 1.0 if abs(mean) < 1e-12 else 0.0)
    error = spread / math.sqrt(len(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, len(values) - 1))
    return Comparison(values, mean, mean - reach, mean + reach, p)


def difference(data: Mapping[str, Any], cell: str, name: str, other: str, measure: str) -> Comparison | None:
    """Of two models of a cell, over the seeds that have both; None where there is none."""
    pairs = [
        (seed["models"][name][measure], seed["models"][other][measure])
        for seed in data["cells"].get(cell, {}).values()
        if name in seed["models"] and other in seed["models"]
    ]
    return compare(first - second for first, second in pairs) if pairs else None


def predictions(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ``remit check reference`` said, beside what came of following it: one a cell, seed and reference.

    ``said`` is 1 for a gain, -1 for harm, else 0; ``gain`` is what ``remit`` is ahead of ``ntp`` at temperature 1, and
    ``further`` the same of the arms that follow the reference without the clip.
    """
    found = []
    for cell, seeds in data["cells"].items():
        for seed, entry in seeds.items():
            for reference, check in entry["checks"].items():
                arm = "remit" if reference == "reference" else f"rl-{reference.rpartition('-')[2]}"
                models = entry["models"]
                if arm not in models or "ntp" not in models:
                    continue
                gains = {name: model["sampled"] - models["ntp"]["sampled"] for name, model in models.items()}
                further = {name: gains[name] for name in UNCLIPPED if arm == "remit" and name in gains}
                said = {GAIN: 1, HARM: -1}.get(beginning(check["verdict"]), 0)
                found.append(
                    {"cell": cell, "seed": seed, "reference": reference}
                    | {"said": said, "gain": gains[arm], "further": further}
                )
    return found


def write_data(root: Path, output: Path) -> dict[str, Any]:
    """Collects into a JSON file; returns what it holds."""
    data = collect(root)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps(data, indent=1) + "\n")
    return data
