"""scripts/bench_kernels.py: a tiny run from end to end, and what it does with an arm that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def scripts(monkeypatch):
    """The scripts' folder on the path, as when one of them runs."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    yield
    if torch.distributed.is_initialized():  # Megatron's arms need a group; other tests make their own
        torch.distributed.destroy_process_group()


def bench(folder: Path, *arguments: str) -> str:
    """Runs the script without a GPU; returns what it prints."""
    command = [sys.executable, "scripts/bench_kernels.py", *arguments, "--record", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_tiny_run_leaves_a_record(tmp_path):
    shape = ("--vocabulary", "300", "--hidden", "16", "--tokens", "12", "--hidden-tokens", "6", "--rounds", "3")
    printed = bench(tmp_path, *shape)
    (path,) = tmp_path.glob("kernels-*-cpu.json")
    raw = json.loads(path.read_text())
    page = (tmp_path / "kernels.md").read_text()
    assert page == "# Kernels\n\n" + printed
    assert raw["arguments"]["tokens"] == "12" and raw["arguments"]["vocabulary"] == "300"
    results = raw["results"]
    assert {r["section"] for r in results} == {"loss", "logprob", "hidden", "linear", "divergence", "norms"}
    assert {r["dtype"] for r in results} == {"float32", "bfloat16"}

    timed = [r for r in results if r["status"] == "ok"]
    for result in timed:
        assert len(result["seconds"]) == 3 and min(result["seconds"]) > 0
        assert result["p20_seconds"] <= result["median_seconds"] <= result["p80_seconds"]
        assert result["over_ours"] > 0 and result["over_base"] > 0
        assert isinstance(result["peak_extra_bytes"], int) and result["peak_extra_bytes"] > 0
        assert 0 <= result["loss_error"] < 0.05 and 0 <= result["gradient_error"] < 0.05
        if result["section"] in ("loss", "logprob"):
            size = 4 if result["dtype"] == "float32" else 2
            assert result["bytes_per_logit"] == pytest.approx(2 * size * result["over_base"])
            least = size * (3 if result["section"] == "loss" else 1)
            assert result["copy_fraction"] == pytest.approx(least / result["bytes_per_logit"])
        if result["arm"] == "ours":
            assert result["over_ours"] == 1
    arms = {(r["section"], r["arm"]) for r in timed}
    assert {("loss", name) for name in ("ours", "Megatron native", "Megatron fused", "plain torch")} <= arms
    assert {("linear", name) for name in ("ours", "logits, then ours", "logits, then Megatron native")} <= arms
    assert {("logprob", "ours"), ("hidden", "ours"), ("hidden", "logits, then ours"), ("norms", "ours")} <= arms
    assert {("divergence", "ours"), ("divergence", "plain torch")} <= arms

    yardsticks = [r for r in results if r["status"] == "yardstick"]
    assert len(yardsticks) == 12  # two of each section
    assert all(r["copy_bytes_per_second"] > 0 for r in yardsticks if r["section"] in ("loss", "logprob"))
    missing = {r["arm"]: r["note"] for r in results if r["status"] == "not run"}
    assert (
        missing["ours, blocks of 4096"]
        == missing["ours, Triton"]
        == missing["Liger"]
        == missing["Transformer Engine"]
        == "needs a GPU"
    )
    assert missing["Liger vocabulary-parallel"] == missing["Liger fused linear"] == "needs a GPU"
    assert "--compile" in missing["torch.compile"]
    assert "| Liger | needs a GPU |" in page
    assert len(timed) + len(yardsticks) + sum(r["status"] == "not run" for r in results) == len(results)


class FirstWeight(torch.autograd.Function):
    """A loss with a known fault: it scales every row by one token's incoming gradient."""

    @staticmethod
    def forward(ctx, logits, labels):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        ctx.save_for_backward(gradient)
        return losses.detach()

    @staticmethod
    def backward(ctx, *grad_outputs):
        return ctx.saved_tensors[0] * grad_outputs[0][1], None


def test_an_arm_that_scales_every_row_alike_is_wrong_and_not_timed(scripts):
    import bench_kernels
    import kernel_arms
    import kernel_problems

    problem = kernel_problems.LogitsProblem(9, 40, torch.float32, torch.device("cpu"), gradient=True)
    arms = {
        kernel_arms.OURS: kernel_arms._ours("auto"),
        "scales alike": lambda logits, labels: FirstWeight.apply(logits, labels),
        "wrong loss": lambda logits, labels: kernel_arms._plain(logits, labels) * 1.01,
        "absent": kernel_arms.Missing("not here"),
    }
    section = bench_kernels.Section(problem, arms, ("copy", problem.copy))
    results = section.measure(2, "test", bench_kernels.BOUNDS["loss"])
    assert [r["status"] for r in results] == ["ok", "wrong", "wrong", "not run", "yardstick"]
    assert "seconds" not in results[1] and results[1]["gradient_error"] > 0.1 and results[1]["loss_error"] < 1e-5
    assert results[2]["loss_error"] > 1e-3
    assert "wrong under uneven weights" in "\n".join(
        bench_kernels.table([r | {"section": "loss", "bytes_per_logit": 1.0} for r in results])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_problem_finds_a_wrong_gradient_of_the_weight(scripts, dtype):
    import bench_kernels
    import kernel_arms
    import kernel_problems

    device = torch.device("cpu")
    problem = kernel_problems.LinearProblem(8, 2, 90, 12, dtype, device, gradient=True)
    for name, arm in kernel_arms.linear_arms(device).items():
        if not isinstance(arm, kernel_arms.Missing):
            loss_bound, gradient_bound = bench_kernels.BOUNDS["linear"]
            loss_error, gradient_error = problem.errors(arm)
            assert loss_error < loss_bound and gradient_error < gradient_bound, name

    def alike(hidden, weight, labels, weights):
        losses = torch.nn.functional.cross_entropy((hidden @ weight.t()).flatten(0, 1).float(), labels.view(-1))
        return losses * weights.sum(), -torch.log_softmax((hidden @ weight.t()).float(), -1).gather(
            -1, labels.unsqueeze(-1)
        ).squeeze(-1)

    assert problem.errors(alike)[1] > bench_kernels.BOUNDS["linear"][1]


def test_peak_memory_is_that_of_what_lives_at_once(scripts):
    from bench_kernels import peak_extra_bytes

    def work():
        a = torch.empty(1 << 18)
        b = a.exp()  # two at once
        del a
        return b.mul(2).sum()  # two at once, and a scalar

    assert 2 << 20 <= peak_extra_bytes(work) < (2 << 20) + 4096
    inplace = torch.zeros(1 << 18)
    assert peak_extra_bytes(lambda: inplace.add_(1)) < 4096


def test_arms_take_turns_and_the_first_round_warms_up(scripts):
    from benchmarking import interleave, median_ratio, quantile

    calls = []

    def run(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    seconds = interleave(["a", "b", "c"], 2, run, label="test")
    assert calls == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert seconds == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 4.0]) == 2.0
    assert [quantile([3.0, 1.0, 2.0, 5.0, 4.0], share) for share in (0.2, 0.5, 0.8)] == [2.0, 3.0, 4.0]


def test_a_second_record_of_a_day_keeps_the_first(scripts, tmp_path):
    from benchmarking import record

    paths = [record(tmp_path, "x", title="X", text=f"## {n}\n", raw={"n": n}) for n in (1, 2, 3)]
    assert [json.loads(path.read_text())["n"] for path in paths] == [1, 2, 3]
    assert (tmp_path / "x.md").read_text() == "# X\n\n## 1\n\n## 2\n\n## 3\n"
