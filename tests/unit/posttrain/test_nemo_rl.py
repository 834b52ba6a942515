"""NeMo-RL's job of a configuration: the same run, key by key, or a refusal by name."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from remit_megatron import cli
from remit_megatron.posttrain import nemo_rl
from remit_megatron.posttrain.configuration import load_settings, settings_of
from remit_megatron.posttrain.nemo_rl_keys import Facts, amounts_of, check_arguments, render
from remit_megatron.runtime.errors import DoNotRestart, UserError
from tests.posttrain_runs import lines_of, write_lines

KEYS = json.loads((Path(__file__).parents[2] / "golden/nemo_rl_keys.json").read_text())
CONFIGS = Path(__file__).resolve().parents[3] / "configs/posttrain"


@pytest.fixture
def content(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Enough lines for a step of 16 GPUs."""

    def build(stage: str = "sft", **more: Any) -> dict[str, Any]:
        data = write_lines(tmp_path / "lines.jsonl", lines_of(stage, 200))
        return {"model": str(model), "run_dir": str(tmp_path / "run"), "data": {"train": [str(data)]}, **more}

    return build


def facts(family: str = "olmo2", **changes: Any) -> Facts:
    return Facts(
        **({"model": Path("/m"), "family": family, "context": 4096, "records": 100_000, "has_valid": False} | changes)
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Example files with the published keys, and nothing of their values."""
    folder = tmp_path / "nemo/examples/configs"
    folder.mkdir(parents=True)
    for name, keys in KEYS["keys"].items():
        tree: dict[str, Any] = {}
        for key in keys:
            place = tree
            for part in key.split("."):
                place = place.setdefault(part, {})
        (folder / name).write_text(yaml.safe_dump(tree))
    return tmp_path / "nemo"


def nemo(checkout: Path, **more: Any) -> dict[str, Any]:
    return {"repository": str(checkout), "container": "image.sqsh", "nodes": 2, **more}


TRL = {
    "sft": {"max_steps": 100, "warmup_steps": 0.03, "learning_rate": 3e-5, "max_length": 4096},
    "dpo": {"max_steps": 50, "beta": 5.0, "loss_type": ["sigmoid_norm"], "lr_scheduler_type": "constant"},
    "rlvr": {
        **{"max_steps": 10, "max_length": 4096, "num_generations": 16, "per_device_train_batch_size": 48},
        **{"beta": 0.01, "loss_type": "grpo", "lr_scheduler_type": "constant", "temperature": 1.0},
    },
}


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "rlvr"])
def test_every_key_is_a_published_one(
    stage: str, family: str, content: Callable[..., dict[str, Any]], checkout: Path
) -> None:
    trl = TRL[stage] | {"eval_strategy": "steps", "eval_steps": 10}
    settings = settings_of(content(stage, engine="nemo_rl", nemo_rl=nemo(checkout), trl=trl), stage=stage)
    check_arguments(settings)
    values = render(settings, nemo_rl.read_cluster(settings), facts(family, has_valid=True))
    known = set(KEYS["keys"][nemo_rl.EXAMPLES[stage]])
    assert KEYS["version"] == nemo_rl.VERSION
    assert {key for key in values if key not in known} <= {"policy.tokenizer.chat_template", "policy.scheduler"}
    assert "policy.scheduler" in KEYS["keys"]["dpo.yaml"]
    assert values["policy.megatron_cfg.enabled"] is (family == "llama")
    assert values["policy.dtensor_cfg.enabled"] is (family != "llama")
    learnt = "policy.megatron_cfg.optimizer.lr" if family == "llama" else "policy.optimizer.kwargs.lr"
    assert values[learnt] == TRL[stage].get("learning_rate", 1e-6)


@pytest.mark.parametrize("stage", ["sft", "dpo", "rlvr"])
def test_the_shipped_recipes(stage: str, checkout: Path) -> None:
    nodes = 2 if stage == "rlvr" else 1
    more = [f"nemo_rl.repository={checkout}", "nemo_rl.container=image.sqsh", f"nemo_rl.nodes={nodes}"]
    settings = load_settings(CONFIGS / f"olmo2_1b_{stage}.yaml", ["engine=nemo_rl", *more], stage=stage)
    check_arguments(settings)
    cluster = nemo_rl.read_cluster(settings)
    values = render(settings, cluster, facts(records=100_000))
    known = set(KEYS["keys"][nemo_rl.EXAMPLES[stage]])
    assert {key for key in values if key not in known} <= {"policy.tokenizer.chat_template", "policy.scheduler"}
    nemo_rl._check_keys(render(settings, cluster, facts("llama")), checkout, stage)
    section = {"sft": "sft", "dpo": "dpo", "rlvr": "grpo"}[stage]
    # 128 sequences a step, 781.25 steps a pass of which the last is not whole; 2,000,000 / 768 of RLVR.
    assert values[f"{section}.max_num_steps"] == {"sft": 2 * 782, "dpo": 782, "rlvr": 2604}[stage]
    assert values["policy.train_global_batch_size"] == {"sft": 128, "dpo": 128, "rlvr": 768}[stage]
    assert values["policy.max_total_sequence_length"] == {"sft": 4096, "dpo": 2048, "rlvr": 4096}[stage]
    if stage != "rlvr":
        first, then, ends = values["policy.scheduler"]
        warmup = {"sft": 47, "dpo": 79}[stage]  # 3% of 1564, 10% of 782, rounded up as transformers does
        assert (first["kwargs"]["total_iters"], ends) == (warmup, {"milestones": [warmup]})
        assert then["kwargs"]["total_iters"] == values[f"{section}.max_num_steps"] - warmup
        return
    assert (values["grpo.num_prompts_per_step"], values["grpo.num_generations_per_prompt"]) == (48, 16)
    assert len(values["policy.scheduler"]) == 2  # constant, without a warm-up
    kept = nemo_rl.kept_steps(settings, amounts_of(settings, cluster, facts()))
    assert kept == [(step, step) for step in range(200, 2601, 200)]


@pytest.mark.parametrize(
    "trl",
    [
        {"steps_per_generation": 2, "gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"generation_batch_size": 512, "gradient_accumulation_steps": 1},
        {"steps_per_generation": None, "gradient_accumulation_steps": 3},
    ],
)
def test_completions_of_a_round_are_trls(trl: dict[str, Any], content: Any, checkout: Path, monkeypatch: Any) -> None:
    """On 16 GPUs, by TRL's own arithmetic."""
    from transformers import TrainingArguments
    from trl.trainer.grpo_config import GRPOConfig

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 16))
    given = {"per_device_train_batch_size": 8, "num_generations": 8, "max_steps": 12} | trl
    theirs = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **given)
    section = {"engine": "nemo_rl", "nemo_rl": nemo(checkout), "trl": given | {"save_steps": 12}}
    settings = settings_of(content("rlvr", **section), stage="rlvr")
    values = render(settings, nemo_rl.read_cluster(settings), facts())
    drawn = values["grpo.num_prompts_per_step"] * values["grpo.num_generations_per_prompt"]
    assert drawn == theirs.generation_batch_size
    assert values["policy.train_global_batch_size"] == 8 * 16 * theirs.gradient_accumulation_steps
    rounds = 12 * theirs.gradient_accumulation_steps / theirs.steps_per_generation
    assert values["grpo.max_num_steps"] == values["checkpointing.save_period"] == rounds


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 4), (1, 7), (2.5, 18), (3, 21)])
def test_epochs_are_steps(epochs: float, steps: int, content: Any, checkout: Path) -> None:
    """800 lines in batches of 128 are 7 steps, the last of them of a part; max_steps is not asked where it is set."""
    trl = {"num_train_epochs": epochs, "lr_scheduler_type": "constant"}
    for more, expected in (({}, steps), ({"max_steps": 40}, 40)):
        section = {"engine": "nemo_rl", "nemo_rl": nemo(checkout), "trl": trl | more}
        settings = settings_of(content("sft", **section), stage="sft")
        values = render(settings, nemo_rl.read_cluster(settings), facts(records=800))
        assert values["sft.max_num_steps"] == expected and values["sft.max_num_epochs"] >= expected


