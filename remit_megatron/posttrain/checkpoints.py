"""TRL's checkpoints, ``checkpoints/checkpoint-N``, with a manifest that is written last: what a resumed run trusts."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from remit_megatron.runtime.checkpoints import MANIFEST, DamagedCheckpoint, Manifest, verify
from remit_megatron.runtime.files import remove_tree

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)$")


def checkpoint_steps(root: Path) -> list[int]:
    """Steps under ``root`` that have a directory, whole or not, newest first."""
    if not root.is_dir():
        return []
    found = (_NAME.match(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest_whole(root: Path, *, remove: bool) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose files are those of its manifest, and that manifest.

    Args:
        remove: removes the newer ones, which were never finished; a damaged one, which was, is kept as
            ``checkpoint-N.damaged``.
    """
    for step in checkpoint_steps(root):
        directory = root / f"checkpoint-{step}"
        try:
            return directory, verify(directory)
        except DamagedCheckpoint as damage:
            if not remove:
                continue
            if not (directory / MANIFEST).exists():
                shutil.rmtree(directory)
                continue
            logger.warning("skipping checkpoint %d: %s", step, damage)
            aside = directory.with_name(directory.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
    return None


def retain(root: Path, limit: int | None) -> None:
    """Removes checkpoints older than the newest ``limit``; None keeps all."""
    whole = [step for step in checkpoint_steps(root) if (root / f"checkpoint-{step}" / MANIFEST).exists()]
    for step in whole[limit:] if limit else []:
        directory = root / f"checkpoint-{step}"
        # Without its manifest it is no checkpoint any more, whatever happens during the removal.
        (directory / MANIFEST).unlink()
        remove_tree(directory)
