"""Runs by TRL that would train nothing, or end before they begin: one line, and no model that claims to be one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.posttrain import trl_engine
from remit_megatron.posttrain.configuration import settings_of
from remit_megatron.posttrain.trl_arguments import build_arguments
from remit_megatron.posttrain.trl_callbacks import learnt_nothing
from remit_megatron.runtime.errors import DoNotRestart, UserError
from tests.posttrain_runs import content_of, in_child, lines_of, metrics_of, run_content, write_lines

pytestmark = pytest.mark.usefixtures("trl_once")


@pytest.fixture
def content(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def build(stage: str, lines: int | None = None, **trl: Any) -> dict[str, Any]:
        built = content_of(stage, model, tmp_path, **trl)
        if lines is not None:
            write_lines(tmp_path / f"{stage}.jsonl", lines_of(stage, lines))
        return built

    return build


def prepared_fails(content: dict[str, Any], stage: str) -> str:
    """The line that ends the preparation of a run."""
    with pytest.raises(UserError) as caught:
        trl_engine.prepare(settings_of(content, stage=stage))
    assert not Path(content["run_dir"]).exists()
    return str(caught.value)


def run_fails(content: dict[str, Any], stage: str, folder: Path, kind: type[Exception] = UserError) -> str:
    """The line that ends a run that has begun."""
    message = folder / "message"

    def work() -> int:
        with pytest.raises(kind) as caught:
            trl_engine.run(settings_of(content, stage=stage))
        message.write_text(str(caught.value))
        return 0

    assert in_child(work) == 0
    assert not (folder / "run/model").exists() and not (folder / "run/complete.json").exists()
    return message.read_text()


# Before anything is written.


def test_fewer_prompts_than_a_step_takes(content: Callable[..., dict[str, Any]]) -> None:
    says = prepared_fails(content("rlvr", lines=2, per_device_train_batch_size=32, num_generations=8), "rlvr")
    assert (
        says == "data.train: found 2 lines; expected at least 4: a step asks 4 of them, for 32 completions, 8 of each"
    )


def test_no_whole_batch(content: Callable[..., dict[str, Any]]) -> None:
    says = prepared_fails(content("sft", lines=2, dataloader_drop_last=True), "sft")
    assert says.startswith("data.train: found 2 lines; expected at least 4: trl.dataloader_drop_last")


def test_an_intermediate_model_that_never_comes(content: Callable[..., dict[str, Any]]) -> None:
    says = prepared_fails(content("sft", max_steps=2) | {"keep": {"every": 5}}, "sft")
    assert says == "keep.every: found 5; expected at most 2, the steps of the run, or null to keep none"


@pytest.mark.parametrize(
    ("stage", "trl", "says"),
    [
        ("sft", {"max_steps": 0}, "trl.max_steps: found 0; expected at least 1, or -1"),
        ("sft", {"max_steps": -2}, "trl.max_steps: found -2; expected at least 1, or -1"),
        ("sft", {"max_steps": -1, "num_train_epochs": 0}, "trl.num_train_epochs: found 0; expected a number above 0"),
        ("sft", {"learning_rate": -1}, "trl.learning_rate: found -1; expected a number above 0"),
        ("sft", {"learning_rate": 0}, "trl.learning_rate: found 0; expected a number above 0"),
        ("sft", {"max_steps": -1, "num_train_epochs": float("inf")}, "trl"),
        ("sft", {"weight_decay": -0.1}, "trl.weight_decay: found -0.1; expected 0 or more"),
        ("sft", {"adam_beta2": 1.0}, "trl.adam_beta2: found 1.0; expected from 0 to below 1"),
        ("sft", {"gradient_accumulation_steps": 0}, "trl.gradient_accumulation_steps: found 0; expected at least 1"),
        ("dpo", {"per_device_train_batch_size": -4}, "trl.per_device_train_batch_size: found -4; expected at least 1"),
        ("rlvr", {"temperature": -1}, "trl.temperature: found -1; expected a number above 0"),
        ("rlvr", {"num_generations": 0}, "trl.num_generations: found 0; expected at least 2"),
        ("rlvr", {"num_generations": None}, "trl"),
        ("rlvr", {"steps_per_generation": 0}, "trl.steps_per_generation: found 0; expected at least 1"),
        ("rlvr", {"top_p": 0.0}, "trl.top_p: found 0.0; expected above 0, up to 1"),
    ],
)
def test_numbers_that_are_none(stage: str, trl: dict[str, Any], says: str, content, tmp_path: Path) -> None:
    settings = content(stage, **trl)
    if says == "trl":  # what only TRL or the start of a run finds
        assert run_fails(settings, stage, tmp_path).startswith("trl")
    else:
        assert prepared_fails(settings, stage).startswith(says)


def test_every_limit_is_of_a_number_of_trls() -> None:
    """A misspelt name would be a limit of nothing."""
    from remit_megatron.posttrain.trl_arguments import _LIMITS, config_class

    known: set[str] = set()
    for stage in ("sft", "dpo", "rlvr"):
        known |= set(config_class(stage).__dataclass_fields__)
    assert set(_LIMITS) <= known


# Found when TRL has the data.


def test_packed_to_less_than_a_batch(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = content("sft", packing=True, packing_strategy="wrapped", max_length=512, dataloader_drop_last=True)
    assert run_fails(settings, "sft", tmp_path).startswith("data.train: found no whole batch")


def test_epochs_without_an_intermediate_model(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = content("sft", max_steps=-1, num_train_epochs=1) | {"keep": {"every": 5}}
    assert run_fails(settings, "sft", tmp_path).startswith("keep.every: found 5; expected at most 3, the steps")


def test_what_the_trainer_refuses_before_its_first_step(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = content("sft", lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 5.0})
    says = run_fails(settings, "sft", tmp_path)
    assert says.startswith("trl: found lr_end (5.0) must be smaller than initial lr")


def test_an_end_before_the_last_step(content: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: Any) -> None:
    from remit_megatron.posttrain.trl_callbacks import MetricsWriter

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3

    monkeypatch.setattr(MetricsWriter, "on_step_end", stop, raising=False)
    says = run_fails(content("sft"), "sft", tmp_path, DoNotRestart)
    assert says.endswith("found an end after step 3; expected one after step 8")


# Nothing learnt.


def test_rewards_that_are_all_the_same(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Exit code 70, and again when it is started again; with one group that differs there is a model."""
    (tmp_path / "mine.py").write_text("def never(completion, answer):\n    return 0\n")
    settings = content("rlvr", max_steps=2, save_steps=1) | {"verifier": f"{tmp_path / 'mine.py'}:never"}
    says = run_fails(settings, "rlvr", tmp_path, DoNotRestart)
    assert "nothing was learnt" in says and "no group of completions with two different rewards in 2 steps" in says
    assert [line["grad_norm"] for line in metrics_of(tmp_path / "run")] == [0, 0]
    assert run_fails(settings, "rlvr", tmp_path, DoNotRestart) == says


