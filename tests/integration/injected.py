"""Faults that are put into a rank of ``remit train`` while it runs: each a context manager, by the name in the table of
test_injected_faults.py. They run in the rank's process."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

Hurt = contextlib.AbstractContextManager


class Killed(BaseException):
    """Ends the run at a place as SIGKILL would: nothing of ours handles it, and what Python's ``finally`` does makes no
    difference to what is on the disk."""


def _target(name: str) -> tuple[Any, str]:
    module, _, attribute = name.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, last


@contextlib.contextmanager
def calls(name: str, act: Callable[[], None], *, after: bool = False, number: int = 1) -> Iterator[None]:
    """Does ``act`` before (or after) call ``number`` of a function, ``package.module:Class.function``."""
    owner, attribute = _target(name)
    original = getattr(owner, attribute)
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        hit = count == number
        if hit and not after:
            act()
        result = original(*args, **kwargs)
        if hit and after:
            act()
        return result

    with mock.patch.object(owner, attribute, wrapped):
        yield


def _kill() -> None:
    raise Killed


def _send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _fail(number: int) -> Callable[[], None]:
    def raise_it() -> None:
        raise OSError(number, os.strerror(number), "a file of the run")

    return raise_it


def killed(name: str, *, after: bool = False, number: int = 1) -> Hurt:
    """As by SIGKILL."""
    return calls(name, _kill, after=after, number=number)


@contextlib.contextmanager
def signalled(number: signal.Signals, name: str, *, after: bool = False) -> Iterator[None]:
    """As by Slurm or an operator. The rank is to be used again, so that it leaves the run and not the process."""
    with calls(name, _send(number), after=after), mock.patch("remit_megatron.runtime.stop._leave", sys.exit):
        yield


def fails(number: int, name: str, *, call: int = 1) -> Hurt:
    """The file system answers so."""
    return calls(name, _fail(number), number=call)


@contextlib.contextmanager
def disk_full(*, from_call: int) -> Iterator[None]:
    """No byte is free from a certain question on: at the start, or at a save."""
    original, count = shutil.disk_usage, 0

    def usage(path: Any) -> Any:
        nonlocal count
        count += 1
        found = original(path)
        return found if count < from_call else type(found)(found.total, found.total, 0)

    with mock.patch.object(shutil, "disk_usage", usage):
        yield


@contextlib.contextmanager
def clock_jumps(seconds: float) -> Iterator[None]:
    """The wall clock jumps at every second question, there and back."""
    original, count = time.time, 0

    def jumping() -> float:
        nonlocal count
        count += 1
        return original() + (seconds if count % 2 else 0.0)

    with mock.patch.object(time, "time", jumping):
        yield


@contextlib.contextmanager
def not_finite(name: str) -> Iterator[None]:
    """The named figure of a step's losses is NaN once, as after a broken product on a GPU."""
    import torch

    owner, attribute = _target("remit_megatron.training.engine:Engine.after_step")
    original = getattr(owner, attribute)

    def wrapped(self: Any, losses: dict[str, Any], **figures: Any) -> Any:
        if losses:
            losses = losses | {name: torch.full_like(losses[name], float("nan"))}
        return original(self, losses, **figures)

    with mock.patch.object(owner, attribute, wrapped):
        yield


@contextlib.contextmanager
def killed_while_it_writes() -> Iterator[None]:
    """As by SIGKILL in the step after a save, with the writer in the middle of a file."""
    submitted, begun = threading.Event(), threading.Event()

    def half_a_file(*_: Any, write_bucket: Any, **__: Any) -> None:
        with open(write_bucket[0], "wb") as file:
            file.write(b"half")
        begun.set()
        threading.Event().wait()  # for ever: its process is gone

    step, forward_step = _target(STEP)
    original = getattr(step, forward_step)

    def killed_after_the_save(*args: Any, **kwargs: Any) -> Any:
        if submitted.is_set():
            assert begun.wait(60)
            raise Killed
        return original(*args, **kwargs)

    writer, attribute = _target(WRITER + "write_preloaded_data")
    with (
        mock.patch.object(writer, attribute, half_a_file),
        calls(SUBMIT, submitted.set, after=True),
        mock.patch.object(step, forward_step, killed_after_the_save),
    ):
        yield


