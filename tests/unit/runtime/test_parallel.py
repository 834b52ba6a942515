"""Who am I: torchrun, srun, a batch script, alone."""

from __future__ import annotations

import pytest

from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.launch import free_port, under_launcher
from remit_megatron.runtime.parallel import RankEnvironment, rank_environment

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


def test_ports_are_free():
    assert 1024 <= free_port() <= 65535
