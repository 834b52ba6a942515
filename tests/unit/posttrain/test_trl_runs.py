"""Runs by TRL at the smallest size: killed anywhere they give the same, and what they compute is what is meant."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.posttrain.configuration import settings_of
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import sha256_file
from tests.posttrain_runs import (
    content_of,
    in_child,
    killed_from_outside,
    killed_in,
    lines_of,
    metrics_of,
    run_content,
    write_lines,
)

pytestmark = pytest.mark.usefixtures("trl_once")


@pytest.fixture
def content(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def build(stage: str, **trl: Any) -> dict[str, Any]:
        return content_of(stage, model, tmp_path, **trl)

    return build


def outcome(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    return metrics_of(run_dir), sha256_file(run_dir / "model/model.safetensors")


def run_here(content: dict[str, Any], stage: str, tmp_path: Path) -> str:
    """The one line of a run that is refused."""
    message = tmp_path / "message"

    def refused() -> None:
        from remit_megatron.posttrain import trl_engine

        with pytest.raises(UserError) as caught:
            trl_engine.run(settings_of(content, stage=stage))
        message.write_text(str(caught.value))

    def work() -> int:
        refused()
        return 0

    assert in_child(work) == 0
    return message.read_text()


# The same as undisturbed, bit for bit. Twelve lines: every case goes through several epochs.
CASES = {
    "sft": ("sft", {"save_steps": 2, "gradient_accumulation_steps": 2}),
    "dpo": ("dpo", {"save_steps": 3}),
    "rlvr": ("rlvr", {"save_steps": 3}),
    # Completions are generated every fourth step, and saved in between.
    "rlvr_shared": (
        "rlvr",
        {
            "save_steps": 3,
            "num_iterations": 2,
            "steps_per_generation": 2,
            "per_device_train_batch_size": 8,
            "beta": 0.1,
        },
    ),
}
KILLS = {"sft": ("end", 5, "save", 6), "dpo": ("begin", 4, "save", 3), "rlvr": ("end", 7, "save", 6)}
KILLS["rlvr_shared"] = ("begin", 7, "end", 4)


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere(case: str, content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    stage, arguments = CASES[case]
    settings, run_dir = content(stage, **arguments), tmp_path / "run"
    assert run_content(settings, stage) == 0
    undisturbed = outcome(run_dir)
    assert [line["iteration"] for line in undisturbed[0]] == list(range(1, 9))
    shutil.rmtree(run_dir)
    where, step, other, later = KILLS[case]
    assert run_content(settings, stage, killed_in(step, where=where)) == 128 + signal.SIGKILL
    assert run_content(settings, stage, killed_in(later, where=other)) in (0, 128 + signal.SIGKILL)
    assert run_content(settings, stage) == 0
    assert outcome(run_dir) == undisturbed


@pytest.mark.parametrize("stage", ["sft", "dpo", "rlvr"])
def test_killed_from_outside(stage: str, content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """At moments that nobody chose, as a scheduler or the kernel does it."""
    settings, run_dir = content(stage, save_steps=1, max_steps=12), tmp_path / "run"
    assert run_content(settings, stage) == 0
    undisturbed = outcome(run_dir)
    shutil.rmtree(run_dir)
    generator = random.Random(stage)
    codes = [killed_from_outside(settings, stage, step=step, seconds=generator.uniform(0, 0.05)) for step in (2, 4, 7)]
    assert codes[0] == 128 + signal.SIGKILL and set(codes) <= {0, 128 + signal.SIGKILL}
    assert run_content(settings, stage) == 0
    assert outcome(run_dir) == undisturbed


@pytest.mark.parametrize("stage", ["sft", "rlvr"])
def test_killed_behind_the_last_step(stage: str, content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """With the last checkpoint, and without the model: there is no step left to do, in the midst of an epoch."""
    settings, run_dir = content(stage, save_steps=4, max_steps=4), tmp_path / "run"
    assert run_content(settings, stage) == 0
    undisturbed = outcome(run_dir)
    shutil.rmtree(run_dir / "model")
    (run_dir / "complete.json").unlink()
    assert run_content(settings, stage) == 0
    assert outcome(run_dir) == undisturbed


def test_a_signal_saves_and_stops(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings, run_dir = content("rlvr", save_steps=100), tmp_path / "run"
    assert run_content(settings, "rlvr") == 0
    undisturbed = outcome(run_dir)
    shutil.rmtree(run_dir)
    assert run_content(settings, "rlvr", killed_in(4, where="begin", number=signal.SIGTERM)) == 75
    assert not (run_dir / "model").exists() and len(metrics_of(run_dir)) == 5
    assert (run_dir / "checkpoints/checkpoint-5/manifest.json").exists()
    assert run_content(settings, "rlvr") == 0
    assert outcome(run_dir) == undisturbed


def test_a_damaged_checkpoint_is_set_aside(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings, run_dir = content("sft", save_steps=2), tmp_path / "run"
    assert run_content(settings, "sft", killed_in(5, where="end")) == 128 + signal.SIGKILL
    weights = run_dir / "checkpoints/checkpoint-4/optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-7] + b"changed")
    assert run_content(settings, "sft") == 0
    assert (run_dir / "checkpoints/checkpoint-4.damaged").is_dir()
    assert (run_dir / "checkpoints/checkpoint-4").is_dir()  # the run came by again


def test_only_the_newest_checkpoints_stay(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = content("sft", save_steps=2, save_total_limit=1) | {"keep": {"every": 4}}
    assert run_content(settings, "sft") == 0
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-8"]
    assert sorted(path.name for path in (tmp_path / "run/models").iterdir()) == ["step-4", "step-8"]
    final, kept = (tmp_path / "run" / name / "model.safetensors" for name in ("model", "models/step-8"))
    assert sha256_file(final) == sha256_file(kept)


def test_finished_and_changed(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = content("dpo", max_steps=2)
    assert run_content(settings, "dpo") == 0
    before = outcome(tmp_path / "run")
    assert run_content(settings, "dpo") == 0 and outcome(tmp_path / "run") == before
    # More evaluations or checkpoints change nothing that is learnt.
    assert run_content(settings | {"trl": settings["trl"] | {"save_steps": 1}}, "dpo") == 0
    says = run_here(settings | {"trl": settings["trl"] | {"beta": 0.5}}, "dpo", tmp_path)
    assert says.startswith("trl.beta: found 0.5; expected 0.1, as the run in")
    says = run_here(settings | {"seed": 6}, "dpo", tmp_path)
    assert says.startswith("seed: found 6; expected 5, as the run in")
    write_lines(tmp_path / "dpo.jsonl", lines_of("dpo")[:-1])
    assert run_here(settings, "dpo", tmp_path).startswith("data: found digest ")


# Prompts of 4 characters and one of 12; answers of 1, 3, 4 and 5; an end behind each, where TRL puts one.
LONG = [("1+2=", "3"), ("1+2=", "333"), ("1+2=", "3333"), ("1+2=", "33333"), ("1+2+3+4+5+6=", "1")]


@pytest.mark.parametrize(
    ("stage", "trl", "said"),
    [
        ("sft", {}, "3 of 5 records are longer than trl.max_length 8, and cut there, 1 of them left out, with nothing"),
        ("sft", {"max_length": 10}, "1 of 5 records are longer than trl.max_length 10, and cut there, 1 of them left"),
        ("sft", {"max_length": 14}, ""),
        ("sft", {"packing": True, "packing_strategy": "bfd"}, "3 of 5 records are longer than trl.max_length 8, and"),
        ("sft", {"packing": True, "packing_strategy": "wrapped"}, ""),
        ("dpo", {}, "3 of 5 records are longer than trl.max_length 8, and cut there, 1 of them left out, with nothing"),
    ],
)
def test_what_max_length_cuts_is_said(stage: str, trl: dict[str, Any], said: str, content, tmp_path, capfd) -> None:
    settings = content(stage, **({"max_length": 8, "max_steps": 1, "per_device_train_batch_size": 1} | trl))
    answers = {"sft": lambda text: {"completion": text}, "dpo": lambda text: {"chosen": "9", "rejected": text}}[stage]
    write_lines(tmp_path / f"{stage}.jsonl", [{"prompt": prompt, **answers(text)} for prompt, text in LONG])
    assert run_content(settings, stage) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("data.train: ")]
    assert [line.startswith(f"data.train: {said}") for line in lines] == ([True] if said else [])


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_cut_down_to_nothing(stage: str, content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    says = run_here(content(stage, max_length=3), stage, tmp_path)
    assert says.startswith("data.train: found 12 records, of none of which trl.max_length 3 leaves what is learnt")


# What is computed.


def test_the_loss_of_sft_is_the_mean_over_the_completions(
    content: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    assert run_content(content("sft", per_device_train_batch_size=12, max_steps=1), "sft") == 0
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model).double()
    losses = []
    for line in lines_of("sft"):
        prompt = tokenizer(line["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(line["completion"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            chosen = network(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        losses += (-chosen[len(prompt) - 1 :]).tolist()
    (line,) = metrics_of(tmp_path / "run")
    assert line["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_dpo_begins_at_log_two(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert run_content(content("dpo", max_steps=3, per_device_train_batch_size=12), "dpo") == 0
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0]


def test_rewards_are_the_verifiers(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    import pandas

    settings = content("rlvr", max_steps=2, log_completions=True)
    assert run_content(settings, "rlvr") == 0
    answers = {line["prompt"]: line["answer"] for line in lines_of("rlvr")}
    for line in metrics_of(tmp_path / "run"):
        table = pandas.read_parquet(
            tmp_path / f"run/checkpoints/completions/completions_{line['iteration']:05d}.parquet"
        )
        assert len(table) == 16 and set(table["prompt"]) <= answers.keys()
        rewards = [
            float(bool(digits) and int(digits) == int(answers[prompt]))
            for prompt, text in zip(table["prompt"], table["completion"], strict=True)
            for digits in ["".join(last_digits(text))]
        ]
        assert rewards == list(table["verified"])
        assert line["reward_mean"] == pytest.approx(sum(rewards) / 16)


def last_digits(text: str) -> list[str]:
    """From the end: the first run of digits."""
    found: list[str] = []
    for character in reversed(text):
        if character.isdigit():
            found.insert(0, character)
        elif found:
            break
    return found


def test_what_a_model_says_of_generation_does_not_matter(
    content: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """Its temperature, its penalties: the configuration says how completions are drawn."""
    assert run_content(content("rlvr", max_steps=2), "rlvr") == 0
    plain = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    other = shutil.copytree(model, tmp_path / "opinionated")
    said = {"eos_token_id": 0, "do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.2, "min_p": 0.9}
    said |= {"no_repeat_ngram_size": 1, "typical_p": 0.1, "repetition_penalty": 3.0}
    (other / "generation_config.json").write_text(json.dumps(said))
    assert run_content(content("rlvr", max_steps=2) | {"model": str(other)}, "rlvr") == 0
    assert outcome(tmp_path / "run") == plain
    assert json.loads((tmp_path / "run/model/generation_config.json").read_text()) == said


def test_the_result_is_the_source_with_other_weights(
    content: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    assert run_content(content("sft", max_steps=1), "sft") == 0
    result = tmp_path / "run/model"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (result / name).read_bytes() == (model / name).read_bytes()
    assert json.loads((result / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    checkpoint = load_file(tmp_path / "run/checkpoints/checkpoint-1/model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(result).state_dict()
    assert checkpoint and all((loaded[name] == tensor).all() for name, tensor in checkpoint.items())
    assert not list(result.glob("*.bin"))


def test_held_out_lines_are_evaluated(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = content("rlvr", max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    settings["data"]["valid"] = [str(write_lines(tmp_path / "valid.jsonl", lines_of("rlvr", 4)))]
    assert run_content(settings, "rlvr") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/validation.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(0 <= line["eval_reward"] <= 1 for line in lines)


def test_a_verifier_that_fails_ends_the_run(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(completion, answer):\n    return answer / 2\n")
    settings = content("rlvr") | {"verifier": f"{tmp_path / 'mine.py'}:reward"}
    says = run_here(settings, "rlvr", tmp_path)
    assert says.startswith(f"{tmp_path / 'rlvr.jsonl'}:") and "raised TypeError" in says


def test_prompts_through_a_template(content: Callable[..., dict[str, Any]], model: Path, tmp_path: Path) -> None:
    """Strings are what a user says, and the tokenizer's template makes the prompt of them."""
    import pandas

    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'][0] }}.{{ m['content'] }},{% endfor %}a.")
    settings = content("rlvr", max_steps=1, log_completions=True) | {"chat_template": str(template)}
    assert run_content(settings, "rlvr") == 0
    table = pandas.read_parquet(tmp_path / "run/checkpoints/completions/completions_00001.parquet")
    assert table["prompt"][0][0]["role"] == "user"
    (line,) = metrics_of(tmp_path / "run")
    lengths = {len("u.,a.") + len(prompt[0]["content"]) for prompt in table["prompt"]}
    assert lengths == {9}
    assert line["consumed_tokens"] == 16 * 9 + round(16 * line["completion_length"])
    assert (tmp_path / "run/model/chat_template.jinja").read_text() == template.read_text()