def test_what_has_learnt_nothing(tmp_path: Path) -> None:
    def lines(*figures: dict[str, Any]) -> str | None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in figures))
        return learnt_nothing(tmp_path, entropy=False)

    same, other = {"frac_reward_zero_std": 1.0}, {"frac_reward_zero_std": 0.75}
    assert lines(same, {"loss": 0.0}, same) is not None  # a step of shared completions has no figure
    assert lines(same, other) is None and lines({"loss": 1.0}) is None and lines() is None
    assert lines({"grad_norm": 0.0}, {"grad_norm": 0.0}) is not None
    assert lines({"grad_norm": 0.0}, {"grad_norm": None}) is None and lines({"grad_norm": 0.1}) is None
    lines(same)
    assert learnt_nothing(tmp_path, entropy=True) is None
    assert learnt_nothing(tmp_path / "nowhere", entropy=False) is None


# Templates.

TEMPLATES = {
    "{% for m in messages %}": ("TemplateSyntaxError", "at "),
    "{{ messages[0].parts.first }}": ("UndefinedError", "at "),
    "{{ messages[0] + 1 }}": ("TypeError", "at "),
    "{{ raise_exception('no talk') if messages|length > 2 else messages[0]['content'] }}": ("no talk", "of every line"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_do_not_render(template: str, content, tmp_path: Path) -> None:
    error, where = TEMPLATES[template]
    talk = [{"role": role, "content": "1"} for role in ("user", "assistant", "user", "assistant")]
    settings = content("sft") | {"chat_template": str(tmp_path / "chat.jinja")}
    (tmp_path / "chat.jinja").write_text(template)
    write_lines(tmp_path / "sft.jsonl", [{"messages": talk[:2]}, {"messages": talk}])
    if where == "at ":
        says = prepared_fails(settings, "sft")
        where = f"at {tmp_path / 'sft.jsonl'}:1"
    else:
        says = run_fails(settings, "sft", tmp_path)
    assert says.startswith(f"chat_template: found {tmp_path / 'chat.jinja'} (") and error in says and where in says


@pytest.mark.parametrize("stage", ["dpo", "rlvr"])
def test_a_template_renders_strings_too(stage: str, content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].parts.first }}")
    settings = content(stage) | {"chat_template": str(tmp_path / "chat.jinja")}
    assert "UndefinedError" in prepared_fails(settings, stage)


def test_the_word_none_is_written_small(content: Callable[..., dict[str, Any]]) -> None:
    says = prepared_fails(content("sft") | {"chat_template": "None"}, "sft")
    assert says.startswith("chat_template: found None (no such file)") and "none" in says.partition("expected")[2]


# What is printed.


def test_completions_are_files_and_no_tables(
    content: Callable[..., dict[str, Any]], tmp_path: Path, capfd: Any
) -> None:
    settings = content("rlvr", max_steps=1, log_completions=True)
    assert build_arguments(settings_of(settings, stage="rlvr"), has_valid=False).num_completions_to_print == 0
    (tmp_path / "mine.py").write_text("def length(completion, answer):\n    return len(completion) / 10\n")
    assert run_content(settings | {"verifier": f"{tmp_path / 'mine.py'}:length"}, "rlvr") == 0
    output = capfd.readouterr()
    assert "─" not in output.out + output.err and "Completion" not in output.out + output.err
    assert (tmp_path / "run/checkpoints/completions/completions_00001.parquet").is_file()
