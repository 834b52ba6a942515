"""Mistakes that people make: one clear line, exit code 2, nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from remit_megatron.cli import main
from tests.integration.conftest import write
from tests.tiny import make_llama


@pytest.fixture
def fails(config_for, tmp_path, capsys):
    """Runs a command in this process and returns its one line."""

    def run(*words: object) -> str:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert code == 2, captured
        errors = [line for line in lines if line.startswith("error: ")]
        progress = [line for line in lines if line.startswith(("tokenizing: ", "import: "))]
        assert len(errors) == 1 and len(lines) == 1 + len(progress), captured.err
        assert "Traceback" not in captured.err
        return errors[0]

    return run


@pytest.fixture
def run_file(config_for, tmp_path) -> Path:
    return write(tmp_path / "run.yaml", config_for(tmp_path / "run"))


def assert_words(line: str, *words: str) -> None:
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"


def test_unknown_key(fails, run_file):
    assert_words(fails("train", run_file, "objective.epsilonn=0.3"), "objective.epsilonn", "epsilon")
    assert_words(fails("train", run_file, "megatron.micro_batch=4"), "megatron.micro_batch", "micro_batch_size")


def test_missing_checkpoint(fails, run_file, tmp_path):
    assert_words(fails("train", run_file, f"init={tmp_path / 'nowhere'}"), "init", "nowhere")
    assert_words(
        fails("train", run_file, f"reference.checkpoint={tmp_path / 'nowhere'}"), "reference.checkpoint", "nowhere"
    )


def test_vocabulary_mismatch_of_the_reference(fails, run_file, material, tmp_path, capsys):
    other = make_llama(tmp_path / "other", seed=9, tokenizer=material["tokenizer"], vocab_size=60)
    capsys.readouterr()
    assert_words(
        fails("train", run_file, f"reference.checkpoint={other}"), "reference.checkpoint", "vocab_size", "60", "51"
    )


def test_tokenizer_mismatch_of_the_reference(fails, run_file, material, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(material["reference"], other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert_words(fails("train", run_file, f"reference.checkpoint={other}"), "reference.checkpoint", "tokenizer digest")


def test_sequence_longer_than_the_model(fails, run_file):
    assert_words(fails("train", run_file, "megatron.seq_length=512"), "seq_length", "512", "256")


def test_batch_not_divisible(fails, run_file):
    assert_words(fails("train", run_file, "megatron.global_batch_size=5"), "global_batch_size", "5", "micro_batch_size")


def test_tensor_parallel_size_that_does_not_divide_the_heads(remit, run_file):
    result = remit("train", run_file, "megatron.tensor_model_parallel_size=3", "--nproc", 3)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, "three ranks find it, one says it"
    assert_words(result.stderr, "error: ", "tensor_model_parallel_size", "3", "heads")


def test_data_that_is_not_there(fails, run_file, tmp_path, remit):
    result = remit("train", run_file, f"data.train=[[1.0, {tmp_path / 'nothing'}]]")
    assert result.returncode == 2 and "nothing" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_corrupt_jsonl(fails, material, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "broken\n{"text": "fine"}\n')
    line = fails("data", "build", "--input", path, "--tokenizer", material["tokenizer"], "--output", tmp_path / "out")
    assert_words(line, "bad.jsonl", "2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl"], "nothing half-made is left"


def test_half_a_checkpoint(fails, run_file, material, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    assert main(["import", "--hf", str(material["student"]), "--output", str(checkpoint)]) == 0
    capsys.readouterr()
    manifest = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").unlink()
    assert_words(fails("train", run_file, f"init={checkpoint}"), "init", "manifest.json")
    (checkpoint / "manifest.json").write_text(manifest)
    victim = max(checkpoint.glob("*.distcp"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    assert_words(fails("train", run_file, f"init={checkpoint}"), "init", victim.name, "bytes")


def test_truncated_safetensors(fails, run_file, material, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(material["student"], other)
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    assert_words(fails("train", run_file, f"init={other}"), "model.safetensors", "310256 bytes")


def test_two_runs_in_one_directory(config_for, remit, tmp_path):
    run_dir = tmp_path / "run"
    path = write(tmp_path / "run.yaml", config_for(run_dir))
    run_dir.mkdir()
    # Another process that holds the directory, as a run does.
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from remit_megatron.run.directory import RunLock;"
            f"lock = RunLock(Path({str(run_dir)!r})); print('held', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
        result = remit("train", path)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1
        assert_words(result.stderr, "run_dir", "in use", str(holder.pid))
        assert {p.name for p in run_dir.iterdir()} == {".lock", ".lock.1"}, "what the holder has put there"
    finally:
        assert holder.stdin is not None
        holder.stdin.close()
        holder.wait(10)
    assert remit("train", path, "megatron.train_iters=1").returncode == 0, "the lock went with its process"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs privileges: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_no_space_for_a_checkpoint(config_for, remit, small_disk, tmp_path):
    path = write(tmp_path / "run.yaml", config_for(small_disk / "run"))
    (small_disk / "filler").write_bytes(b"x" * 1_000_000)
    result = remit("train", path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert_words(result.stderr, "run_dir", "free", "one checkpoint")


def test_no_space_later_keeps_what_was_saved(config_for, remit, small_disk, tmp_path):
    run_dir = small_disk / "run"
    path = write(
        tmp_path / "run.yaml", config_for(run_dir, train_iters=20, save_interval=2) | {"checkpoint": {"keep": None}}
    )
    result = remit("train", path, "logging.tensorboard=false")
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert_words(result.stderr, "free")
    assert "Traceback" not in result.stderr
    saved = json.loads((run_dir / "checkpoints" / "latest").read_text())["iteration"]
    assert saved >= 2
    assert (run_dir / "checkpoints" / f"iter_{saved:07d}" / "manifest.json").exists()


def test_no_space_for_token_files(fails, material, small_disk, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": "abcdefgh " * 5000}) + "\n" for _ in range(60)))
    line = fails("data", "build", "--input", path, "--tokenizer", material["tokenizer"], "--output", small_disk / "out")
    assert_words(line, "space")
    assert list(small_disk.iterdir()) == []
