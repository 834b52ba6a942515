"""Curves of a run that was stopped and goes on: one in tensorboard, one in Weights & Biases, not one for each start."""

from __future__ import annotations

import logging
import os
import re
import secrets
from pathlib import Path

from remit_megatron.run.configuration import RunConfig
from remit_megatron.runtime.files import write_atomic

logger = logging.getLogger(__name__)

WANDB_ID_FILE = "id.txt"


def resume_logs(config: RunConfig, *, resumed_at: int) -> None:
    """Call it before Megatron opens its writers, on the rank that has them.

    Args:
        config: the run.
        resumed_at: step of the checkpoint that it goes on from; what was logged of later steps belongs to work that was
            lost.
    """
    run_dir = Path(config.run_dir or "")
    if config.logging.tensorboard and resumed_at:
        _purge(run_dir / "tensorboard", resumed_at + 1)
    if config.logging.wandb is not None and config.logging.wandb.mode != "disabled":
        # Megatron's call to wandb.init names neither. What the user has set wins.
        os.environ.setdefault("WANDB_RUN_ID", wandb_id(run_dir / "wandb"))
        os.environ.setdefault("WANDB_RESUME", "allow")


def wandb_id(folder: Path) -> str:
    """The run's identity in Weights & Biases, kept in its directory; made where there is none."""
    file = folder / WANDB_ID_FILE
    try:
        found = file.read_text().strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found):
            return found
    except OSError:
        pass
    folder.mkdir(parents=True, exist_ok=True)
    made = secrets.token_hex(4)
    write_atomic(file, made + "\n")
    return made


def _purge(folder: Path, step: int) -> None:
    """Tells tensorboard that what it has read of ``step`` and later steps is no longer so."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    if folder.is_dir() and any(folder.iterdir()):
        SummaryWriter(str(folder), purge_step=step).close()
