"""What came out of a quickstart: ``results.json``, ``report.html``, a picture, a table and plain words.

All of it is what was measured, whichever way it went.
"""

from __future__ import annotations

import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remit_megatron.analysis.results import Z_95
from remit_megatron.flywheel.toy import ToyText
from remit_megatron.flywheel.toy_chain import AGAIN, ARMS, Chain, Lengths
from remit_megatron.flywheel.toy_evaluation import SAMPLES
from remit_megatron.runtime.extras import is_installed
from remit_megatron.runtime.files import write_atomic
from remit_megatron.scoring.verdicts import beginning

MEASURES = {"greedy": "greedy", "sampled": "temperature 1", "book": "telephone book"}
NAMES = {
    "base": "base",
    "reference": "reference",
    "ntp": "ntp",
    "remit": "remit",
    "rho1": "rho1",
    "kd": "kd",
    "control": "control",
}
ABOUT = {
    "base": "before mid-training",
    "reference": "the base after reinforcement learning",
    "ntp": "plain next-token prediction",
    "remit": "guided by the reference",
    "rho1": "only the tokens the reference is furthest ahead on",
    "kd": "distilled from the reference",
    "control": "remit, guided by the base itself",
}


@dataclass(frozen=True)
class SeedResult:
    """Of one seed.

    Attributes:
        models: base, reference and arms -> greedy, sampled, book.
        curves: arm -> accuracy at temperature 1 over reinforcement learning.
        verdict: the sentence of ``remit check reference``.
    """

    seed: int
    models: dict[str, dict[str, float]]
    curves: dict[str, list[float]]
    verdict: str