@pytest.mark.parametrize("where", ["prepare", "_trainer"])
def test_a_stop_in_the_set_up(where: str, content: Callable[..., dict[str, Any]], tmp_path: Path, capfd: Any) -> None:
    """Nothing is trained or saved; in a step it saves; and the run ends as if nothing had happened."""
    settings, run_dir = content("sft", save_steps=100), tmp_path / "run"
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))

    def command(number: signal.Signals | None = None, where: str = "") -> int:
        from remit_megatron.cli import main
        from remit_megatron.posttrain import trl_engine

        original = getattr(trl_engine, where) if number else None

        def told(*given: Any, **named: Any) -> Any:
            os.kill(os.getpid(), number or 0)
            return original(*given, **named)

        if number:
            setattr(trl_engine, where, told)
        return main(["posttrain", "sft", str(path)])

    for number in (signal.SIGTERM, signal.SIGHUP):
        assert in_child(lambda number=number: command(number, where)) == 75
        line = f"stopped by {number.name} before the first step, nothing is lost; start it again to go on"
        assert line in capfd.readouterr().err
    assert not (run_dir / "metrics.jsonl").exists() and not (run_dir / "checkpoints").exists()
    assert run_content(settings, "sft", killed_in(4, where="begin", number=signal.SIGHUP)) == 75
    assert (run_dir / "checkpoints/checkpoint-5/manifest.json").exists()
    assert in_child(command) == 0
    found = outcome(run_dir)
    shutil.rmtree(run_dir)
    assert run_content(settings, "sft") == 0
    assert outcome(run_dir) == found
