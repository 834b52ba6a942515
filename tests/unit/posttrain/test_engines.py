"""The engines that run elsewhere: what they are given, and what is taken from them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remit_megatron.posttrain import command_engine
from remit_megatron.posttrain.configuration import settings_of
from remit_megatron.posttrain.examples import Example
from remit_megatron.posttrain.formats import FORMATS, write_format
from remit_megatron.posttrain.verl_reward import compute_score
from remit_megatron.runtime.errors import DoNotRestart, UserError
from tests.posttrain_runs import lines_of, write_lines


@pytest.fixture
def content(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def build(stage: str = "sft", **more: Any) -> dict[str, Any]:
        data = write_lines(tmp_path / "lines.jsonl", lines_of(stage))
        return {"model": str(model), "run_dir": str(tmp_path / "run"), "data": {"train": [str(data)]}, **more}

    return build


# A command.

COPIES = (
    "import pathlib, shutil, sys; out = pathlib.Path(sys.argv[2]); shutil.copytree(sys.argv[1], out); "
    "(out / 'lines').write_text(open(sys.argv[3]).read()); (out / 'tokenizer.json').unlink(); "
    "weights = out / 'model.safetensors'; held = bytearray(weights.read_bytes()); held[-1] ^= 128; "  # the sign of one
    "weights.write_bytes(held)"
)


def command(program: str, *words: str) -> dict[str, Any]:
    return {"run": [sys.executable, "-c", program, *words]}


def test_a_command_makes_the_model(content: Callable[..., dict[str, Any]], model: Path, tmp_path: Path) -> None:
    run = command(COPIES.replace("{", "{{").replace("}", "}}"), "{model_in}", "{model_out}", "{data}")
    settings = settings_of(content(engine="command", command=run), stage="sft")
    assert command_engine.run(settings) == 0
    result = tmp_path / "run/model"
    assert (result / "model.safetensors").read_bytes()[:-1] == (model / "model.safetensors").read_bytes()[:-1]
    assert (result / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert [json.loads(line) for line in (result / "lines").read_text().splitlines()] == lines_of("sft")
    before = (result / "lines").stat().st_mtime_ns
    assert command_engine.run(settings) == 0 and (result / "lines").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="seed: found 9; expected 1234"):
        command_engine.run(settings_of(content(engine="command", command=run, seed=9), stage="sft"))


@pytest.mark.parametrize("code", [2, 3, 70, 75])
def test_its_exit_code_is_ours(code: int, content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run = command("import sys; sys.exit(int(sys.argv[2]))", "{model_out}", str(code))
    assert command_engine.run(settings_of(content(engine="command", command=run), stage="sft")) == code
    assert not (tmp_path / "run/model").exists()


def test_success_without_a_model(content: Callable[..., dict[str, Any]]) -> None:
    run = command("pass", "{model_out}")
    with pytest.raises(DoNotRestart, match=r"found no config.json and \*.safetensors"):
        command_engine.run(settings_of(content(engine="command", command=run), stage="sft"))


def rewritten(model: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(model, directory)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def narrower(weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        weights[name] = weight.bfloat16()


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        (lambda weights: None, {}, "found the weights that it started from; expected a model that learnt something"),
        (narrower, {"dtype": "bfloat16"}, "found the weights that it started from"),
        (lambda weights: weights.pop("model.norm.weight"), {}, "found no model.norm.weight in"),
        (lambda weights: weights["model.norm.weight"].add_(1), {"vocab_size": 9}, "embed_tokens.weight of shape"),
        (lambda weights: weights["model.norm.weight"].add_(1), {"model_type": "mistral"}, "found model_type 'mistral'"),
    ],
)
def test_a_model_that_is_no_result(
    change: Any, config: dict[str, Any], says: str, content: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """Refused at once, and left where it is, by the command that knows who wrote it."""
    made = rewritten(model, tmp_path / "made", change)
    of_model = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(of_model | config))
    run = command("import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])", str(made), "{model_out}")
    with pytest.raises(DoNotRestart, match=re.escape(says)):
        command_engine.run(settings_of(content(engine="command", command=run), stage="sft"))
    assert not (tmp_path / "run/model").exists() and (tmp_path / "run/output").exists()


def test_an_adapter_is_no_model(content: Callable[..., dict[str, Any]], model: Path, tmp_path: Path) -> None:
    made = rewritten(model, tmp_path / "made", lambda weights: weights["model.norm.weight"].add_(1))
    (made / "adapter_config.json").write_text("{}")
    run = command("import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])", str(made), "{model_out}")
    with pytest.raises(DoNotRestart, match="an adapter that transformers applies"):
        command_engine.run(settings_of(content(engine="command", command=run), stage="sft"))


def test_a_signal_reaches_it(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """75 where it dies of a signal that was passed on; of its own, that signal."""
    program = "import os, signal, sys, time; os.kill(int(sys.argv[2]), signal.SIGTERM); time.sleep(60)"
    code = (
        "import json, os, sys; from remit_megatron.posttrain import command_engine as c; "
        "from remit_megatron.posttrain.configuration import settings_of as s; t = json.load(open(sys.argv[1])); "
        "t['command']['run'] += [str(os.getpid())]; sys.exit(c.run(s(t, stage='sft')))"
    )
    settings = content(engine="command", command=command(program, "{model_out}"))
    (tmp_path / "c.json").write_text(json.dumps(settings))
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.json")], timeout=50).returncode == 75
    dies = command("import os; os.kill(os.getpid(), 9)", "{model_out}")
    assert command_engine.run(settings_of(content(engine="command", command=dies), stage="sft")) == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "command.run: found nothing"),
        ({"run": "train --in {model_in}"}, "no {model_out}"),
        ({"run": "train {model_out} {modl_in}"}, "did you mean model_in?"),
        ({"run": "train {model_out} {valid}"}, "{valid}, which the configuration does not say"),
        ({"run": "train '{model_out}"}, "No closing quotation"),
        ({"run": "no_such_program_here {model_out}"}, "a program that can be started"),
        ({"run": "train {model_out}", "fromat": "swift"}, "did you mean format?"),
        ({"run": "train {model_out}", "format": "swfit"}, "did you mean swift?"),
        ({"run": "train {model_out}", "keep": 5}, "keep.every: found 5; expected null, with engine command"),
    ],
)
def test_commands_that_are_none(section: dict[str, Any], says: str, content: Callable[..., dict[str, Any]]) -> None:
    section = dict(section)
    keep = {"every": section.pop("keep", None)}
    with pytest.raises(UserError) as caught:
        command_engine.run(settings_of(content(engine="command", command=section, keep=keep), stage="sft"))
    assert says in str(caught.value)


# Forms of data.


def example(stage: str) -> Example:
    return Example("f:1", lines_of(stage)[0])


def test_forms() -> None:
    problem, answer = lines_of("sft")[0].values()
    asked = {"role": "user", "content": problem}
    said = {"role": "assistant", "content": answer}
    wrong = lines_of("dpo")[0]["rejected"]
    assert FORMATS["swift"](example("sft"), "sft", None) == {"messages": [asked, said]}
    assert FORMATS["swift"](example("dpo"), "dpo", None) == {"messages": [asked, said], "rejected_response": wrong}
    row = FORMATS["swift"](example("rlvr"), "rlvr", "math")
    assert row == {"messages": [asked], "solution": answer, "verifier": "math"}
    assert FORMATS["nemo_rl"](example("rlvr"), "rlvr", None) == {"messages": [asked, said]}
    assert FORMATS["nemo_rl"](example("dpo"), "dpo", None) == {"prompt": [asked], "chosen": answer, "rejected": wrong}
    with pytest.raises(UserError, match="verl has no such form"):
        FORMATS["verl"](example("dpo"), "dpo", None)


def test_verl_asks_our_verifiers(tmp_path: Path) -> None:
    import pyarrow.parquet

    line = {"prompt": "say A", "answer": "A", "verifier": "exact_match", "verifier_args": {"ignore_case": True}}
    write_format(tmp_path / "f.parquet", [Example("f:1", line)], form="verl", stage="rlvr")
    (row,) = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert row["prompt"] == [{"content": "say A", "role": "user"}]
    arguments = (row["data_source"], "a", row["reward_model"]["ground_truth"])
    assert compute_score(*arguments, extra_info=row["extra_info"]) == 1.0
    assert compute_score(*arguments) == 0.0
