"""Runs that teach nothing end in one line with exit code 70; runs that are begun wrongly leave nothing behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.integration.conftest import write
from tests.tiny import CHARACTERS, make_llama

STEPS = 3
SHORT: dict[str, Any] = {"train_iters": STEPS, "save_interval": 2, "eval_interval": 100}


class Outcome(NamedTuple):
    """What a rank of a command gave."""

    code: int
    said: str
    error: str


def command(words: list[str]) -> Outcome:
    """One rank of a command in a warm process."""
    from remit_megatron.cli import main

    said, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
        code = main(words)
    return Outcome(code, said.getvalue(), error.getvalue())


@pytest.fixture
def run(pool) -> Callable[..., Outcome]:
    """Runs a command on ``nproc`` ranks; all must give the same code, and rank 0 alone may say why."""

    def on_ranks(*words: object, nproc: int = 1) -> Outcome:
        outcomes = pool.run(command, world_size=nproc, words=list(map(str, words)))
        assert len({outcome.code for outcome in outcomes}) == 1, outcomes
        if outcomes[0].code == 70:
            assert [outcome.error for outcome in outcomes[1:]] == [""] * (nproc - 1)
        return outcomes[0]

    return on_ranks


def one_line(outcome: Outcome, code: int) -> str:
    """The error of a command that ended with ``code``, which is one line."""
    assert outcome.code == code, outcome
    errors = [line for line in outcome.error.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in outcome.error, outcome.error
    return errors[0]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def spoil(directory: Path, name: str, row: int) -> Path:
    """Makes one number (of a vector) or one row (of a matrix) of a model's weights NaN."""
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(file).items()}
    weights[name][row] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def damaged(material, tmp_path_factory) -> Path:
    """A reference with one NaN, in its last norm: nothing that it says is finite."""
    directory = tmp_path_factory.mktemp("damaged") / "reference"
    shutil.copytree(material["reference"], directory)
    return spoil(directory, "model.norm.weight", 3)


@pytest.fixture(scope="session")
def partly_damaged(material, tmp_path_factory) -> dict[str, Path]:
    """A reference that fails on sequences with one letter, and a corpus in which some have it."""
    from remit_megatron.data.build import build_dataset

    root = tmp_path_factory.mktemp("partly")
    make_llama(root / "reference", seed=2, tokenizer=material["tokenizer"], tie_word_embeddings=False)
    spoil(root / "reference", "model.embed_tokens.weight", 2 + CHARACTERS.index("z"))
    texts = ["z" * 20 + "a" * 43 if number % 6 == 0 else "abc" * 21 for number in range(300)]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_dataset([str(root / "corpus.jsonl")], tokenizer=str(material["tokenizer"]), output=str(root / "corpus"))
    return {"reference": root / "reference", "corpus": root / "corpus"}


OBJECTIVES = [
    {"name": "remit"},
    {"name": "rho1"},
    {"name": "rho1", "scope": "global_batch"},
    {"name": "kd"},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["remit", "rho1", "rho1 global", "kd"])
def test_a_reference_that_is_not_finite(config_for, run, damaged, tmp_path, objective):
    config = config_for(tmp_path / "run", objective=objective, **SHORT) | {"reference": {"checkpoint": str(damaged)}}
    line = one_line(run("train", write(tmp_path / "run.yaml", config)), 70)
    assert line.startswith("error: step 1: found "), line
    assert ("objective_loss nan" if objective["name"] == "kd" else "none of 256 has a finite score") in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir()), "nothing of it is kept"
    assert [record["iteration"] for record in records(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"global_batch_size": 4},
        {"pipeline_model_parallel_size": 2, "placement": "replicated"},
    ],
    ids=["tp2", "pp2", "dp2", "pp2 replicated"],
)
def test_all_ranks_leave_together(config_for, run, damaged, tmp_path, layout):
    placement = layout.get("placement", "pipeline")
    megatron = {name: value for name, value in layout.items() if name != "placement"}
    config = config_for(tmp_path / "run", **SHORT, **megatron)
    config["reference"] = {"checkpoint": str(damaged), "placement": placement}
    line = one_line(run("train", write(tmp_path / "run.yaml", config), nproc=2), 70)
    assert "none of 256 has a finite score" in line


