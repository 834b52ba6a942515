"""What a configuration may say, what is refused and how, and the configurations that come with the package."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remit_megatron import cli
from remit_megatron.posttrain import trl_engine
from remit_megatron.posttrain.configuration import load_settings, settings_of
from remit_megatron.posttrain.examples import as_text, for_template, read_examples
from remit_megatron.posttrain.trl_arguments import REFUSED, build_arguments, config_class
from remit_megatron.runtime.errors import UserError
from tests.posttrain_runs import content_of, lines_of, make_tiny, write_lines

CONFIGS = Path(__file__).resolve().parents[3] / "configs/posttrain"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def content(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def build(stage: str, **more: Any) -> dict[str, Any]:
        return content_of(stage, model, tmp_path) | more

    return build


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration(path: Path) -> None:
    settings = load_settings(path, stage=path.stem.rpartition("_")[2])
    arguments = build_arguments(settings_without_gpu(settings), has_valid=False)
    assert arguments.learning_rate == settings.trl["learning_rate"]
    assert "save_steps" in settings.trl


def settings_without_gpu(settings: Any) -> Any:
    import dataclasses

    return dataclasses.replace(settings, trl={k: v for k, v in settings.trl.items() if k != "bf16"})


def test_there_is_one_for_every_stage() -> None:
    names = {path.stem for path in SHIPPED}
    assert {f"{kind}_{stage}" for kind in ("toy", "olmo2_1b") for stage in ("sft", "dpo", "rlvr")} <= names


def test_the_tulu_template_is_open_instructs() -> None:
    """With its mark of what the assistant says, on conversations of several turns."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (CONFIGS / "tulu.jinja").read_text()
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    talk += [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    (text,), (spans,) = render_jinja_template(
        [talk], chat_template=template, return_assistant_tokens_mask=True, bos_token="<b>", eos_token="<e>"
    )
    assert text == "<b><|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA<e>\n<|user|>\nQ2\n<|assistant|>\nA2<e>"
    assert [text[start:end] for start, end in spans] == ["A<e>", "A2<e>"]
    (text,), _ = render_jinja_template(
        [talk[:2]], chat_template=template, add_generation_prompt=True, bos_token=None, eos_token="<e>"
    )
    assert text == "<|system|>\nS\n<|user|>\nQ\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"modle": "x"}, "modle: found 'x'; expected one of model, "),
        ({"learning_rate": 1}, "arguments of TRL go under trl"),
        ({"engine": "tlr"}, "did you mean trl?"),
        ({"data": {"train": []}}, "data.train: found []"),
        ({"data": {"trian": ["x"]}}, "did you mean train?"),
        ({"keep": {"every": 0}}, "keep.every: found 0"),
        ({"seed": True}, "seed: found True"),
        ({"trl": ["a"]}, "trl: found ['a']"),
        ({"run_dir": ""}, "run_dir: found ''"),
        ({"command": {"run": "x"}}, "command: found settings, with engine trl"),
        ({"verifier": "math"}, "verifier: found 'math'; expected nothing: sft has no rewards"),
    ],
)
def test_what_no_configuration_says(more: dict[str, Any], says: str, content: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError) as caught:
        settings_of(content("sft", **more), stage="sft")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "trl", "says"),
    [
        ("rlvr", {"num_generation": 4}, "did you mean num_generations?"),
        ("sft", {"warmup_ratio": 0.1}, "warmup_steps, where a number below 1 is a share"),
        ("sft", {"learning_rate": "fast"}, "trl.learning_rate: found 'fast'; expected a number"),
        ("sft", {"max_steps": 1.5}, "trl.max_steps: found 1.5; expected a whole number"),
        ("sft", {"packing": 1}, "trl.packing: found 1; expected true or false"),
        ("sft", {"report_to": "wandb"}, "metrics.jsonl has every figure"),
        ("sft", {"push_to_hub": True}, "nothing is sent to a hub"),
        ("sft", {"hub_model_id": "x"}, "nothing is sent to a hub"),
        ("rlvr", {"use_vllm": True}, "trl.use_vllm: found True, without vllm"),
        ("rlvr", {"deepspeed": "ds.json"}, "without deepspeed"),
        ("rlvr", {"num_generations": 7}, "must be divisible by num_generations"),
        ("sft", {"fp16": True, "bf16": True}, "fp16"),
        ("sft", {"eval_strategy": "steps", "eval_steps": 2}, "data.valid: found nothing"),
        ("sft", {"save_strategy": "best"}, "trl.save_strategy: found 'best'"),
        ("rlvr", {"sync_ref_model": True}, "does not save the moving reference"),
        ("sft", {"lr_scheduler_type": "sideways"}, "sideways"),
    ],
)
def test_arguments_that_are_refused(
    stage: str, trl: dict[str, Any], says: str, content: Callable[..., dict[str, Any]]
) -> None:
    settings = settings_of(content(stage, trl=content(stage)["trl"] | trl), stage=stage)
    with pytest.raises(UserError) as caught:
        build_arguments(settings, has_valid=False)
    assert says in str(caught.value) and str(caught.value).startswith(("trl", "data.valid"))


def test_held_out_lines_need_a_time(content: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"for data\.valid"):
        build_arguments(settings_of(content("sft"), stage="sft"), has_valid=True)


