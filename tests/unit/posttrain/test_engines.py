"""The engines that run elsewhere: what they are given, and what is taken from them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from remit_megatron.posttrain import command_engine, nemo_rl
from remit_megatron.posttrain.configuration import settings_of
from remit_megatron.posttrain.examples import Example
from remit_megatron.posttrain.formats import FORMATS, write_format
from remit_megatron.posttrain.verl_reward import compute_score
from remit_megatron.runtime.errors import DoNotRestart, UserError
from tests.posttrain_runs import lines_of, make_tiny, write_lines

KEYS = json.loads((Path(__file__).parents[2] / "golden/nemo_rl_keys.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def content(model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def build(stage: str = "sft", **more: Any) -> dict[str, Any]:
        data = write_lines(tmp_path / "lines.jsonl", lines_of(stage))
        return {"model": str(model), "run_dir": str(tmp_path / "run"), "data": {"train": [str(data)]}, **more}

    return build


# A command.

COPIES = (
    "import pathlib, shutil, sys; out = pathlib.Path(sys.argv[2]); shutil.copytree(sys.argv[1], out); "
    "(out / 'lines').write_text(open(sys.argv[3]).read()); (out / 'tokenizer.json').unlink()"
)


def command(program: str, *words: str) -> dict[str, Any]:
    return {"run": [sys.executable, "-c", program, *words]}


def test_a_command_makes_the_model(content: Callable[..., dict[str, Any]], model: Path, tmp_path: Path) -> None:
    run = command(COPIES.replace("{", "{{").replace("}", "}}"), "{model_in}", "{model_out}", "{data}")
    settings = settings_of(content(engine="command", command=run), stage="sft")
    assert command_engine.run(settings) == 0
    result = tmp_path / "run/model"
    assert (result / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
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
    ],
)
def test_commands_that_are_none(section: dict[str, Any], says: str, content: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError) as caught:
        command_engine.run(settings_of(content(engine="command", command=section), stage="sft"))
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


# NeMo-RL.


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
    settings = settings_of(content(stage, engine="nemo_rl", nemo_rl=nemo(checkout), trl=TRL[stage]), stage=stage)
    cluster = nemo_rl.read_cluster(settings)
    values = nemo_rl.render(settings, cluster, model=Path("/m"), family=family, has_valid=True)
    known = set(KEYS["keys"][nemo_rl.EXAMPLES[stage]])
    assert KEYS["version"] == nemo_rl.VERSION
    assert {key for key in values if key not in known} <= {"policy.tokenizer.chat_template", "policy.scheduler"}
    assert "policy.scheduler" in KEYS["keys"]["dpo.yaml"]
    assert values["policy.megatron_cfg.enabled"] is (family == "llama")
    assert values["policy.dtensor_cfg.enabled"] is (family != "llama")
    learnt = "policy.megatron_cfg.optimizer.lr" if family == "llama" else "policy.optimizer.kwargs.lr"
    assert values[learnt] == TRL[stage].get("learning_rate", 1e-6)


def test_what_grpo_becomes(content: Callable[..., dict[str, Any]], checkout: Path) -> None:
    settings = settings_of(content("rlvr", engine="nemo_rl", nemo_rl=nemo(checkout), trl=TRL["rlvr"]), stage="rlvr")
    cluster = nemo_rl.read_cluster(settings)
    values = nemo_rl.render(settings, cluster, model=Path("/m"), family="olmo2", has_valid=False)
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
    more = {"engine": "nemo_rl", "chat_template": str(template), "verifier": "gsm8k", "trl": TRL["rlvr"]}
    settings = settings_of(content("rlvr", nemo_rl=nemo(checkout, sbatch={"time": "4:0:0"}), **more), stage="rlvr")
    assert nemo_rl.run(settings) == 75
    run_dir = tmp_path / "run"
    for script in ("run.sh", "submit.sh"):
        assert subprocess.run(["bash", "-n", str(run_dir / script)]).returncode == 0
    submit = (run_dir / "submit.sh").read_text()
    assert "sbatch --nodes=2 --job-name=run --time=4:0:0 ray.sub" in submit and "CONTAINER=image.sqsh" in submit
    assert "convert_megatron_to_hf.py" in (run_dir / "run.sh").read_text()
    written = yaml.safe_load((run_dir / "nemo_rl.yaml").read_text())
    assert written["defaults"] == str(checkout / "examples/configs/grpo_math_1B.yaml")
    assert written["policy"]["tokenizer"]["chat_template"] == str(template)
    assert len((run_dir / "data/train.jsonl").read_text().splitlines()) == 12
    import shutil

    shutil.copytree(model, run_dir / "output")  # as the job leaves it
    assert nemo_rl.run(settings) == 0
    assert (run_dir / "model/model.safetensors").exists() and not (run_dir / "output").exists()
    assert nemo_rl.run(settings) == 0


@pytest.mark.parametrize(
    ("stage", "more", "says"),
    [
        ("rlvr", {"trl": {"max_steps": 5, "top_entropy_quantile": 0.2}}, "trl.top_entropy_quantile: found 0.2"),
        ("rlvr", {"trl": {"max_steps": 5}}, "trl.max_length: found nothing"),
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