@contextlib.contextmanager
def writer_fails(number: int) -> Iterator[None]:
    """The file system answers so to the writer of an asynchronous save."""

    def fail(*_: Any, local_proc_idx: int, **__: Any) -> tuple[int, OSError]:
        return local_proc_idx, OSError(number, os.strerror(number))

    owner, attribute = _target(WRITER + "write_preloaded_data")
    with mock.patch.object(owner, attribute, fail):
        yield


COMMAND = "remit_megatron.training.command:"
ENGINE = "remit_megatron.training.engine:Engine."
FILES = "remit_megatron.runtime.checkpoints:"
SUBMIT = "patches.asynchronous_save:_submit"
WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync."
TERM, USR2 = signal.SIGTERM, signal.SIGUSR2
STEP = "remit_megatron.training.step:TrainingStep.forward_step"

FAULTS: dict[str, Callable[[], Hurt]] = {
    "SIGTERM while the configuration is prepared": lambda: signalled(TERM, COMMAND + "prepare"),
    "SIGUSR2 while the configuration is prepared": lambda: signalled(USR2, COMMAND + "prepare"),
    "SIGTERM while checkpoints are verified": lambda: signalled(
        TERM, "remit_megatron.run.directory:checkpoints.verify"
    ),
    "SIGTERM while the data is opened": lambda: signalled(TERM, COMMAND + "open_data"),
    "SIGUSR2 while the data is opened": lambda: signalled(USR2, COMMAND + "open_data"),
    "SIGTERM while the reference is loaded": lambda: signalled(TERM, ENGINE + "build_reference"),
    "SIGTERM in a step": lambda: signalled(TERM, STEP),
    "SIGUSR2 in a step": lambda: signalled(USR2, STEP),
    "SIGINT in a step": lambda: signalled(signal.SIGINT, STEP),
    "SIGTERM in a validation": lambda: signalled(TERM, ENGINE + "after_evaluation"),
    "SIGTERM as a save begins": lambda: signalled(TERM, ENGINE + "before_save"),
    "SIGTERM as a save ends": lambda: signalled(TERM, ENGINE + "after_save"),
    "killed in the set-up": lambda: killed(COMMAND + "open_data"),
    "killed before the first step": lambda: killed(STEP),
    "killed in the second step": lambda: killed(STEP, number=3),
    "killed as a save begins": lambda: killed(ENGINE + "before_save"),
    "killed when the weights are written": lambda: killed(ENGINE + "after_save"),
    "killed when the model's files are written": lambda: killed(ENGINE + "_add_model_files", after=True),
    "killed while digests are taken": lambda: killed(FILES + "describe_files"),
    "killed before the manifest": lambda: killed(FILES + "write_manifest"),
    "killed after the manifest": lambda: killed(FILES + "write_manifest", after=True),
    "killed before old checkpoints are removed": lambda: killed(FILES + "retain"),
    "killed while an old checkpoint is removed": lambda: killed("shutil:rmtree"),
    "the disk is full at the start": lambda: disk_full(from_call=1),
    "the disk is full at a save": lambda: disk_full(from_call=2),
    "quota exceeded in a save": lambda: fails(errno.EDQUOT, FILES + "describe_files"),
    "no space left for the manifest": lambda: fails(errno.ENOSPC, FILES + "write_atomic"),
    "the file system turns read-only": lambda: fails(errno.EROFS, FILES + "write_manifest"),
    "no space left for metrics.jsonl": lambda: fails(
        errno.ENOSPC, "remit_megatron.training.metrics:RunRecorder.step", call=1
    ),
    "an input/output error in a save": lambda: fails(errno.EIO, FILES + "fsync_file"),
    "a stale file handle in a save": lambda: fails(errno.ESTALE, FILES + "describe_files"),
    "the clock jumps a day back": lambda: clock_jumps(-86400.0),
    "the clock jumps a year ahead": lambda: clock_jumps(366 * 86400.0),
    "the student's loss is not finite": lambda: not_finite("lm_loss"),
    "the objective is not finite": lambda: not_finite("objective_loss"),
    # With megatron.async_save; resumed at step 3, it saves at 4 and 6 while it trains.
    "SIGTERM while an asynchronous save is written": lambda: signalled(TERM, SUBMIT, after=True),
    "killed as an asynchronous save begins": lambda: killed(SUBMIT),
    "killed while an asynchronous save is written": lambda: killed_while_it_writes(),
    "killed before the manifest of an asynchronous save": lambda: killed(FILES + "write_manifest"),
    "no space left in an asynchronous save": lambda: writer_fails(errno.ENOSPC),
    "an input/output error in an asynchronous save": lambda: writer_fails(errno.EIO),
}
