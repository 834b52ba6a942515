"""Every deviation from upstream, one file each. Nothing patches Megatron from anywhere else.

A patch says what it changes, why, which test fails without it, where upstream stands, and when to drop it; it is
applied once (a second call does nothing) and refuses a version that it was not tested with. ``remit doctor`` lists
them.

``apply()`` must run before the first ``import megatron``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

# How remit tells this package from others of its name, before it runs any of it (remit_megatron/runtime/installed.py).
OWNER = "remit_megatron"

# Order matters: quiet before anything is imported, the device before Megatron asks for it.
MODULES = (
    "quiet_megatron",
    "cpu_device",
    "cpu_random",
    "compile_helpers",
    "schedule",
    "pipeline_wait",
    "train_step",
    "training_log",
    "checkpoint_commit",
    "save_without_a_server",
    "asynchronous_save",
    "evaluation_log",
    "optimizer_overrides",
    "distributed_optimizer_resume",
    "optimizer_load_memory",
    "mla_rope_key_gradient",
    "mla_query_norm_gradient",
    "packed_rope",
    "head_without_gradient_fusion",
    "cpu_optimizer",
)


class UnsupportedVersion(RuntimeError):
    """The installed package is not one that the patch was tested with."""


@dataclass
class Patch:
    """One deviation from upstream.

    Attributes:
        name: file name without ``.py``.
        target: what is changed, by its dotted name.
        package: distribution whose version guards the patch.
        versions: versions of that distribution that the patch was tested with.
        why: what goes wrong without it.
        test: a test that fails without it, as ``file::name``.
        upstream: where upstream stands (issue, pull request, or "not reported").
        drop_when: the condition under which this file can be deleted.
        install: makes the change; called at most once.
        needed: says whether this machine needs it.
        note: what the patch does not reach, or another remark for the reader of ``remit doctor``.
    """

    name: str
    target: str
    package: str
    versions: tuple[str, ...]
    why: str
    test: str
    upstream: str
    drop_when: str
    install: Callable[[], None]
    needed: Callable[[], bool] = lambda: True
    note: str = ""
    _in_force: bool = field(default=False, repr=False)

    def in_force(self) -> bool:
        """Whether the change has been made in this process."""
        return self._in_force

    def apply(self) -> bool:
        """Makes the change if this machine needs it; returns whether it is in force.

        Raises:
            UnsupportedVersion: the installed package is not one of ``versions``.
        """
        if self._in_force or not self.needed():
            return self._in_force
        found = importlib.metadata.version(self.package)
        # Local parts of a version (2.13.0+cu130) name a build, not another source.
        if not any(found.split("+")[0] == known or found.startswith(known + ".") for known in self.versions):
            raise UnsupportedVersion(
                f"patch {self.name}: found {self.package} {found}; expected {' or '.join(self.versions)} "
                f"(tested with those; see patches/{self.name}.py)"
            )
        self.install()
        self._in_force = True
        logger.debug("patch %s: %s", self.name, self.target)
        return True


def registered() -> list[Patch]:
    """All patches, in the order of application."""
    return [importlib.import_module(f"patches.{module}").PATCH for module in MODULES]


def apply() -> None:
    """Applies what this machine needs. Idempotent.

    Raises:
        UnsupportedVersion: see :meth:`Patch.apply`.
    """
    for patch in registered():
        patch.apply()
    # The patches above have loaded most of Megatron by now.
    from patches.quiet_megatron import redirect

    redirect()