def gather(chains: Sequence[Chain]) -> list[SeedResult]:
    """Reads what the stages wrote."""
    return [
        SeedResult(
            seed=chain.text.seed,
            models={name: _read(chain.scores(name)) for name in ("base", "reference", *chain.arms)},
            curves={name: _read(chain.curve(name)) for name in chain.again},
            verdict=_read(chain.check("reference"))["verdict"],
        )
        for chain in chains
    ]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Report:
    """The results of a quickstart in every form.

    Args:
        results: one a seed.
        lengths: of the trainings.
        documents: of the corpus.
    """

    results: list[SeedResult]
    lengths: Lengths
    documents: int

    def record(self) -> dict[str, Any]:
        """``results.json``: means over the seeds, and each seed where there are several."""
        record: dict[str, Any] = {
            "arms": {name: self._means(name) for name in ARMS},
            "after_rl": {name: [round(value, 4) for value in self.curve(name)] for name in AGAIN},
            "seed": self.results[0].seed,
            "before": {name: self._means(name) for name in ("base", "reference")},
            "reference_check": self.results[0].verdict,
        }
        if len(self.results) > 1:
            record["seeds"] = [
                {"seed": r.seed, "models": r.models, "after_rl": r.curves, "reference_check": r.verdict}
                for r in self.results
            ]
        return record

    def values(self, name: str, measure: str) -> list[float]:
        """Of a model, one a seed."""
        return [result.models[name][measure] for result in self.results]

    def mean(self, name: str, measure: str) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values(name, measure))

    def curve(self, name: str) -> list[float]:
        """Means over the seeds."""
        return [statistics.fmean(values) for values in zip(*(r.curves[name] for r in self.results), strict=True)]

    def points(self) -> list[int]:
        """Steps of reinforcement learning at which the curves have their values."""
        return list(range(0, self.lengths.again + 1, self.lengths.every))

    def _means(self, name: str) -> dict[str, float]:
        return {measure: round(self.mean(name, measure), 4) for measure in MEASURES}

    # -- words -------------------------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """The table and what it says, for the terminal."""
        rows = self.table()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [""]
        for row in rows:
            cells = [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)),
                row[-1],
            ]
            lines.append("  " + "  ".join(cells).rstrip())
        lines += ["", "  Accuracy at temperature 1 over reinforcement learning from the mid-trained base:"]
        points = self.points()
        lines.append("  " + "step".ljust(8) + "".join(f"{step:>7}" for step in points))
        lines += ["  " + name.ljust(8) + "".join(f"{value:7.3f}" for value in self.curve(name)) for name in AGAIN]
        return [*lines, "", *(f"- {sentence}" for sentence in self.sentences()), ""]

    def table(self) -> list[list[str]]:
        """Header and a row for each model."""
        rows = [["model", *MEASURES.values(), ""]]
        for name in NAMES:
            rows.append([name, *(self._cell(name, measure) for measure in MEASURES), ABOUT[name]])
        return rows

    def _cell(self, name: str, measure: str) -> str:
        text = f"{self.mean(name, measure):.3f}"
        if len(self.results) > 1:
            text += f" ±{statistics.stdev(self.values(name, measure)):.3f}"
        return text

    def setting(self) -> str:
        """What was run, in a sentence."""
        seeds = [result.seed for result in self.results]
        said = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})"
        text, lengths = ToyText(), self.lengths
        return (
            f"A Llama of 109 thousand parameters; {self.documents:,} documents of 38 characters, {text.book_share:.0%} "
            "pages of a telephone book, the rest worked additions in which a due carry is forgotten with probability "
            f"{text.forgotten:g}; base {lengths.base} steps, GRPO {lengths.rl}, mid-training {lengths.mid}; "
            f"{text.heldout} held-out additions; {said}."
        )

    def sentences(self) -> list[str]:
        """What was seen, where it holds and where it does not."""
        return [self._foretold(), *self._effect(), *self._rivals(), self._again(), *_WINDOW]

    def _foretold(self) -> str:
        verdicts = [result.verdict for result in self.results]
        said = verdicts[0]
        if len(verdicts) > 1:
            counts = Counter(map(beginning, verdicts))
            said = "; ".join(f"{words}, of {count} of {len(verdicts)}" for words, count in counts.most_common())
        return f"`remit check reference` had said, before mid-training: {said.rstrip('.')}."

    def _effect(self) -> list[str]:
        gains = [self._gain("remit", "ntp", measure) for measure in ("greedy", "sampled")]
        control = [self._gain("control", "ntp", measure) for measure in ("greedy", "sampled")]
        return [
            "Guided by the reference (remit) against plain training (ntp): "
            f"greedy {gains[0]}, at temperature 1 {gains[1]}.",
            "The control (remit guided by the base itself, which knows nothing more) against ntp: "
            f"greedy {control[0]}, at temperature 1 {control[1]}. Its greedy answers depend on where the base stood: "
            "compare it at temperature 1.",
        ]

    def _gain(self, name: str, other: str, measure: str) -> str:
        """The difference, with its noise: over seeds where there are several, else over the held-out problems."""
        pairs = list(zip(self.values(name, measure), self.values(other, measure), strict=True))
        gains = [first - second for first, second in pairs]
        mean = statistics.fmean(gains)
        if len(gains) > 1:
            ahead = sum(gain > 0 for gain in gains)
            return f"{mean:+.3f} (ahead in {ahead} of {len(gains)} seeds{_p_value(gains)})"
        count = ToyText.heldout * (SAMPLES if measure == "sampled" else 1)
        error = math.sqrt(sum(value * (1 - value) for value in pairs[0]) / count)
        return f"{mean:+.3f} (±{Z_95 * error:.3f} by chance alone, 95%)"

    def _rivals(self) -> list[str]:
        found = []
        for name in ("rho1", "kd"):
            right, book = (self.mean(name, m) - self.mean("remit", m) for m in ("sampled", "book"))
            found.append(
                f"{name} against remit: {right:+.3f} on additions at temperature 1, {book:+.3f} on the book, of which "
                "the reference knows no more than the base."
            )
        return found

    def _again(self) -> str:
        pairs = list(zip(self.curve("remit"), self.curve("ntp"), strict=True))
        ahead = [step for step, (remit, ntp) in zip(self.points(), pairs, strict=True) if remit > ntp]
        last = pairs[-1][0] - pairs[-1][1]
        return (
            f"Reinforcement learning from the remit base is ahead of that from the ntp base at {len(ahead)} of "
            f"{len(pairs)} points of the curve, and {last:+.3f} at its end, after {self.points()[-1]} steps."
        )

    # -- files -------------------------------------------------------------------------------------------------------

    def write(self, output: Path, directories: Sequence[Path]) -> None:
        """Writes results.json, report.html and, where matplotlib is installed, quickstart.png."""
        from remit_megatron.analysis.report.build import build, fitted
        from remit_megatron.analysis.runs import read_runs

        write_atomic(output / "results.json", json.dumps(self.record(), indent=1) + "\n")
        runs = read_runs([str(directories[0] / name) for name in ARMS])
        page = build(runs, [], [], title="One turn of the flywheel")
        page.parts.insert(0, self.part())
        write_atomic(output / "report.html", fitted(page))
        if is_installed("matplotlib"):
            write_atomic(output / "quickstart.png", self.picture())

    def part(self) -> Any:
        """The first section of the report."""
        from remit_megatron.analysis.parts import Chart, Part, Series, Table, Text

        header, *rows = self.table()
        steps = [float(step) for step in self.points()]
        series = []
        for name in AGAIN:
            low, high = self._band(name) if self._many else ([], [])
            series.append(Series(name, steps, [*self.curve(name)], low=[*low], high=[*high]))
        note = "Shares of 500 held-out additions and of 150 entries of the book" + (
            "; ± standard deviation over seeds." if self._many else "."
        )
        blocks = [
            Table(header, rows, note=note),
            Chart("Reinforcement learning from the mid-trained base", "step", "accuracy at temperature 1", series),
            *(Text(sentence) for sentence in self.sentences()),
        ]
        return Part("turn", "What came out", self.setting(), blocks)

    @property
    def _many(self) -> bool:
        return len(self.results) > 1

    def _band(self, name: str) -> tuple[list[float], list[float]]:
        columns = list(zip(*(result.curves[name] for result in self.results), strict=True))
        means, spreads = [statistics.fmean(c) for c in columns], [statistics.stdev(c) for c in columns]
        return (
            [m - s for m, s in zip(means, spreads, strict=True)],
            [m + s for m, s in zip(means, spreads, strict=True)],
        )

    def picture(self) -> bytes:
        """PNG: the models' accuracies as bars, and the curves of reinforcement learning."""
        import textwrap

        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from remit_megatron.analysis.report.colours import LIGHT, SERIES_LIGHT

        figure = Figure(figsize=(9.0, 3.5), dpi=120, facecolor=LIGHT["surface"])
        left, right = figure.add_axes((0.045, 0.25, 0.57, 0.65)), figure.add_axes((0.685, 0.25, 0.3, 0.65))
        for axes in (left, right):
            axes.set_facecolor(LIGHT["surface"])
            axes.tick_params(length=0, labelsize=8, colors=LIGHT["ink"])
            axes.grid(axis="y", color=LIGHT["line"], linewidth=0.6)
            axes.set_axisbelow(True)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        for number, (measure, label) in enumerate(MEASURES.items()):
            places = [position + 0.27 * (number - 1) for position in range(len(NAMES))]
            heights = [self.mean(name, measure) for name in NAMES]
            spread = [statistics.stdev(self.values(name, measure)) for name in NAMES] if self._many else None
            left.bar(
                places, heights, 0.25, yerr=spread, label=label, color=SERIES_LIGHT[number],
                error_kw={"linewidth": 0.8, "ecolor": LIGHT["ink"]},
            )  # fmt: skip
        left.set_xticks(range(len(NAMES)), labels=list(NAMES.values()))
        left.set_ylim(0, 1.02)
        left.legend(
            fontsize=7, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.01, 0.985), borderaxespad=0
        )
        for number, name in enumerate(AGAIN):
            right.plot(
                self.points(), self.curve(name), marker="o", markersize=3, color=SERIES_LIGHT[number], label=name
            )
            if self._many:
                right.fill_between(
                    self.points(), *self._band(name), color=SERIES_LIGHT[number], alpha=0.15, linewidth=0
                )
        right.set_xticks(self.points())
        right.set_title("RL from the mid-trained base", loc="left", fontsize=8, color=LIGHT["ink"])
        right.set_xlabel("step", fontsize=8, color=LIGHT["muted"])
        right.set_ylabel("accuracy at temperature 1", fontsize=8, color=LIGHT["muted"])
        right.legend(fontsize=8, frameon=False, loc="lower right")
        caption = self.setting() + (
            " Bars and bands: mean and standard deviation over the seeds." if self._many else ""
        )
        figure.text(0.012, 0.02, textwrap.fill(caption, 150), fontsize=7.5, color=LIGHT["muted"], va="bottom")
        stream = io.BytesIO()
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
        return stream.getvalue()


