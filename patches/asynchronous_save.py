"""An asynchronous save is written by a thread of the rank, from a copy of its own.

Target    megatron-core 0.19.2, megatron.core.dist_checkpointing.strategies.async_utils.TemporalAsyncCaller and
          filesystem_async.get_write_results_queue
Why       Megatron writes in a second process of each rank. Where the rank is killed that process stays, with what it
          was forked with: a GPU context, the lock of the run's directory. And it is given tensors in host memory as
          they are: what is written of an offloaded optimizer, or of everything on a CPU, may be of a later step.
Test      tests/distributed/training/test_asynchronous_save.py::test_what_is_written_is_of_its_own_step
Upstream  not reported
Drop when Megatron copies host memory before a save returns, and its writer ends with its rank

torch writes storages, and hashlib takes digests, without the interpreter's lock. Each file's digest is taken when it is
written, while it is still in memory; ``take_digests`` hands them over. Saves of one rank are written one after the
other.
"""

from __future__ import annotations

import atexit
import hashlib
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from patches import Patch

_digests: dict[Path, str] = {}
_results: queue.Queue = queue.Queue()  # of saves that are done: what Megatron makes the index of, or why there is none
_begun: list[threading.Event] = []  # of saves that may still be written
_SETTLE_SECONDS = 60.0


def take_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of the files under ``directory`` that this rank has written, by name; asked for once."""
    found = [path for path in _digests if path.parent == directory]
    return {path.name: _digests.pop(path) for path in found}


def forget() -> None:
    """Saves that nobody will finalize any more are no saves; for processes that are used for several runs."""
    from megatron.training import async_utils

    global _results
    async_utils._async_calls_queue = None
    _digests.clear()
    _begun.clear()
    _results = queue.Queue()


def _write(buckets: list, write_bucket: Callable[..., Any], results: queue.Queue) -> None:
    """Writes the files of one save; puts what was written, or the first error."""
    written: dict[int, Any] | Exception = {}
    try:
        for number, bucket in enumerate(buckets):
            _, answer = write_bucket(
                local_proc_idx=number, write_bucket=bucket, results_queue=None, count_queue=None, use_fsync=True
            )
            if isinstance(answer, Exception):
                raise answer
            written[number] = answer
            path = Path(bucket[0])
            with open(path, "rb") as file:
                _digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
    except Exception as error:
        written = error
    results.put(written)


def _submit(work: Callable[[], None]) -> threading.Event:
    """Has it done after what was submitted before; the event is set when it is.

    A thread for each save: data workers are forked from this process, and inherit no thread that waits for work.
    """
    before, done = (_begun[-1] if _begun else None), threading.Event()

    def run() -> None:
        if before is not None:
            before.wait()
        work()
        done.set()

    _begun[:] = [event for event in _begun if not event.is_set()] + [done]
    threading.Thread(target=run, daemon=True, name="asynchronous save").start()
    return done


def _settle() -> None:
    """Lets the writer end before the interpreter does: a thread that comes back from torch into an interpreter that is
    going away ends the process with another exit code than its own."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    for done in _begun:
        done.wait(max(0.0, deadline - time.monotonic()))


def _copied(buckets: list, staged: list) -> list:
    """What was staged in host memory, with copies of what had been there before."""
    before = {
        tensor.data_ptr() for _, _, (_, tensors) in buckets for _, tensor in tensors if tensor.device.type == "cpu"
    }
    return [
        (path, key, (data, [(item, t.clone() if t.data_ptr() in before else t) for item, t in tensors]))
        for path, key, (data, tensors) in staged
    ]


def _install() -> None:
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    class ThreadCaller(async_utils.AsyncCaller):
        """One save, as Megatron's queue of saves sees it."""

        def __init__(self) -> None:
            self._done: threading.Event | None = None

        def schedule_async_call(self, async_req: Any) -> None:
            """Copies what is to be written, and returns."""
            if async_req.async_fn is None:
                return  # nothing to write on this rank
            _rank, buckets, results = async_req.async_fn_args
            staged = buckets if async_req.preload_fn is None else async_req.preload_fn()
            # What Megatron would call has a process of its own to wait in; it calls this one for each file.
            transforms, _multistorage = async_req.async_fn.args
            write_bucket = partial(filesystem_async.FileSystemWriterAsync.write_preloaded_data, transforms)
            self._done = _submit(partial(_write, _copied(buckets, staged), write_bucket, results))

        def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
            """Whether all ranks have written; waits for it where ``blocking``. Collective, unless ``no_dist``."""
            if blocking and self._done is not None:
                self._done.wait()
            writing = self._done is not None and not self._done.is_set()
            return not writing if no_dist else self.sync_all_async_calls(int(writing))

        def close(self, abort: bool = False) -> None:
            """Nothing to close: a thread ends with its save."""

        def __del__(self) -> None:
            pass

    def get_write_results_queue(mp_mode: str = "spawn") -> queue.Queue:
        # save_without_a_server has a queue of its own for a synchronous save.
        return filesystem_async._results_queue or _results  # type: ignore[return-value]

    atexit.register(_settle)
    async_utils.TemporalAsyncCaller = ThreadCaller
    filesystem_async.get_write_results_queue = get_write_results_queue


PATCH = Patch(
    name="asynchronous_save",
    target="megatron.core.dist_checkpointing.strategies: async_utils.TemporalAsyncCaller, "
    "filesystem_async.get_write_results_queue",
    package="megatron-core",
    versions=("0.19.2",),
    why="Megatron's writer outlives a killed rank with its locks, and writes host memory while later steps change it",
    test="tests/distributed/training/test_asynchronous_save.py::test_what_is_written_is_of_its_own_step",
    upstream="not reported",
    drop_when="Megatron copies host memory before a save returns, and its writer ends with its rank",
    install=_install,
)
