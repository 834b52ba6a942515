"""Who am I: torchrun, srun, a batch script, alone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest
import torch

from remit_megatron import cli
from remit_megatron.runtime import launch
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.launch import free_port, under_launcher
from remit_megatron.runtime.parallel import RankEnvironment, finish, gpu_index, initialize, rank_environment

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*VARIABLES, "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_all(monkeypatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_alone():
    assert rank_environment() == RankEnvironment(0, 1, 0)
    assert not under_launcher()


def test_torchrun(monkeypatch):
    set_all(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, MASTER_ADDR="node1", MASTER_PORT=1234)
    assert rank_environment() == RankEnvironment(5, 8, 1)
    assert under_launcher()


def test_srun(monkeypatch):
    set_all(monkeypatch, SLURM_PROCID=9, SLURM_NTASKS=16, SLURM_STEP_NUM_TASKS=16, SLURM_LOCALID=1, MASTER_ADDR="node1")
    assert under_launcher()
    assert rank_environment() == RankEnvironment(9, 16, 1)


def test_a_batch_script_is_not_srun(monkeypatch):
    set_all(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=16)
    assert not under_launcher()
    assert rank_environment() == RankEnvironment(0, 1, 0)


def test_srun_without_an_address(monkeypatch):
    set_all(monkeypatch, SLURM_PROCID=9, SLURM_STEP_NUM_TASKS=16, SLURM_LOCALID=1)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        rank_environment()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "x"}, "RANK in the environment: found 'x'; expected a whole number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK in the environment: found ''; expected a whole number"),
        ({"RANK": "1", "WORLD_SIZE": "two"}, "WORLD_SIZE in the environment: found 'two'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK in the environment: found '-1'"),
        ({"RANK": "3"}, "RANK in the environment: found 3; expected less than WORLD_SIZE, 1; unset"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK in the environment: found 2; expected less than"),
    ],
)
def test_variables_of_no_launcher(monkeypatch, capsys, variables, says):
    set_all(monkeypatch, **variables)
    with pytest.raises(UserError, match=re.escape(says)):
        rank_environment()
    assert cli.main(["doctor", "--help"]) == 2  # of every command, before anything
    assert says in capsys.readouterr().err


def test_ports_are_free_and_not_given_to_connections(monkeypatch):
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10 and all(10_000 <= port < launch._ephemeral_start() for port in ports)
    with socket.socket() as taken:
        taken.bind(("", 0))
        busy = taken.getsockname()[1]
        monkeypatch.setattr(launch.random.SystemRandom, "sample", lambda self, population, k: [busy, min(ports)])
        assert free_port() == min(ports)
        monkeypatch.setattr(launch, "_ephemeral_start", lambda: 0)
        assert 1024 <= free_port() <= 65535


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (3, 1, 0)])
def test_which_gpu_is_a_ranks_own(local_rank, visible, index):
    """One visible GPU is the task's own, whatever its number on the host (srun --gpus-per-task=1)."""
    assert gpu_index(local_rank, visible) == index


def test_more_ranks_than_gpus():
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES: found 4 GPU\(s\) for rank 4 of this host"):
        gpu_index(4, 4)


def test_the_group_is_told_its_gpu(monkeypatch):
    """On a machine with one GPU for each task; what reaches torch is recorded."""
    reached: dict[str, object] = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: reached.update(index=index))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **kwargs: reached.update(kwargs))
    initialize(RankEnvironment(rank=11, world_size=16, local_rank=3))
    assert reached["index"] == 0 and reached["device_id"] == torch.device("cuda", 0) and reached["backend"] == "nccl"


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_communicators_of_gpus_are_ended_where_a_run_ends_in_order(monkeypatch, backend):
    ended = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(backend))
    finish()
    assert ended == (["nccl"] if backend == "nccl" else [])


def test_a_run_that_is_done_is_done_without_its_communicators(monkeypatch, caplog):
    def destroy() -> None:
        raise torch.distributed.DistBackendError("NCCL error:\nremote process has gone")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy)
    finish()
    assert "did not end: NCCL error: remote process has gone" in caplog.text


def test_float32_products_are_float32_where_nvidias_image_says_otherwise():
    code = (
        "import torch; before = torch.backends.cuda.matmul.allow_tf32;"
        "from remit_megatron.runtime.parallel import RankEnvironment, initialize;"
        "initialize(RankEnvironment()); print(before, torch.backends.cuda.matmul.allow_tf32)"
    )
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "MASTER_ADDR": "127.0.0.1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False"]


def test_the_driver_is_prepared_before_anything_asks_for_a_gpu():
    """What the first question for a GPU sees of the environment, in a process of the command line."""
    code = (
        "import os, torch\n"
        "seen, ask = [], torch.cuda.is_available\n"
        "def first():\n"
        "    seen.append(os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS'))\n"
        "    return ask()\n"
        "torch.cuda.is_available = first\n"
        "from remit_megatron.cli import main\n"
        "main(['train', 'configs/runs/quickstart_remit.yaml', 'run_dir=nowhere', '--dry-run'])\n"
        "print(seen[0])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == "1", found.stderr