def test_scores_that_are_not_finite(config_for, run, damaged, tmp_path):
    config = config_for(tmp_path / "run", **SHORT)
    config["reference"] = {"checkpoint": str(damaged), "cache_dir": str(tmp_path / "cache")}
    path = write(tmp_path / "run.yaml", config)
    for _ in range(2):  # what is there already is not taken for granted
        outcome = run("score", path)
        assert "768 of 768 tokens (100.00%)" in one_line(outcome, 70)
        assert "12 of 12 have scores" not in outcome.said
    line = one_line(run("train", path, "reference.source=cache", "reference.on_missing=refuse"), 70)
    assert "none of 256 has a finite score" in line and "cache" in line


def test_some_scores_that_are_not_finite(config_for, run, partly_damaged, tmp_path):
    config = config_for(tmp_path / "run", **SHORT | {"train_iters": 6})
    config["reference"] = {"checkpoint": str(partly_damaged["reference"]), "cache_dir": str(tmp_path / "cache")}
    config["data"] |= {"train": str(partly_damaged["corpus"]), "document_mask": False}
    path = write(tmp_path / "run.yaml", config)
    line = one_line(run("train", path), 70)
    assert "of 256 tokens (" in line and "at most 1.00% (reference.max_dropped)" in line
    allowed = run("train", path, "reference.max_dropped=1", f"run_dir={tmp_path / 'allowed'}")
    assert allowed.code == 0, allowed
    dropped = [record["dropped_tokens"] for record in records(tmp_path / "allowed")]
    assert len(dropped) == 6 and any(dropped) and not all(dropped) and max(dropped) < 256
    first = next(step for step, count in enumerate(dropped) if count)
    assert f"step {first + 1}: {dropped[first]} of 256 tokens" in allowed.said
    assert allowed.said.count("have no finite score of the reference") == 1, "said once; metrics.jsonl has them all"
    one_line(run("score", path), 70)
    scored = run("score", path, "reference.max_dropped=1")
    total = sum(dropped)
    assert scored.code == 0 and f"{total} of 1,536 tokens" in scored.said, scored


def test_everything_is_masked(config_for, run, material, tmp_path):
    from remit_megatron.data.build import build_dataset

    documents = tmp_path / "empty.jsonl"
    documents.write_text('{"text": "<|endoftext|><|endoftext|><|endoftext|>"}\n' * 400)
    build_dataset([str(documents)], tokenizer=str(material["tokenizer"]), output=str(tmp_path / "empty"))
    config = config_for(tmp_path / "run", objective={"name": "ntp"}, **SHORT)
    config["data"] |= {"train": str(tmp_path / "empty"), "mask_eod_loss": True, "document_mask": False}
    line = one_line(run("train", write(tmp_path / "run.yaml", config)), 70)
    assert line.startswith("error: step 1: found no token that counts, all are masked"), line


