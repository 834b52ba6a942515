"""Colours of charts and heatmaps, one set for a light page and one for a dark one, told apart with any color vision.

Series keep their order; differences go from red over the page's own colour to blue.
"""

from __future__ import annotations

import math

SERIES_LIGHT = ("#2a78d6", "#eb6834", "#1baf7a", "#c98500", "#d55181", "#4a3aa7", "#008300", "#8a8983")
SERIES_DARK = ("#3987e5", "#d95926", "#199e70", "#c98500", "#d55181", "#9085e9", "#3a9c3a", "#8a8983")

# Edges in nats of the four shades of |delta|; below the first a token has no colour.
EDGES = (0.1, 0.3, 1.0, 3.0)

LIGHT = {
    "surface": "#fcfcfb",
    "raised": "#f3f2ef",
    "ink": "#1b1a18",
    "muted": "#6b6a64",
    "line": "#e1e0d9",
    "ahead": "#2a78d6",
    "behind": "#d0463b",
    "p1": "#dfecfc",
    "p2": "#b4d3f7",
    "p3": "#7fb3f0",
    "p4": "#1f62b8",
    "n1": "#fce3df",
    "n2": "#f6bfb8",
    "n3": "#ee9389",
    "n4": "#b5352c",
}
DARK = {
    "surface": "#191917",
    "raised": "#242422",
    "ink": "#f0efea",
    "muted": "#a5a49c",
    "line": "#383835",
    "ahead": "#3987e5",
    "behind": "#e66767",
    "p1": "#182c45",
    "p2": "#1b4172",
    "p3": "#225c9f",
    "p4": "#79b2f5",
    "n1": "#402120",
    "n2": "#662c29",
    "n3": "#953b36",
    "n4": "#f09a92",
}


def level(delta: float | None) -> int:
    """The shade of a difference, -4 to 4."""
    if delta is None or not math.isfinite(delta):
        return 0
    shade = sum(abs(delta) >= edge for edge in EDGES)
    return shade if delta > 0 else -shade
