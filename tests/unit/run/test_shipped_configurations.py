"""Runs, models and recipes that come with the package, asked for from another directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from remit_megatron.data.recipe import load_recipe
from remit_megatron.run.configuration import load_config, load_model_description
from remit_megatron.runtime.errors import UserError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
RUNS = sorted(
    path.relative_to(CONFIGS.parent) for folder in ("runs", "cluster") for path in CONFIGS.glob(f"{folder}/*.yaml")
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_with_what_it_starts_from(path):
    assert load_config(path) == load_config(CONFIGS.parent / path)


def test_recipes_and_models():
    assert (
        load_recipe("configs/data/smollm3-decay.yaml").sources
        == load_recipe(CONFIGS / "data/smollm3-decay.yaml").sources
    )
    described = load_model_description(str(CONFIGS / "models/olmo2_1b.yaml"))
    assert load_model_description("olmo2_1b") == described == load_model_description("configs/models/olmo2_1b.yaml")
    assert load_model_description({"base": "olmo2_1b", "vocab_size": 8}) == described | {"vocab_size": 8}


@pytest.mark.parametrize(
    ("file", "base"),
    [
        ("mine.yaml", "configs/runs/olmo2_1b_remit_paper.yaml"),
        ("sweep/a/mine.yaml", "configs/runs/olmo2_1b_remit_paper.yaml"),
        ("sweep/mine.yaml", "../configs/runs/olmo2_1b_remit_paper.yaml"),
        ("configs/runs/mine.yaml", "olmo2_1b_remit_paper.yaml"),
        ("configs/mine/mine.yaml", "../runs/olmo2_1b_remit_paper.yaml"),
    ],
)
def test_a_file_of_your_own_starts_from_a_shipped_one(file, base):
    config = load_config(write(file, f"base: {base}\nrun_dir: mine\n"))
    assert (config.run_dir, config.megatron["train_iters"]) == ("mine", 23842)
    assert config.megatron["adam_beta2"] == 0.95  # from what the shipped file starts from


@pytest.mark.parametrize("file", ["mine.yaml", "sweep/mine.yaml"])
def test_what_the_working_directory_has_wins(file):
    write("configs/runs/olmo2_1b_remit_paper.yaml", "base: ../common/paper.yaml\nmodel: olmo2_1b\nrun_dir: here\n")
    write("configs/common/paper.yaml", "data: {train: [data], tokenizer: here}\n")
    for path in (
        "configs/runs/olmo2_1b_remit_paper.yaml",
        write(file, "base: configs/runs/olmo2_1b_remit_paper.yaml\n"),
    ):
        config = load_config(path)
        assert (config.run_dir, config.data.tokenizer, config.megatron) == ("here", "here", {})
    # What a shipped file starts from is the shipped one.
    assert load_config("configs/runs/youtu_2b_remit_paper.yaml").megatron["adam_beta2"] == 0.95


def test_a_missing_file_names_the_shipped_one_of_its_name():
    hint = r"; did you mean configs/common/paper\.yaml, which comes with remit\?$"
    with pytest.raises(
        UserError, match=rf"^\.\./common/paper\.yaml: found no such file; expected a readable file{hint}"
    ):
        load_config(write("mine.yaml", "base: ../common/paper.yaml\n"))
    with pytest.raises(UserError, match=r"did you mean configs/runs/kd\.yaml"):
        load_config("kd.yaml")
    with pytest.raises(UserError, match=r"did you mean configs/data/smollm3-decay\.yaml"):
        load_recipe("smollm3-decay.yaml")
    with pytest.raises(UserError, match=r"found no such file; expected a readable file$"):
        load_config("configs/runs/none.yaml")