def test_a_student_that_is_not_finite(config_for, run, material, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(material["student"], student)
    spoil(student, "model.norm.weight", 0)
    config = config_for(tmp_path / "run", objective={"name": "ntp"}, **SHORT) | {"init": str(student)}
    path = write(tmp_path / "run.yaml", config)
    assert "lm_loss nan, the student's own loss" in one_line(run("train", path), 70)
    line = one_line(run("train", path, "megatron.check_for_nan_in_loss_and_grad=true", "megatron.clip_grad=0"), 70)
    assert "Unexpected result" in line


def test_steps_that_are_skipped(config_for, run, tmp_path):
    """With fp16 and Megatron's first loss scale no gradient of three steps is finite."""
    run_dir = tmp_path / "run"
    path = write(tmp_path / "run.yaml", config_for(run_dir, fp16=True, **SHORT))
    outcome = run("train", path)
    assert "found no update in 3 steps" in one_line(outcome, 70)
    assert [(record["skipped"], record["grad_norm"]) for record in records(run_dir)] == [(True, None)] * STEPS
    scales = [record["loss_scale"] for record in records(run_dir)]
    assert scales[-1] < scales[0] <= 2**32
    assert outcome.said.count("skipped  loss scale") == STEPS
    again = run("train", path)
    assert "found no update in 3 steps" in one_line(again, 70) and "nothing to do" not in again.said
    smaller = run("train", path, "megatron.initial_loss_scale=1", f"run_dir={tmp_path / 'smaller'}")
    assert smaller.code == 0, smaller
    assert [(r["skipped"], r["loss_scale"]) for r in records(tmp_path / "smaller")] == [(False, 1.0)] * STEPS


@pytest.fixture(scope="module")
def begun(config_for, pool, material, tmp_path_factory) -> Path:
    """A run directory at step 2 of 3, and its configuration beside it; its init is there no more."""
    root = tmp_path_factory.mktemp("begun")
    shutil.copytree(material["student"], root / "student")
    config = config_for(root / "run", **SHORT) | {"init": str(root / "student")}
    path = write(root / "run.yaml", config)
    (outcome,) = pool.run(command, world_size=1, words=["train", str(path), "megatron.exit_interval=2"])
    assert outcome.code == 75, outcome
    shutil.rmtree(root / "student")
    return root


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("megatron.adam_beta1=0.8", "megatron.adam_beta1: found 0.8; expected 0.9"),
        ("megatron.adam_eps=1e-6", "megatron.adam_eps: found 1e-06; expected 1e-08"),
        ("megatron.bf16=true", "megatron.bf16: found true; expected false"),
        ("megatron.optimizer=sgd", "megatron.optimizer: found sgd; expected adam"),
        ("megatron.use_distributed_optimizer=true", "megatron.use_distributed_optimizer: found true; expected false"),
        ("megatron.decoupled_lr=1e-4", "megatron.decoupled_lr: found 0.0001; expected nothing"),
        ("optimizer.decay_norms=true", "optimizer.decay_norms: found true; expected nothing"),
        ("seed=7", "seed: found 7; expected 1234"),
        ("data.train=[[1.0,{corpus}]]", "data.train: found 1 of corpus"),
    ],
)
def test_what_a_run_may_not_change(begun, run, material, override, line):
    before = sorted(path.name for path in (begun / "run").iterdir())
    found = one_line(run("train", begun / "run.yaml", override.format(corpus=material["corpus"])), 2)
    assert found.startswith(f"error: {line}"), found
    assert "another run_dir with init" in found
    assert sorted(path.name for path in (begun / "run").iterdir()) == before


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("megatron.train_iters=5", "megatron.train_iters: found 5; expected 3"),
        ("optimizer.decay_norms=true", "optimizer.decay_norms: found true; expected nothing"),
        ("seed=7", "seed: found 7; expected 1234"),
        ("data.train=[[1.0,{corpus}]]", "data.train: found 1 of corpus"),
    ],
)
def test_a_dry_run_of_a_run_that_goes_on_says_so_too(begun, run, material, override, line):
    path, words = begun / "run.yaml", override.format(corpus=material["corpus"])
    assert one_line(run("train", path, words, "--dry-run", "--nproc", 1), 2).startswith(f"error: {line}")
    assert run("train", path, "--dry-run").code == 0


def test_a_run_goes_on_without_init_and_with_other_data(begun, run, material, tmp_path):
    shutil.copytree(begun / "run", tmp_path / "run")
    config = json.loads((begun / "run.yaml").read_text()) | {"init": None, "run_dir": str(tmp_path / "run")}
    config["data"] |= {"tokenizer": None, "train": str(material["corpus"])}
    path = write(tmp_path / "run.yaml", config)
    outcome = run("train", path, "checkpoint.new_data=true", "checkpoint.keep=1")
    assert outcome.code == 0, outcome
    assert "resuming at step 2" in outcome.said
    assert "going on at sample 8 of the new order" in outcome.said
    last = tmp_path / "run" / "checkpoints" / "iter_0000003"
    assert (last / "hf" / "tokenizer.json").read_bytes() == (material["tokenizer"] / "tokenizer.json").read_bytes()
    manifest = json.loads((last / "manifest.json").read_text())["properties"]
    assert manifest["updates"] == 3 and manifest["data"]["train"][0][1] == "corpus"


def rates(config: dict[str, Any], consumed: list[int]) -> list[float]:
    """Learning rates of Megatron's own schedule for steps that begin at these samples."""
    from remit_megatron.models.build import megatron_arguments
    from remit_megatron.run.configuration import load_config, load_model_description
    from remit_megatron.run.megatron_args import build_arguments
    from remit_megatron.run.optimization import scheduler

    path = Path(config["run_dir"]).parent / "rates.yaml"
    architecture = megatron_arguments(load_model_description(config["init"]))
    schedule = scheduler(build_arguments(load_config(write(path, config)), architecture, world_size=1, rank=0))
    found = []
    for samples in consumed:
        schedule.num_steps = samples
        found.append(schedule.get_lr(schedule.optimizer.param_groups[0]))
    return found


