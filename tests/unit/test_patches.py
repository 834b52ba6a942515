"""The deviations from upstream: guarded, idempotent, and each needed."""

from __future__ import annotations

import multiprocessing
import subprocess

import pytest
import torch

import patches

patches.apply()


def test_all_are_registered_and_documented():
    for patch in patches.registered():
        module = __import__(f"patches.{patch.name}", fromlist=["PATCH"])
        for heading in ("Target", "Why", "Test", "Upstream", "Drop when"):
            assert heading in module.__doc__, f"{patch.name} does not say {heading}"
        assert patch.test in module.__doc__


def test_a_second_time_changes_nothing():
    from megatron.training import training

    before = (training.save_checkpoint, training.training_log, training.evaluate, torch.empty, torch.Tensor.to)
    patches.apply()
    assert before == (training.save_checkpoint, training.training_log, training.evaluate, torch.empty, torch.Tensor.to)


def test_an_untested_version_is_refused():
    patch = patches.Patch(
        name="x", target="x", package="megatron-core", versions=("0.1.0",), why="", test="", upstream="", drop_when="",
        install=lambda: pytest.fail("must not be installed"),
    )  # fmt: skip
    with pytest.raises(patches.UnsupportedVersion, match=r"found megatron-core 0\.19\.2; expected 0\.1\.0"):
        patch.apply()
    assert not patch.in_force()


def test_compile_helpers_does_not_call_make(monkeypatch):
    from megatron.core.datasets import utils

    def run(*args, **kwargs):
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "run", run)
    utils.compile_helpers()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU device is for machines without a GPU")
class TestCpuDevice:
    def test_cuda_means_the_cpu(self):
        index = torch.cuda.current_device()
        for device in ("cuda", "cuda:0", index, torch.device("cuda")):
            assert torch.zeros(2, device=device).device.type == "cpu"
            assert torch.tensor([1.0], device=device).device.type == "cpu"
            assert torch.ones(2).to(device).device.type == "cpu"
            assert torch.nn.Linear(2, 2).to(device).weight.device.type == "cpu"
        assert torch.ones(2).cuda().device.type == "cpu"
        assert torch.empty_like(torch.ones(2), device="cuda").device.type == "cpu"
        assert torch.ones(2).new_zeros(3, device="cuda").device.type == "cpu"

    def test_other_devices_are_left_alone(self):
        assert torch.zeros(2, device="meta").device.type == "meta"
        with torch.device("meta"):
            assert torch.empty(2).device.type == "meta"
        assert torch.ones(2).to(torch.float64).dtype == torch.float64
        assert torch.zeros(3, dtype=torch.int64).to("cpu").dtype == torch.int64

    def test_only_megatron_believes_in_a_gpu(self):
        assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
        ask = compile("available, count = torch.cuda.is_available(), torch.cuda.device_count()", "ask", "exec")
        answers = {"torch": torch, "__name__": "megatron.training.initialize"}
        exec(ask, answers)
        assert answers["available"] is True and answers["count"] == 1

    def test_tensor_type_for_megatrons_optimizers(self):
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.float64).dtype == torch.float64

    def test_random_states_fork_on_the_cpu(self):
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        tracker = CudaRNGStatesTracker()
        tracker.add("one", 7)
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        with tracker.fork("one"):
            inside = torch.rand(4)
        assert torch.equal(torch.rand(4), expected), "the state outside is untouched"
        with tracker.fork("one"):
            assert not torch.equal(torch.rand(4), inside), "the forked state goes on"
        torch.manual_seed(7)
        assert torch.equal(torch.rand(4), inside)

    def test_events_measure_time(self):
        first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        sum(range(100_000))
        second.record()
        assert 0 < first.elapsed_time(second) < 10_000


def test_a_synchronous_save_starts_no_process(tmp_path):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from remit_megatron.conversion.processes import process_groups

    before = multiprocessing.active_children()
    with process_groups(alone=True):
        values = torch.arange(12.0).view(3, 4)
        part = {"weight": ShardedTensor.from_rank_offsets("weight", values)}
        dist_checkpointing.save(part, str(tmp_path))
        assert multiprocessing.active_children() == before
        assert filesystem_async._results_queue is None, "asynchronous saves have the queue that they need"
        target = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(3, 4))}
        assert torch.equal(dist_checkpointing.load(target, str(tmp_path))["weight"], values)
