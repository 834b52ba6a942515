"""Run directories as the training leaves them, made by hand: files only."""

from __future__ import annotations

import json
import struct
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

START = datetime(2026, 3, 1, 8, 0, 0)


def make_run(
    directory: Path, *, steps: int = 40, objective: dict[str, Any] | None = None, level: float = 2.0, **changes: Any
) -> Path:
    """A run of ``steps`` steps of 1 s and 1,000 tokens on two ranks; the loss falls from ``level`` + 1 to ``level``."""
    (directory / "logs").mkdir(parents=True)
    objective = objective or {"name": "ntp"}
    guided = objective["name"] != "ntp"
    config: dict[str, Any] = {
        "init": "base",
        "objective": objective,
        "reference": {"checkpoint": "reference", "source": "live"} if guided else None,
        "data": {"train": [[1.0, "corpus"]], "valid": [[1.0, "held_out"]]},
        "megatron": {"train_iters": steps, "lr": 1e-3, "clip_grad": 1.0},
        "run_dir": str(directory),
        "seed": 1,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section] = value if not name else {**config[section], name: value}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(1, steps + 1):
        loss = level + 1 - step / steps
        lines.append(
            {
                "iteration": step,
                "consumed_tokens": 1000 * step,
                "lm_loss": loss,
                "objective_loss": loss,
                "grad_norm": 0.5 + (step == 30) * 4,
                "learning_rate": 1e-3,
                "tokens_per_second": 1000.0,
                "mfu": None,
                "step_seconds": 1.0,
                "reference_seconds": 0.25 if guided else 0.0,
                "weight_mean": 1.0,
                "weight_std": 0.05 if guided else 0.0,
                "weight_clipped_low": 0.01 if guided else 0.0,
                "weight_clipped_high": 0.02 if guided else 0.0,
                "delta_mean": 0.1 if guided else 0.0,
                "delta_std": 0.3 if guided else 0.0,
                "dropped_tokens": 0,
            }
        )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validation = [{"iteration": s, "lm_loss": level + 1.2 - s / steps} for s in range(10, steps + 1, 10)]
    (directory / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validation))
    for rank in range(2):
        (directory / "logs" / f"rank_{rank}.log").write_text("")
    return directory


def log_line(seconds: float, text: str) -> str:
    """A line of a rank's log, ``seconds`` after ``START``."""
    stamp = (START + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
    return f"{stamp} INFO megatron.print: {text}\n"


def setup_line(seconds: float) -> str:
    """What Megatron says first of a start."""
    began = (START + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S.%f")
    return log_line(seconds, f"[after in-process setup and before initialize_megatron] datetime: {began}")


def write_events(path: Path, seconds: list[float]) -> None:
    """A TensorBoard event file with records at these times after ``START`` (checksums are not looked at)."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as stream:
        for step, offset in enumerate(seconds):
            message = b"\x09" + struct.pack("<d", (START + timedelta(seconds=offset)).timestamp()) + bytes([0x10, step])
            stream.write(struct.pack("<Q", len(message)) + b"\0" * 4 + message + b"\0" * 4)