@pytest.mark.parametrize(("batch", "samples"), [(2, [0, 4, 8, 10, 12, 14]), (8, [0, 4, 8])])
def test_a_run_of_samples_goes_on_in_another_batch(config_for, run, tmp_path, batch, samples):
    """All of its samples, neither more nor fewer, with the learning rates of a schedule that counts samples."""
    config = config_for(tmp_path / "run", objective={"name": "ntp"}, save_interval=2)
    config["megatron"] |= {"train_samples": 16, "lr_warmup_samples": 6, "micro_batch_size": 1}
    del config["megatron"]["train_iters"]
    path = write(tmp_path / "run.yaml", config)
    assert run("train", path, "megatron.exit_interval=2").code == 75
    other = f"megatron.global_batch_size={batch}"
    outcome = run("train", path, other)
    assert outcome.code == 0, outcome
    line = "and was 4: the learning rate goes on at sample 8 of a schedule of 16"
    assert f"megatron.global_batch_size is {batch}, {line}" in outcome.said
    steps = records(tmp_path / "run")
    assert [step["consumed_tokens"] // 64 for step in steps] == [*samples[1:], 16]
    assert [step["learning_rate"] for step in steps] == pytest.approx(rates(config, samples), rel=1e-12)
    assert f"step {len(samples)} of {len(samples)} is done" in run("train", path, other).said
    assert f"{len(samples)} of {len(samples)} (100.0%)" in run("status", tmp_path / "run").said


def test_a_run_of_steps_goes_on_in_a_smaller_batch(config_for, run, tmp_path):
    path = write(tmp_path / "run.yaml", config_for(tmp_path / "run", objective={"name": "ntp"}, train_iters=4))
    assert run("train", path, "megatron.exit_interval=2").code == 75
    words = ("megatron.global_batch_size=2", "megatron.override_opt_param_scheduler=true")
    outcome = run("train", path, *words)
    assert outcome.code == 0, outcome
    assert [step["consumed_tokens"] // 64 for step in records(tmp_path / "run")] == [4, 8, 10, 12]


def decay_and_rate(words: list[str]) -> tuple[Outcome, list[tuple[float, float]]]:
    """A command, and the weight decay and learning rate that each of its updates had."""
    import patches

    patches.apply()
    from megatron.training import training

    found, original = [], training.get_megatron_optimizer

    def watched(*arguments: Any, **settings: Any) -> Any:
        optimizer = original(*arguments, **settings)
        update = optimizer.step

        def step() -> Any:
            (group,) = [group for group in optimizer.param_groups if group["wd_mult"]]
            found.append((group["weight_decay"], group["lr"]))
            return update()

        optimizer.step = step
        return optimizer

    training.get_megatron_optimizer = watched
    try:
        return command(words), found
    finally:
        training.get_megatron_optimizer = original


def test_the_schedule_of_the_checkpoint_is_the_whole_of_it(config_for, pool, tmp_path):
    """Its weight decay from the first step on, and what later checkpoints say is what was done."""
    config = config_for(tmp_path / "run", objective={"name": "ntp"}, save_interval=2)
    path = str(write(tmp_path / "run.yaml", config))

    def start(*words: str) -> tuple[Outcome, list[tuple[float, float]]]:
        ((outcome, found),) = pool.run(decay_and_rate, world_size=1, words=["train", path, *words])
        return outcome, found

    outcome, found = start("megatron.exit_interval=2")
    assert outcome.code == 75 and [decay for decay, _ in found] == [0.1, 0.1], outcome
    others = ("megatron.weight_decay=0.5", "megatron.lr_decay_style=linear", "megatron.exit_interval=4")
    outcome, found = start("megatron.use_checkpoint_opt_param_scheduler=true", *others)
    assert outcome.code == 75 and [decay for decay, _ in found] == [0.1, 0.1], outcome
    outcome, last = start()
    assert outcome.code == 0 and [decay for decay, _ in last] == [0.1, 0.1], outcome
    expected = rates(config, [8, 12, 16, 20])
    assert [rate for _, rate in (*found, *last)] == pytest.approx(expected, rel=1e-12)
    assert [step["learning_rate"] for step in records(tmp_path / "run")][2:] == pytest.approx(expected, rel=1e-12)


def test_a_run_goes_on_with_another_objective_and_says_so(begun, run, tmp_path):
    shutil.copytree(begun / "run", tmp_path / "run")
    where = f"run_dir={tmp_path / 'run'}"
    itself = run("train", begun / "run.yaml", where, f"reference.checkpoint={tmp_path / 'run'}")
    assert "the run itself; expected another model" in one_line(itself, 2)
    outcome = run("train", begun / "run.yaml", where, "objective.epsilon=0.1", "data.mask_eod_loss=true")
    assert outcome.code == 0, outcome
    changes = "objective.epsilon is 0.1, and was 0.2; data.mask_eod_loss is true, and was false\n"
    assert f"from step 3 on {changes}" in outcome.said


def test_other_weights_in_the_place_of_the_reference_are_said(config_for, run, material, tmp_path):
    from safetensors.torch import load_file, save_file

    reference = Path(shutil.copytree(material["reference"], tmp_path / "reference"))
    config = config_for(tmp_path / "run", **SHORT)
    config["reference"] |= {"checkpoint": str(reference)}
    path = write(tmp_path / "run.yaml", config)
    assert run("train", path, "megatron.exit_interval=1").code == 75
    outcome = run("train", path, "megatron.exit_interval=2")
    assert outcome.code == 75 and "reference.checkpoint" not in outcome.said
    tensors = {name: tensor + 0.01 for name, tensor in load_file(reference / "model.safetensors").items()}
    save_file(tensors, reference / "model.safetensors", metadata={"format": "pt"})
    outcome = run("train", path)
    assert outcome.code == 0
    assert f"from step 3 on reference.checkpoint holds other weights, in {reference}\n" in outcome.said


def test_a_refused_start_is_not_what_the_run_was_trained_with(begun, run, material, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(begun / "run", tmp_path / "run")
    shutil.copytree(material["reference"], tmp_path / "reference")
    weights = load_file(tmp_path / "reference" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "reference" / "model.safetensors", metadata={"format": "pt"})
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    words = (f"run_dir={tmp_path / 'run'}", f"reference.checkpoint={tmp_path / 'reference'}")
    assert "no tensor model.norm.weight" in one_line(run("train", begun / "run.yaml", *words), 2)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_checkpoint_that_says_nothing_of_its_optimizer_goes_on(begun, run, tmp_path):
    """As earlier versions wrote them."""
    shutil.copytree(begun / "run", tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "iter_0000002" / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in ("settings", "data", "updates"):
        del manifest["properties"][name]
    file.write_text(json.dumps(manifest))
    where = f"run_dir={tmp_path / 'run'}"
    line = one_line(run("train", begun / "run.yaml", where, "megatron.adam_beta2=0.9"), 2)
    assert line.startswith("error: megatron.adam_beta2: found 0.9; expected 0.95")
    assert run("train", begun / "run.yaml", where).code == 0


def test_without_a_whole_checkpoint_init_is_needed(begun, run, tmp_path):
    shutil.copytree(begun / "run", tmp_path / "run")
    victim = next((tmp_path / "run" / "checkpoints" / "iter_0000002").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    line = one_line(run("train", begun / "run.yaml", f"run_dir={tmp_path / 'run'}"), 2)
    assert line.startswith("error: init: found no directory"), line


def test_a_refused_run_leaves_nothing(config_for, run, tmp_path):
    run_dir = tmp_path / "runs" / "first"
    path = write(tmp_path / "run.yaml", config_for(run_dir, **SHORT))
    one_line(run("train", path, f"data.train={tmp_path / 'nothing'}", f"data.cache_dir={tmp_path / 'index'}"), 2)
    assert not (tmp_path / "runs").exists()
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "notes.txt").write_text("mine")
    one_line(run("train", path, f"data.train={tmp_path / 'nothing'}"), 2)
    assert sorted(entry.name for entry in run_dir.iterdir()) == ["logs", "notes.txt"], "what was there stays"


def test_a_mistake_is_found_before_ranks_are_started(config_for, tmp_path, capsys, monkeypatch):
    from remit_megatron.cli import main
    from remit_megatron.runtime import launch

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "launch", lambda *_, **__: pytest.fail("ranks were started"))
    path = write(tmp_path / "run.yaml", config_for(tmp_path / "run", **SHORT))
    for override in ("megatron.adam_beta1=1.0", "megatron.tensor_model_parallel_size=3", "megatron.no_such=1"):
        assert main(["train", str(path), override, "--nproc", "2"]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


BROKEN = """
import sys
from remit_megatron.cli import main
from remit_megatron.runtime import checkpoints
def broken(*_, **__):
    raise OSError(5, "Input/output error")
checkpoints.write_manifest = broken
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_that_an_error_ends_does_not_wait_for_its_data_workers(config_for, tmp_path):
    """A process of its own: the warm ones never come to the end of a program."""
    config = config_for(tmp_path / "run", **SHORT)
    assert "num_workers" not in config["data"]  # there are two, with the handlers of signals that the run had
    words = [sys.executable, "-c", BROKEN, "train", str(write(tmp_path / "run.yaml", config))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and done.stderr.rstrip().endswith("Input/output error"), done.stderr[-2000:]
