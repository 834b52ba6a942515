"""What a run says of itself: metrics.jsonl, validation.jsonl, and one progress line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from remit_megatron.runtime.files import write_atomic
from remit_megatron.runtime.progress import format_count, format_duration

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
EVALUATION_FILE = "evaluation.jsonl"

# Dense peak of the tensor cores in bf16, FLOP/s, from the makers' data sheets (without sparsity).
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "GH200": 989e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by its name, or None for devices that are not in the table (then ``mfu`` is null)."""
    for name in sorted(_PEAK_FLOPS, key=len, reverse=True):
        if name in device_name:
            return _PEAK_FLOPS[name]
    return None


def step_statistics(losses: Mapping[str, Tensor], *, microbatches: int) -> dict[str, float | None]:
    """The step's figures from Megatron's averages of :meth:`TrainingStep.loss`.

    Args:
        losses: name to the sum over the global batch divided by the number of counted tokens; ``tokens``,
            ``counted_tokens`` and ``dropped_tokens`` by the number of microbatches instead.
        microbatches: number of microbatches of the step, over all data and context parallel ranks.

    Returns:
        ``lm_loss``, ``objective_loss`` (nats), ``weight_mean``, ``weight_std``, ``weight_clipped_low``,
        ``weight_clipped_high`` (shares of the counted tokens), ``delta_mean``, ``delta_std`` (nats),
        ``dropped_tokens``.
    """
    value = {name: float(tensor) for name, tensor in losses.items()}

    def deviation(mean: float, square: float) -> float:
        return math.sqrt(max(square - mean * mean, 0.0))

    return {
        "lm_loss": value["lm_loss"],
        "objective_loss": value["objective_loss"],
        "weight_mean": 1.0 + value["weight_excess"],
        "weight_std": deviation(value["weight_excess"], value["weight_excess_squared"]),
        "weight_clipped_low": value["weight_clipped_low"],
        "weight_clipped_high": value["weight_clipped_high"],
        "delta_mean": value["delta"],
        "delta_std": deviation(value["delta"], value["delta_squared"]),
        "dropped_tokens": round(value["dropped_tokens"] * microbatches),
    }


def token_counts(losses: Mapping[str, Tensor], *, microbatches: int) -> tuple[int, int]:
    """Tokens of the step's global batch: those that are not masked, and those in the loss's denominator.

    Args:
        losses, microbatches: as for :func:`step_statistics`.
    """
    tokens, counted = (round(float(losses[name]) * microbatches) for name in ("tokens", "counted_tokens"))
    return tokens, counted


def _json_line(record: Mapping[str, Any]) -> str:
    # NaN and Infinity are not JSON: a reader in another language would stop there.
    clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}
    return json.dumps(clean) + "\n"


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a ``.jsonl`` file, each with its ``iteration``. Left out is what is none: a last line that a killed
    process left half written, or damage."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("iteration")) is int:
            records.append(record)
    return records


class RunRecorder:
    """Appends to the files of a run directory and writes the progress line; used on one rank.

    Args:
        run_dir: the run's directory.
        total_steps: iterations of the whole run.
        resumed_at: iteration that training goes on from; records after it belong to work that was lost, and are
        removed. interval: steps between two progress lines.
    """

    def __init__(
        self, run_dir: str | Path, *, total_steps: int, resumed_at: int, interval: int = 1, stream: TextIO | None = None
    ):
        self._run_dir = Path(run_dir)
        self._total, self._first, self._interval = total_steps, resumed_at, max(1, interval)
        self._stream = stream or sys.stdout
        self._started = time.monotonic()
        for name in (METRICS_FILE, VALIDATION_FILE, EVALUATION_FILE):
            if name == EVALUATION_FILE and not (self._run_dir / name).exists():
                continue  # most runs have none
            records = [r for r in read_records(self._run_dir / name) if r["iteration"] <= resumed_at]
            write_atomic(self._run_dir / name, "".join(_json_line(r) for r in records))
        self._metrics = open(self._run_dir / METRICS_FILE, "a", buffering=1)  # noqa: SIM115 - open for the whole run

    def step(self, record: Mapping[str, Any]) -> None:
        """Appends the metrics of one step and, at the interval, writes the progress line."""
        self._metrics.write(_json_line(record))
        iteration = record["iteration"]
        if iteration % self._interval == 0 or iteration == self._total:
            self._progress(record)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Appends the result of one validation."""
        with open(self._run_dir / VALIDATION_FILE, "a") as file:
            file.write(_json_line(record))
        text = f"validation at step {record['iteration']}: lm_loss {record['lm_loss']:.4f}"
        if not math.isfinite(record["lm_loss"]):
            text += " (no token of data.valid counts, or the student's losses are not finite)"
        self._line(text, keep=True)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Appends the result of a suite (:meth:`RunEvaluation.run`) and writes its figures on one line."""
        with open(self._run_dir / EVALUATION_FILE, "a") as file:
            file.write(_json_line(record))
        tasks = record["tasks"].items()
        figures = "  ".join(f"{name.split('/')[0]} {task['score']:.3f}" for name, task in tasks)
        cost = f"{format_duration(record['seconds'])}, {record['share']:.1%} of the time so far"
        self._line(f"evaluation at step {record['iteration']}: {figures} ({cost})", keep=True)

    def message(self, text: str) -> None:
        """Writes a line of its own among the progress lines."""
        self._line(text, keep=True)

    def _progress(self, record: Mapping[str, Any]) -> None:
        iteration = record["iteration"]
        elapsed = time.monotonic() - self._started
        left = elapsed / max(iteration - self._first, 1) * (self._total - iteration)
        parts = [f"step {iteration}/{self._total}", f"lm_loss {record['lm_loss']:.4f}"]
        if record["objective_loss"] != record["lm_loss"]:
            parts.append(f"objective {record['objective_loss']:.4f}")
        if record["dropped_tokens"]:
            parts.append(f"dropped {record['dropped_tokens']}")
        if record.get("skipped"):
            parts.append("skipped")
        if record.get("loss_scale"):
            parts.append(f"loss scale {record['loss_scale']:g}")
        if record["learning_rate"] is not None:
            parts.append(f"lr {record['learning_rate']:.2e}")
        if record["grad_norm"] is not None:
            parts.append(f"grad {record['grad_norm']:.3f}")
        parts += [
            f"{format_count(record['tokens_per_second'])} tok/s",
            f"{format_duration(left)} left",
        ]
        self._line("  ".join(parts), keep=iteration == self._total)

    def _line(self, text: str, *, keep: bool) -> None:
        if self._stream.isatty():
            self._stream.write(f"\r\033[K{text}" + ("\n" if keep else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
