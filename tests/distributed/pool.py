"""A warm pool of rank processes: importing Megatron takes longer than most tests, so it is done once per process.

    def work(rank_argument): ...                      # a function of a test module
    results = pool.run(work, world_size=2, rank_argument=3)       # one result per rank

Each call joins a new Gloo process group and leaves no global state behind.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

MAX_RANKS = 4
_TIMEOUT_SECONDS = 300.0
# That a rank has opened since the last collection: a run's groups leave 10 to 20, and many systems allow 1,024.
_MANY_FILES = 200


class RankFailure(AssertionError):
    """A rank raised; the text holds its traceback."""


class RankPool:
    """Processes that run functions as ranks of a job. Started at the first use."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *, world_size: int, **kwargs: Any) -> list[Any]:
        """Runs ``function(**kwargs)`` as ``world_size`` ranks; returns their results in rank order.

        ``function`` must be importable by name. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set.

        Raises:
            RankFailure: a rank raised or did not answer within the time limit.
        """
        from remit_megatron.runtime.launch import free_port

        while len(self._workers) < world_size:
            self._workers.append(self._start(len(self._workers)))
        port = free_port()
        for rank, (_, pipe) in enumerate(self._workers[:world_size]):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            pipe.send((function, kwargs, {name: str(value) for name, value in environment.items()}))
        answers: dict[int, Any] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world_size])}
        while pipes:
            ready = wait(list(pipes), timeout=_TIMEOUT_SECONDS)
            if not ready:
                self.close()
                raise RankFailure(f"ranks {sorted(pipes.values())} did not answer within {_TIMEOUT_SECONDS:.0f} s")
            for pipe in ready:
                rank = pipes.pop(pipe)  # type: ignore[index]
                try:
                    ok, answer = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.close()
                    raise RankFailure(f"rank {rank} died") from None
                if not ok:
                    self.close()  # the others may be waiting for this one
                    raise RankFailure(f"rank {rank}:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(world_size)]

    def _start(self, index: int) -> tuple[Any, Connection]:
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, index), daemon=False)
        process.start()
        theirs.close()
        return process, ours

    def close(self) -> None:
        """Ends the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []


def _work(pipe: Connection, index: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    # A spawned process would spawn its own children; data loader workers are forked, as in a process of its own.
    mp.set_start_method("fork", force=True)
    # Every process writes its temporary files into a place of its own.
    tempfile.tempdir = tempfile.mkdtemp(prefix=f"rank{index}_")
    _share_a_device()
    files = _open_files()  # after the last collection
    while True:
        try:
            function, kwargs, environment = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        os.environ.update(environment)
        try:
            answer = (True, function(**kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            _clean_up()
            if _open_files() > files + _MANY_FILES:
                _collect()
                files = _open_files()
        try:
            pipe.send(answer)
        except OSError:
            return


def _share_a_device() -> None:
    """Gives all Gloo groups of this process one device.

    Each group has one of its own otherwise, whose thread wakes up a hundred times a second: 20 groups of each rank of
    each run, those that a test has left behind among them, until two cores do nothing else.
    """
    from torch.distributed import ProcessGroupGloo

    create, device = ProcessGroupGloo.__init__, ProcessGroupGloo.create_default_device()

    def create_with_it(self: Any, store: Any, rank: int, size: int, *, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [device], 2, timeout
        create(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = create_with_it


def _clean_up() -> None:
    """Takes down what Megatron and torch.distributed keep in globals."""
    import sys

    import torch.distributed as dist

    if "megatron.training" in sys.modules:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random as megatron_random
        from megatron.training import training

        from patches import (
            asynchronous_save,
            checkpoint_commit,
            evaluation_log,
            optimizer_overrides,
            pipeline_wait,
            schedule,
            train_step,
            training_log,
        )

        training.destroy_global_state()
        for name in training._STARTUP_TIMESTAMPS:
            training._STARTUP_TIMESTAMPS[name] = None
        parallel_state.destroy_model_parallel()
        megatron_random._CUDA_RNG_STATE_TRACKER = None
        megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
        schedule.wrapper = train_step.hook = training_log.hook = evaluation_log.hook = pipeline_wait.hook = None
        checkpoint_commit.before = checkpoint_commit.after = optimizer_overrides.hook = None
        checkpoint_commit._pending.clear()
        asynchronous_save.forget()
    if dist.is_initialized():
        dist.destroy_process_group()


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _collect() -> None:
    """Frees models and groups that only refer to each other. It takes half a second, so not after each job."""
    import gc

    from megatron.core.distributed import DistributedDataParallel

    for model in [one for one in gc.get_objects() if isinstance(one, DistributedDataParallel)]:
        model.grad_accs.clear()  # hold the model by hooks that the collector does not see
    gc.collect()