def _p_value(gains: Sequence[float]) -> str:
    """Of a paired t-test against no difference; nothing with fewer than three seeds or without scipy."""
    if len(gains) < 3 or not is_installed("scipy") or statistics.stdev(gains) < 1e-9:
        return ""
    from scipy import stats

    test: Callable[..., Any] = stats.ttest_1samp
    return f", p = {float(test(gains, 0.0).pvalue):.1g}"


# To be read beside one turn of the wheel: what docs/study.md found with five seeds.
_WINDOW = (
    "Where it holds (docs/study.md, five seeds): with epsilon 0.2 a weight moves the odds of a token by at most "
    "1.2 / 0.8 = 1.5. At 0.55 forgotten that lifts right carries from 45% to about 55%, so that the likeliest answer "
    "changes. At 0.35 plain training is right already; at 0.65 the clip is too tight, and without one all answers are "
    "right. The gain at temperature 1, 6 to 7 points, is there at every amount of noise from 0.35 to 0.65.",
    "Where it does not (the same five seeds; this run may differ): of a base that has not learnt its task "
    "reinforcement learning makes no reference, and following it without a clip does harm. rho1 and kd may follow the "
    "reference further here, because it is as large as the student and nearly perfect at the additions. What kd does "
    "not learn is what the reference does not know: of the book it stays at the reference's recall. Sooner in "
    "reinforcement learning was not higher at its end in the mean of the five.",
)
