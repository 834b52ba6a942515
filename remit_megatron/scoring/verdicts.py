"""How a verdict of ``remit check reference`` begins, for those who write one and those who read it. Imports nothing."""

from __future__ import annotations

GAIN = "Expect a gain"
HARM = "Expect harm"
NOTHING = "Expect nothing"
AS_PLAIN = "Expect what next-token prediction gives"


def beginning(verdict: str) -> str:
    """Which of these a verdict begins with; of another sentence all of it."""
    return next((known for known in (GAIN, HARM, NOTHING, AS_PLAIN) if verdict.startswith(known)), verdict)