def test_what_grpo_becomes(content: Callable[..., dict[str, Any]], checkout: Path) -> None:
    settings = settings_of(content("rlvr", engine="nemo_rl", nemo_rl=nemo(checkout), trl=TRL["rlvr"]), stage="rlvr")
    values = render(settings, nemo_rl.read_cluster(settings), facts())
    assert values["policy.train_global_batch_size"] == 48 * 16  # completions of a step over 2 x 8 GPUs
    assert values["grpo.num_prompts_per_step"] * values["grpo.num_generations_per_prompt"] == 48 * 16
    assert values["loss_fn.token_level_loss"] is False and values["grpo.use_leave_one_out_baseline"] is False
    assert values["data.validation"] is None and values["grpo.val_period"] == 0
    assert values["data.train"]["split_validation_size"] == 0
    assert values["policy.tokenizer.chat_template"] == "default"


def test_the_job_and_its_model(
    content: Callable[..., dict[str, Any]], checkout: Path, model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    trl = TRL["rlvr"] | {"save_steps": 2}
    more = {"engine": "nemo_rl", "chat_template": str(template), "verifier": "gsm8k", "trl": trl, "keep": {"every": 4}}
    settings = settings_of(content("rlvr", nemo_rl=nemo(checkout, sbatch={"time": "4:0:0"}), **more), stage="rlvr")
    assert nemo_rl.run(settings) == 75
    run_dir = tmp_path / "run"
    for script in ("run.sh", "submit.sh"):
        assert subprocess.run(["bash", "-n", str(run_dir / script)]).returncode == 0
    submit = (run_dir / "submit.sh").read_text()
    assert "sbatch --nodes=2 --job-name=run --time=4:0:0 ray.sub" in submit and "CONTAINER=image.sqsh" in submit
    script = (run_dir / "run.sh").read_text()
    assert "convert_megatron_to_hf.py" in script
    kept = [line for line in script.splitlines() if line.startswith("convert ")]
    places = [f"convert {run_dir}/checkpoints/step_{step} {run_dir}/kept/step-{step}" for step in (4, 8)]
    assert kept == [*places, f'convert "$newest" {run_dir}/output']
    written = yaml.safe_load((run_dir / "nemo_rl.yaml").read_text())
    assert written["defaults"] == str(checkout / "examples/configs/grpo_math_1B.yaml")
    assert written["policy"]["tokenizer"]["chat_template"] == str(template)
    assert len((run_dir / "data/train.jsonl").read_text().splitlines()) == 200
    shutil.copytree(model, run_dir / "output")  # as the job leaves it, but for what it has learnt
    with pytest.raises(DoNotRestart, match="found the weights that it started from"):
        nemo_rl.run(settings)
    weights = run_dir / "output/model.safetensors"
    held = bytearray(weights.read_bytes())
    held[-1] ^= 128  # the sign of one
    weights.write_bytes(held)
    for step in (4, 8):
        shutil.copytree(model, run_dir / f"kept/step-{step}", ignore=shutil.ignore_patterns("tokenizer*"))
    assert nemo_rl.run(settings) == 0
    assert (run_dir / "model/model.safetensors").exists() and not (run_dir / "output").exists()
    assert sorted(path.name for path in (run_dir / "models").iterdir()) == ["step-4", "step-8"]
    assert (run_dir / "models/step-8/tokenizer.json").exists()
    assert nemo_rl.run(settings) == 0


@pytest.mark.parametrize(
    ("stage", "more", "says"),
    [
        ("rlvr", {"trl": {"max_steps": 5, "top_entropy_quantile": 0.2}}, "trl.top_entropy_quantile: found 0.2"),
        ("rlvr", {"trl": {"max_steps": 5, "max_length": 0}}, "trl.max_length: found 0; expected a whole number"),
        ("rlvr", {"trl": {"max_steps": 5, "max_length": 512}}, "trl.max_completion_length: found 512; expected fewer"),
        (
            "rlvr",
            {"trl": {"max_steps": 5, "steps_per_generation": 1, "gradient_accumulation_steps": 2}},
            "a multiple of",
        ),
        (
            "rlvr",
            {"trl": {"max_steps": 5, "steps_per_generation": 2}},
            "trl.max_steps: found 5; expected a multiple of",
        ),
        ("rlvr", {"trl": {"max_steps": 5, "num_generations": 0}}, "trl.num_generations: found 0; expected at least 2"),
        ("rlvr", {"trl": {"max_steps": 5, "num_generations": None}}, "trl.num_generations: found null"),
        ("rlvr", {"trl": {"max_steps": 5, "num_generations": 7}}, "trl.num_generations: found 7; expected a divisor"),
        ("sft", {"trl": {"learning_rate": "fast"}}, "trl.learning_rate: found 'fast'; expected a number"),
        ("sft", {"trl": {"per_device_train_batch_size": "x"}}, "trl.per_device_train_batch_size: found 'x'"),
        ("sft", {"trl": {"max_steps": "abc"}}, "trl.max_steps: found 'abc'; expected a whole number"),
        ("sft", {"trl": {"max_step": 3}}, "did you mean max_steps?"),
        ("sft", {"trl": {"max_length": None}}, "trl.max_length: found null; expected a number"),
        ("sft", {"trl": {"bf16": False}}, "trl.bf16: found False; expected true"),
        ("sft", {"trl": {"save_steps": 0.1}}, "trl.save_steps: found 0.1; expected a whole number"),
        ("sft", {"trl": {"loss_type": "dft"}}, "trl.loss_type: found 'dft'"),
        ("sft", {"trl": {"max_steps": 5, "warmup_steps": 5}}, "trl.warmup_steps: found 5; expected fewer than the 5"),
        ("sft", {"trl": {"eval_strategy": "epoch"}}, "data.valid: found nothing; expected files"),
        ("sft", {"trl": {"per_device_train_batch_size": 64}}, "data.train: found 200 lines; expected at least 1024"),
        ("sft", {"keep": {"every": 200}}, "keep.every: found 200; expected at most 100"),
        ("sft", {"keep": {"every": 20}}, "keep.every: found 20; expected a multiple of trl.save_steps, 500"),
        ("sft", {"nemo_rl": {"overrides": {1: 2}}}, "nemo_rl.overrides: found {1: 2}; expected a mapping of names"),
        ("sft", {"nemo_rl": {"mounts": "/a:/b"}}, "nemo_rl.mounts: found '/a:/b'; expected a list"),
        ("rlvr", {"verifier": "number_at_end"}, "verifier 'number_at_end'; expected math or gsm8k"),
        ("dpo", {"trl": {"max_steps": 5, "loss_type": "ipo"}}, "trl.loss_type: found 'ipo'"),
        ("sft", {"trl": {"lr_scheduler_type": "cosine", "max_steps": 5}}, "trl.lr_scheduler_type: found 'cosine'"),
        ("sft", {"chat_template": "none"}, "chat_template: found 'none'"),
        ("sft", {"chat_template": None}, "chat_template: found none in"),
        ("sft", {"nemo_rl": {"overrides": {"policy.dtensor_cfg.tensor_paralel_size": 2}}}, "tensor_parallel_size?"),
        ("sft", {"nemo_rl": {"nodse": 2}}, "did you mean nodes?"),
        ("sft", {"nemo_rl": {"tensor_parallel_size": 3}}, "a divisor of the number of GPUs"),
        ("sft", {"nemo_rl": {"repository": "nowhere"}}, "nowhere without examples/configs/sft.yaml"),
    ],
)
def test_what_nemo_rl_cannot_do(
    stage: str,
    more: dict[str, Any],
    says: str,
    content: Callable[..., dict[str, Any]],
    checkout: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    defaults: dict[str, Any] = {"chat_template": str(tmp_path / "chat.jinja"), "trl": TRL[stage]}
    defaults |= {"verifier": "math"} if stage == "rlvr" else {}
    section = nemo(checkout) | more.pop("nemo_rl", {})
    with pytest.raises(UserError) as caught:
        nemo_rl.run(
            settings_of(content(stage, **{**defaults, "engine": "nemo_rl", "nemo_rl": section, **more}), stage=stage)
        )
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("line", "trl", "says"),
    [
        ({"messages": "talk"}, {}, "trl.assistant_only_loss: found nothing, with messages at"),
        (
            {"messages": "talk"},
            {"assistant_only_loss": False},
            "trl.assistant_only_loss: found False, with messages at",
        ),
        ({"messages": "talk"}, {"assistant_only_loss": True}, ""),
        ({"prompt": "talk", "completion": "c"}, {}, "a prompt with messages of the assistant"),
    ],
)
def test_what_of_a_talk_is_learnt(
    line: dict[str, Any], trl: dict[str, Any], says: str, content: Any, checkout: Path, tmp_path: Path, capsys: Any
) -> None:
    """NeMo-RL learns what the assistant says; TRL all of it, or the completion, unless it is told otherwise."""
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    section = {"engine": "nemo_rl", "nemo_rl": nemo(checkout), "trl": TRL["sft"] | trl}
    settings = content("sft", **section, chat_template=str(tmp_path / "chat.jinja"))
    talk = [{"role": role, "content": "1"} for role in ("user", "assistant")]
    lines = [{name: talk if value == "talk" else value for name, value in line.items()}] * 200
    write_lines(tmp_path / "lines.jsonl", lines)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["posttrain", "sft", str(tmp_path / "run.yaml"), "--dry-run"]) == (2 if says else 0)
    output = capsys.readouterr()
    assert says in output.err and (not says or output.err.count("\n") == 1)
