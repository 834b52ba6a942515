"""``remit train`` as a user meets it: what it prints, what it leaves behind."""

from __future__ import annotations

import json

import pytest

from tests.integration.conftest import write

FIELDS = {
    *("iteration", "consumed_tokens", "lm_loss", "objective_loss", "grad_norm", "learning_rate", "tokens_per_second"),
    *("tflops", "mfu", "memory_gib", "step_seconds", "reference_seconds", "weight_mean", "weight_std"),
    "weight_clipped_low",
    *("weight_clipped_high", "delta_mean", "delta_std", "dropped_tokens"),
}


@pytest.fixture(scope="module")
def finished(material, config_for, remit, tmp_path_factory):
    """One remit run on two ranks, to its end."""
    run_dir = tmp_path_factory.mktemp("runs") / "remit"
    path = write(run_dir.parent / "remit.yaml", config_for(run_dir, tensor_model_parallel_size=2))
    result = remit("train", path, "--nproc", 2)
    assert result.returncode == 0, result.stderr[-4000:]
    return run_dir, result


def test_metrics_have_every_field(finished):
    run_dir, _ = finished
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert set(record) == FIELDS
        assert record["step_seconds"] > record["reference_seconds"] > 0
        assert record["consumed_tokens"] == record["iteration"] * 4 * 64
        assert record["weight_std"] > 0 and record["dropped_tokens"] == 0
        assert record["mfu"] is None, "there is no peak to compare a CPU with"
        assert record["memory_gib"] is None and record["tflops"] > 0


def test_validation_is_recorded(finished):
    run_dir, _ = finished
    records = [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records][:2] == [3, 6]
    assert all(0 < r["lm_loss"] < 10 for r in records)


def test_train_prints_little(finished):
    _, result = finished
    lines = result.stdout.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 6
    assert len(lines) <= 12, result.stdout
    assert result.stderr.strip() == "", "a run without problems has nothing to say there"
    for word in ("lm_loss", "objective", "lr", "grad", "tok/s", "left"):
        assert word in lines[0]


def test_run_directory_is_complete(finished):
    run_dir, _ = finished
    assert {p.name for p in run_dir.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "validation.jsonl",
        "checkpoints",
        "tensorboard",
        "logs",
    }
    assert any((run_dir / "tensorboard").iterdir())
    kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir())
    assert kept == ["iter_0000004", "iter_0000006"], "checkpoint.keep is 2"
    assert json.loads((run_dir / "checkpoints" / "latest").read_text()) == {"iteration": 6}
    manifest = json.loads((run_dir / "checkpoints" / "iter_0000006" / "manifest.json").read_text())
    assert "hf/config.json" in manifest["files"] and "hf/tokenizer.json" in manifest["files"]


def test_the_reference_is_not_in_the_checkpoint(finished):
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    run_dir, _ = finished
    metadata = FileSystemReader(run_dir / "checkpoints" / "iter_0000006").read_metadata().state_dict_metadata
    sizes = {name: entry.size.numel() for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    parameters = 51 * 48 + 4 * (48 * 96 + 48 * 48 + 3 * 48 * 80 + 96) + 48
    weights = {name: size for name, size in sizes.items() if name.startswith(("embedding", "decoder", "output"))}
    moments = {name: size for name, size in sizes.items() if "exp_avg" in name}
    # Tensor parallelism of 2 pads the vocabulary of 51 by one row.
    assert sum(weights.values()) == parameters + 48, sorted(weights)
    assert sum(moments.values()) == 2 * sum(weights.values()), sorted(moments)


def test_finished_run_starts_again_and_does_nothing(finished, remit):
    run_dir, _ = finished
    result = remit("train", run_dir.parent / "remit.yaml", "--nproc", 2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "nothing to do: step 6 of 6 is done" in result.stdout
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 6


def test_dry_run_prints_configuration_and_numbers(config_for, remit, tmp_path):
    path = write(tmp_path / "run.yaml", config_for(tmp_path / "run", tensor_model_parallel_size=2))
    result = remit("train", path, "objective.epsilon=0.3", "--nproc", 2, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "epsilon: 0.3" in result.stdout
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"
    for text in ("= 256 tokens", "steps", "parameters", "ranks", "warm-up"):
        assert text in result.stdout.lower()


def test_torchrun_starts_ranks_too(config_for, tmp_path):
    import os
    import subprocess
    import sys

    from tests.integration.conftest import REPOSITORY

    path = write(tmp_path / "run.yaml", config_for(tmp_path / "run", train_iters=2, pipeline_model_parallel_size=2))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "remit_megatron",
    ]
    result = subprocess.run(
        [*command, "train", str(path)], capture_output=True, text=True, timeout=240, cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_model_from_a_description_ends_documents_as_its_tokenizer_does(config_for, remit, tmp_path):
    config = config_for(tmp_path / "run", objective={"name": "ntp"}, train_iters=1)
    config["model"] = {"base": "tiny_llama", "vocab_size": 51, "num_hidden_layers": 1}
    config["init"] = None
    config["reference"] = None
    assert remit("train", write(tmp_path / "run.yaml", config)).returncode == 0
    saved = json.loads((tmp_path / "run" / "checkpoints" / "iter_0000001" / "hf" / "config.json").read_text())
    assert (saved["eos_token_id"], saved["bos_token_id"]) == (0, None)
    assert remit("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf").returncode == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 0
