"""Progress of long work: one line that says how far, how fast, and how long is left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


def format_duration(seconds: float) -> str:
    """``75`` -> ``1:15``; ``3725`` -> ``1:02:05``; a day or more -> ``1d 02:03:04``."""
    seconds = max(0, round(seconds))
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{secs:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def format_count(number: float) -> str:
    """``1234567`` -> ``1.23M``: three significant digits, thousands as K, M, B, T."""
    for suffix in ("", "K", "M", "B", "T"):
        if abs(number) < 999.5 or suffix == "T":
            text = f"{number:.3g}" if suffix or number != int(number) else f"{int(number)}"
            return text + suffix
        number /= 1000
    raise AssertionError("unreachable")


class Progress:
    """Reports ``done`` of ``total`` at most once every ``interval`` seconds.

    A terminal gets one line that rewrites itself; a log file gets a new line each time.

    Args:
        label: what is being done, at the start of the line.
        total: how much there is, or None where that is not known.
        unit: what is counted.
        interval: seconds between two lines.
        delay: seconds before the first one; work that ends sooner shows none (:meth:`end`).
    """

    def __init__(
        self,
        label: str,
        *,
        total: float | None,
        unit: str,
        interval: float = 2.0,
        delay: float = 1.0,
        stream: TextIO | None = None,
    ):
        self._label, self._total, self._unit, self._interval = label, total, unit, interval
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._next = self._started + min(interval, delay)
        self._done = 0.0
        self._shown = False

    def update(self, done: float, note: str = "") -> None:
        """``done`` so far, in all (not since the last call); ``note`` is put at the end of the line."""
        self._done = done
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval
            self._write(note, end=False)

    def finish(self, note: str = "") -> None:
        """Writes the last line."""
        self._write(note, end=True)

    def end(self) -> None:
        """Writes the last line where there was one before."""
        if self._shown:
            self._write("", end=True)

    def _write(self, note: str, *, end: bool) -> None:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = self._done / elapsed
        parts = [f"{self._label}: {format_count(self._done)}"]
        if self._total:
            parts[0] += f"/{format_count(self._total)} {self._unit} ({100 * self._done / self._total:.0f}%)"
        else:
            parts[0] += f" {self._unit}"
        parts.append(f"{format_count(rate)} {self._unit}/s")
        if end:
            parts.append(f"took {format_duration(elapsed)}")
        elif self._total and rate > 0:
            parts.append(f"{format_duration((self._total - self._done) / rate)} left")
        if note:
            parts.append(note)
        line = ", ".join(parts)
        if self._stream.isatty():
            self._stream.write(f"\r\033[K{line}" + ("\n" if end else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._shown = True
