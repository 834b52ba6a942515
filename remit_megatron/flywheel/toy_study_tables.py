"""The study's data as Markdown: models, claims with their tests, and what the check of the reference had said."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from remit_megatron.flywheel.toy_study import MAIN, STRENGTHS, UNCLIPPED, Comparison, compare, difference, predictions

_LEVEL = 0.05


def markdown(data: Mapping[str, Any]) -> str:
    """All tables, in the order of the questions."""
    parts = [_models(data), _claims(data), _curves(data), _predictions(data)]
    return "\n\n".join(part for part in parts if part) + "\n"


def picture(data: Mapping[str, Any]) -> bytes:
    """The main cell as the quickstart draws it, PNG: the picture of the README."""
    from remit_megatron.flywheel.quickstart_report import Report, SeedResult
    from remit_megatron.flywheel.toy import ToyText
    from remit_megatron.flywheel.toy_chain import Lengths

    results = [
        SeedResult(int(seed), found["models"], found["after_rl"], found["checks"]["reference"]["verdict"])
        for seed, found in sorted(data["cells"][MAIN].items(), key=lambda item: int(item[0]))
    ]
    return Report(results, Lengths(), ToyText.documents).picture()


def _models(data: Mapping[str, Any]) -> str:
    lines = ["| cell | model | seeds | greedy | temperature 1 | book |", "|---|---|---|---|---|---|"]
    for cell, seeds in sorted(data["cells"].items()):
        names = dict.fromkeys(name for seed in seeds.values() for name in seed["models"])
        for name in sorted(names, key=_rank):
            rows = [seed["models"][name] for seed in seeds.values() if name in seed["models"]]
            cells = [_spread([row[measure] for row in rows]) for measure in ("greedy", "sampled", "book")]
            lines.append(f"| {cell} | {name} | {len(rows)} | {' | '.join(cells)} |")
    return "Means ± standard deviations over seeds.\n\n" + "\n".join(lines)


def _rank(name: str) -> tuple[int, str]:
    order = ("base", "reference", "ntp", "remit")
    return (order.index(name), "") if name in order else (len(order), name)


def _spread(values: list[float]) -> str:
    spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


# (claim, cell, model, other, measure, what is claimed of the difference: above 0, below 0, or none).
_CLAIMS: list[tuple[str, str, str, str, str, str]] = [
    ("remit beats ntp, greedy", MAIN, "remit", "ntp", "greedy", "above"),
    ("remit beats ntp at temperature 1", MAIN, "remit", "ntp", "sampled", "above"),
    ("it costs nothing of the book", MAIN, "remit", "ntp", "book", "none"),
    ("guided by the base itself: no gain", MAIN, "control", "ntp", "sampled", "none"),
    ("weights shuffled: no gain", MAIN, "shuffled", "ntp", "sampled", "none"),
    ("round two beats round one at temperature 1", MAIN, "second", "remit", "sampled", "above"),
    ("rho1 is ahead of remit on the additions", MAIN, "rho1", "remit", "sampled", "above"),
    ("rho1 pays on the book", MAIN, "rho1", "remit", "book", "below"),
    ("kd is ahead of remit on the additions", MAIN, "kd", "remit", "sampled", "above"),
    ("kd pays on the book", MAIN, "kd", "remit", "book", "below"),
    ("epsilon 0.1 gains less than 0.2", MAIN, "epsilon-0.1", "remit", "sampled", "below"),
    ("epsilon 0.5 gains more than 0.2", MAIN, "epsilon-0.5", "remit", "sampled", "above"),
    ("no clip gains more than 0.2", MAIN, "no-clip", "remit", "sampled", "above"),
    ("no clip pays on the book", MAIN, "no-clip", "remit", "book", "below"),
    *(
        (f"a reference of {steps} RL steps still guides", MAIN, f"rl-{steps}", "ntp", "sampled", "above")
        for steps in STRENGTHS
    ),
    *(
        (f"remit beats ntp at {noise} forgotten, {word}", f"noise-{noise}", "remit", "ntp", measure, "above")
        for noise in (0.35, 0.45, 0.5, 0.6, 0.65)
        for measure, word in (("sampled", "temperature 1"), ("greedy", "greedy"))
    ),
    ("no clip beats 0.2 at 0.65 forgotten, greedy", "noise-0.65", "no-clip", "remit", "greedy", "above"),
    *(
        (f"base of {steps} steps: {name} beats ntp", f"base-{steps}", name, "ntp", "sampled", "above")
        for steps in (150, 300)
        for name in ("remit", "no-clip", "rho1")
    ),
]


def _claims(data: Mapping[str, Any]) -> str:
    lines = ["| claim | difference | 95% | seeds above 0 | p | |", "|---|---|---|---|---|---|"]
    for claim, cell, name, other, measure, wanted in _CLAIMS:
        found = difference(data, cell, name, other, measure)
        if found is not None:
            lines.append(f"| {claim} | {' | '.join([*found.cells(), verdict(found, wanted)])} |")
    for claim, part in (
        ("RL from remit is ahead of RL from ntp, mean of the curve behind its start", slice(1, None)),
        ("and at its end", slice(-1, None)),
    ):
        found = curve_difference(data, part)
        if found is not None:
            lines.append(f"| {claim} | {' | '.join([*found.cells(), verdict(found, 'above')])} |")
    return "Paired over seeds; two-sided t-tests, not corrected for their number.\n\n" + "\n".join(lines)


def verdict(found: Comparison, wanted: str) -> str:
    """Whether the data show what was claimed: shown, not shown, contradicted; of "no difference": consistent or not."""
    if found.p is None:
        return "too few seeds"
    clear = found.p < _LEVEL
    if wanted == "none":
        return f"a difference is there ({'above' if found.mean > 0 else 'below'} 0)" if clear else "none seen"
    if not clear:
        return "not shown"
    return "shown" if (found.mean > 0) == (wanted == "above") else "contradicted"


def curve_difference(data: Mapping[str, Any], part: slice) -> Comparison | None:
    """Remit less ntp in the accuracy over reinforcement learning, a mean over ``part`` of the points."""
    curves = [seed["after_rl"] for seed in data["cells"].get(MAIN, {}).values() if len(seed["after_rl"]) == 2]
    if not curves:
        return None
    return compare(statistics.fmean(c["remit"][part]) - statistics.fmean(c["ntp"][part]) for c in curves)


def _curves(data: Mapping[str, Any]) -> str:
    curves = [seed["after_rl"] for seed in data["cells"].get(MAIN, {}).values() if len(seed["after_rl"]) == 2]
    if not curves:
        return ""
    points = len(curves[0]["ntp"])
    lines = ["| RL from | " + " | ".join(f"point {n}" for n in range(points)) + " |", "|---" * (points + 1) + "|"]
    for name in ("ntp", "remit"):
        cells = [_spread([curve[name][n] for curve in curves]) for n in range(points)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "Accuracy at temperature 1 over reinforcement learning, four steps from point to point.\n\n" + "\n".join(
        lines
    )


def _predictions(data: Mapping[str, Any]) -> str:
    rows = predictions(data)
    if not rows:
        return ""
    lines = [
        "| `remit check reference` said | references | remit ahead of ntp | mean difference | no clip ahead "
        "| rho1 ahead |",
        "|---|---|---|---|---|---|",
    ]
    for said, words in ((1, "expect a gain"), (0, "expect nothing"), (-1, "expect harm")):
        told = [row for row in rows if row["said"] == said]
        if told:
            gains = [row["gain"] for row in told]
            cells = [f"{sum(gain > 0 for gain in gains)}", f"{statistics.fmean(gains):+.3f}"]
            for name in UNCLIPPED:
                others = [row["further"][name] for row in told if name in row["further"]]
                cells.append(f"{sum(gain > 0 for gain in others)} of {len(others)}" if others else "–")
            lines.append(f"| {words} | {len(told)} | {' | '.join(cells)} |")
    right = sum((row["gain"] > 0) - (row["gain"] < 0) == row["said"] for row in rows if row["said"])
    told = sum(row["said"] != 0 for row in rows)
    note = f"The sign was right {right} of {told} times that one was predicted (temperature 1, one run each)."
    return "What the check had said, over all cells and seeds.\n\n" + "\n".join(lines) + f"\n\n{note}"
