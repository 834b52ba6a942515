"""Ranks: who am I, how are processes started by torchrun, srun or ``--nproc``, and how they find each other."""

from __future__ import annotations

import contextlib
import logging
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from remit_megatron.runtime import stop
from remit_megatron.runtime.errors import StartAgain, UserError
from remit_megatron.runtime.float32 import exact_float32
from remit_megatron.runtime.launcher_variables import check_variables

logger = logging.getLogger(__name__)

_A_MOMENT = 2.0  # seconds in which a signal to all ranks has reached all


@dataclass(frozen=True)
class RankEnvironment:
    """One process among many: global rank, number of processes, rank on this host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def started_by_srun() -> bool:
    """Whether this process is one of several tasks of a Slurm step.

    A batch script also sees SLURM_PROCID and SLURM_NTASKS, but it is no step of several tasks: what it starts there
    with ``--nproc`` is not under srun.
    """
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ


def rank_environment() -> RankEnvironment:
    """Reads torchrun's variables, else Slurm's (one task per GPU under srun), and exports them in torchrun's form.

    Raises:
        UserError: a variable that is no number, or a rank that the job does not have; under srun without a rendezvous
            address (the batch script exports MASTER_ADDR).
    """
    environ = os.environ
    if "RANK" not in environ and started_by_srun():
        environ["RANK"] = environ["SLURM_PROCID"]
        environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
        environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    check_variables()
    rank, world_size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and "MASTER_ADDR" not in environ:
        raise UserError(
            "MASTER_ADDR",
            "nothing in the environment",
            "the first host of the job (scripts/slurm/train.sbatch exports it)",
        )
    environ.setdefault("MASTER_ADDR", "127.0.0.1")
    environ.setdefault("MASTER_PORT", "29500" if world_size > 1 else "0")
    return RankEnvironment(rank, world_size, int(environ.get("LOCAL_RANK", "0")))


def device() -> torch.device:
    """Where tensors live in this process: its GPU, or the CPU of a machine that has none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gpu_index(local_rank: int, visible: int) -> int:
    """Which of the GPUs that this process sees is its own.

    Args:
        local_rank: rank on this host.
        visible: GPUs that the process sees: those of the host, or one where the launcher gives each task its own
            (``srun --gpus-per-task=1``).

    Raises:
        UserError: there are several, and fewer than ranks.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            "CUDA_VISIBLE_DEVICES",
            f"{visible} GPU(s) for rank {local_rank} of this host",
            "one for each rank of the host, or one for each task of its own (srun --gpus-per-task=1)",
        )
    return local_rank


def initialize(environment: RankEnvironment, *, timeout_minutes: float = 10.0, own_stream: bool = False) -> None:
    """Joins the job: selects the GPU and creates the default process group (NCCL on GPUs, Gloo otherwise).

    Args:
        environment: this rank.
        timeout_minutes: how long a rank waits for the others.
        own_stream: leave the default stream, in which no CUDA graph can be captured.

    Raises:
        UserError: more ranks on this host than GPUs.
    """
    stop.write_stacks_when_asked()
    exact_float32()
    gpu = torch.cuda.is_available()
    kwargs = {}
    if gpu:
        index = gpu_index(environment.local_rank, torch.cuda.device_count())
        torch.cuda.set_device(index)
        # NCCL then knows its GPU from the start: communicators are made at once, and a barrier guesses nothing.
        kwargs["device_id"] = torch.device("cuda", index)
        if own_stream:
            torch.cuda.set_stream(torch.cuda.Stream())
    if dist.is_initialized():
        return
    if environment.world_size == 1:
        # Alone: no port to open, so that two runs on one machine never meet.
        kwargs["store"] = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(
        backend="nccl" if gpu else "gloo",
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timedelta(minutes=timeout_minutes),
        **kwargs,
    )


def finish() -> None:
    """Ends NCCL's communicators, where all ranks end in order: torch warns of each process that leaves them."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        try:
            dist.destroy_process_group()
        except RuntimeError as error:  # the work is done, and saved
            logger.warning("NCCL's communicators did not end: %s", " ".join(str(error).split())[:200])


def broadcast_object(value, *, source: int = 0):
    """``value`` of rank ``source``, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value) -> list:
    """The values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_numbers(value: float) -> list[float]:
    """The numbers of all ranks (float32), in rank order, on every rank; quick enough for every few steps."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found = torch.zeros(dist.get_world_size(), dtype=torch.float32, device=device())
    dist.all_gather_into_tensor(found, torch.tensor([value], dtype=torch.float32, device=device()))
    return found.tolist()


def on_any_rank(*flags: bool) -> list[bool]:
    """Each flag: whether it is set on any rank. Collective over all ranks; quick enough for every step."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.uint8, device=device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.bool().tolist()


def leave_set_up_together() -> None:
    """Before somebody takes the stop signals over: all ranks stop where one was asked to meanwhile, or none does.
    Collective; what comes after it is held for whoever takes over.

    A rank that is still set up when the others take over would leave them in their next collective.

    Raises:
        StartAgain: a rank was asked.
    """
    stop.hold()
    try:
        number = int(max(gather_numbers(float(stop.held()))))
    except RuntimeError:  # another rank was told a moment before, and has left
        number = stop.held(within=_A_MOMENT)
        if not number:
            raise
    if number:
        raise StartAgain(stop.stopped_line(number))


def replica_group(data_parallel_rank: int) -> dist.ProcessGroup | None:
    """The ranks that hold one replica of the model (those with the same data-parallel rank), over Gloo.

    For a few bytes on the host that must not wait for a GPU. All ranks of the job call it together.

    Returns:
        The group of this rank, or None where it is alone in it.
    """
    replicas = gather_objects(data_parallel_rank)
    own: dist.ProcessGroup | None = None
    for replica in sorted(set(replicas)):
        ranks = [rank for rank, found in enumerate(replicas) if found == replica]
        if len(ranks) > 1:
            group = dist.new_group(ranks, backend="gloo")
            if replica == data_parallel_rank:
                own = typing.cast("dist.ProcessGroup", group)
    return own


@contextlib.contextmanager
def same_fate(what: str) -> Iterator[None]:
    """Runs a block on every rank; if it fails on one, it fails on all, with the first failing rank's error.

    Without this the ranks where it went well would wait in the next collective until the time limit.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    # Errors cross the process boundary as text: not every exception can be pickled.
    described: tuple | dict | str | None = None
    if error is not None:
        described = (error.field, str(error.found), error.expected) if isinstance(error, UserError) else repr(error)
        if isinstance(error, StartAgain):
            described = {"start again": str(error)}
    everybody = gather_objects(described)
    if error is not None:
        raise error
    for rank, failure in enumerate(everybody):
        if isinstance(failure, tuple):
            raise UserError(*failure)
        if isinstance(failure, dict):
            raise StartAgain(failure["start again"])
        if failure is not None:
            raise RuntimeError(f"{what} failed on rank {rank}: {failure}")