def test_the_refused_arguments_are_trls() -> None:
    """A name that TRL has given up would be refused as unknown anyway."""
    known: set[str] = set()
    for stage in ("sft", "dpo", "rlvr"):
        known |= set(config_class(stage).__dataclass_fields__)
    assert set(REFUSED) <= known


def test_what_is_written_down(content: Callable[..., dict[str, Any]]) -> None:
    """Every argument as it is used; of generation too, which TRL's defaults leave as they are called."""
    import yaml

    prepared = trl_engine.prepare(settings_of(content("rlvr"), stage="rlvr"))
    written = yaml.safe_load(trl_engine.resolved(prepared))
    assert written["stage"] == "rlvr" and written["chat_template"] == "none"
    used = written["trl"]
    assert (used["temperature"], used["top_p"], used["top_k"], used["repetition_penalty"]) == (1.0, 1.0, 0, 1.0)
    assert used["loss_type"] == "dapo" and used["scale_rewards"] == "group" and used["beta"] == 0.0


# Lines.


@pytest.mark.parametrize(
    ("stage", "line", "says"),
    [
        ("sft", '{"prompt": "a"', "text that is not JSON"),
        ("sft", '{"prompt": "a"}', "found fields prompt; expected a line with"),
        ("sft", '{"text": ""}', "text an empty string"),
        ("sft", '{"messages": [{"role": "usr", "content": "a"}]}', "role 'usr' in messages"),
        ("sft", '{"messages": [{"role": "user"}]}', "in messages; expected messages as"),
        ("sft", '{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}', "tool_calls in a message"),
        ("dpo", '{"prompt": "a", "chosen": "b"}', "no rejected among prompt, chosen"),
        ("rlvr", '{"prompt": "a", "answer": [1]}', "answer [1]; expected a string or a number"),
        ("rlvr", '{"prompt": "a", "answer": "1", "verifier_args": 3}', "verifier_args 3"),
        ("rlvr", '{"prompt": "a", "answer": "1", "answer": "2"}', "'answer' 2 times"),
        ("rlvr", "[1]", "JSON list"),
        ("sft", '{"text": "half a pair \\ud83d"}', "half of a surrogate pair at character 12"),
        ("sft", '{"messages": [{"role": "user", "content": "\\udc00"}]}', "half of a surrogate pair"),
        ("dpo", '{"prompt": "a", "chosen": "b", "rejected": ' + "[" * 100_000, "text that is not JSON"),
    ],
)
def test_a_bad_line_is_named(stage: str, line: str, says: str, tmp_path: Path) -> None:
    good = json.dumps(lines_of(stage, 1)[0])
    (tmp_path / "lines.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        read_examples([str(tmp_path / "lines.jsonl")], stage=stage, field="data.train")
    assert caught.value.field == f"{tmp_path / 'lines.jsonl'}:3" and says in str(caught.value)


def test_compressed_files_and_other_fields(tmp_path: Path) -> None:
    line = lines_of("rlvr", 1)[0] | {"answer": 7, "source": "somewhere"}
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as file:
        file.write(json.dumps(line) + "\n")
    (example,) = read_examples([str(tmp_path)], stage="rlvr", field="data.train")
    assert example.fields == {"prompt": line["prompt"], "answer": "7"}


def test_missing_and_mixed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.train: found .*nowhere.jsonl, which does not exist"):
        read_examples([str(tmp_path / "nowhere.jsonl")], stage="sft", field="data.train")
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match="expected one form of lines"):
        read_examples([str(tmp_path / "a.jsonl")], stage="sft", field="data.train")


def test_strings_and_messages() -> None:
    from remit_megatron.posttrain.examples import Example

    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    example = Example("f:1", {"prompt": talk, "chosen": "A", "rejected": "B"})
    said = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "A"), ("rejected", "B"))}
    assert for_template(example, "dpo") == {"prompt": talk, **said}
    assert as_text(example, "dpo") == {"prompt": "SQ", "chosen": "A", "rejected": "B"}


def test_messages_need_a_template(model: Path, tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    content = content_of("sft", model, tmp_path)
    write_lines(tmp_path / "sft.jsonl", [line])
    content.pop("chat_template")
    with pytest.raises(UserError, match=r"chat_template: found no template in .*, with messages at .*sft.jsonl:1"):
        trl_engine.prepare(settings_of(content, stage="sft"))
    prepared = trl_engine.prepare(settings_of(content | {"chat_template": "none"}, stage="sft"))
    assert as_text(prepared.examples[0], "sft") == {"text": "ab"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("verifier=gsmk8", "error: verifier: found 'gsmk8'; expected one of"),
        ("model=nowhere", "error: model: found no directory nowhere"),
        ("trl.max_step=3", "did you mean max_steps?"),
        ("data.train=[nowhere.jsonl]", "error: data.train: found nowhere.jsonl, which does not exist"),
        ("chat_template=nowhere.jinja", "error: chat_template: found nowhere.jinja (no such file)"),
    ],
)
def test_one_line_and_exit_code_2(
    override: str, says: str, content: Callable[..., dict[str, Any]], tmp_path: Path, capsys: Any
) -> None:
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content("rlvr")))
    assert cli.main(["posttrain", "rlvr", str(tmp_path / "run.yaml"), override]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
