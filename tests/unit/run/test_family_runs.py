"""What is in configs/runs: every file is right as it stands, and the families' numbers are those of the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.cli import main
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.run.configuration import DataConfig, ObjectiveConfig, RunConfig, load_config, load_model_description
from remit_megatron.run.dry_run import dry_run
from remit_megatron.run.prepare import examine, prepare
from remit_megatron.runtime.errors import UserError
from tests.families import FIRST_CASES, hf_values, make_case
from tests.tiny import make_tokenizer, write_documents

ROOT = Path(__file__).resolve().parents[3]
RUNS = ROOT / "configs/runs"
# Appendix D of the paper: tokens of the run, of a batch (as samples x sequence length), peak and last learning rate.
TOKENS = 50_000_000_000
LAST_LEARNING_RATE = 1e-7
PAPER = {
    "olmo2_1b": {"samples": 512, "sequence_length": 4096, "batch": 2_097_152, "peak": 3e-4, "steps": 23842},
    "smollm3_3b": {"samples": 256, "sequence_length": 8192, "batch": 2_097_152, "peak": 2e-4, "steps": 23842},
    "youtu_2b": {"samples": 8192, "sequence_length": 8192, "batch": 67_108_864, "peak": 2e-4, "steps": 745},
}
PARAMETERS = {"olmo2_1b": 1_484_916_736, "smollm3_3b": 3_075_098_624, "youtu_2b": 1_961_560_064}
# The variants of each family's paper run: objective, and whether a reference scores.
VARIANTS = {
    "remit": ("remit", True),
    "sft_guided": ("remit", True),
    "rho1": ("rho1", True),
    "kd": ("kd", True),
    "ntp": ("ntp", False),
    "miniplm": ("ntp", False),
}
PAPER_RUNS = [(family, variant) for family in PAPER for variant in VARIANTS]
OFFICIAL = ["olmo2_1b_remit_official", "smollm3_3b_remit_official"]


def numbers_of(config, *, world_size: int = 1):
    """Derived numbers of a run whose files are not here."""
    found = examine(config, world_size=world_size, absent=[])
    from remit_megatron.models.family import family_of
    from remit_megatron.run.derived import plan_numbers

    unlisted = family_of(found.hf_config).unlisted_parameters(found.hf_config)
    return found, plan_numbers(found.arguments, unlisted=unlisted)


def test_every_file_of_the_families_is_looked_at():
    expected = {f"{family}_{variant}_paper" for family, variant in PAPER_RUNS} | set(OFFICIAL)
    assert {path.stem for family in PAPER for path in RUNS.glob(f"{family}_*.yaml")} == expected


@pytest.mark.parametrize(("family", "variant"), PAPER_RUNS)
def test_numbers_are_the_papers(family, variant):
    config = load_config(RUNS / f"{family}_{variant}_paper.yaml")
    found, numbers = numbers_of(config)
    paper = PAPER[family]
    assert (numbers.samples_per_step, numbers.sequence_length) == (paper["samples"], paper["sequence_length"])
    assert numbers.tokens_per_step == paper["batch"] == paper["samples"] * paper["sequence_length"]
    assert numbers.steps == paper["steps"]
    assert abs(numbers.total_tokens - TOKENS) < numbers.tokens_per_step
    assert numbers.first_learning_rate == numbers.peak_learning_rate == paper["peak"] and numbers.warmup_steps == 0
    # The last step is taken just before the schedule's end.
    assert LAST_LEARNING_RATE < numbers.last_learning_rate < LAST_LEARNING_RATE * 1.01
    assert found.arguments.lr_decay_style == "cosine" and found.arguments.min_lr == LAST_LEARNING_RATE
    assert numbers.parameters == PARAMETERS[family]

    objective, scores = VARIANTS[variant]
    assert config.objective.name == objective and (config.reference is not None) == scores
    if objective == "remit":
        assert (config.objective.epsilon, config.objective.centering) == (0.2, "sequence")
    if objective == "rho1":
        assert config.objective.keep == 0.8


@pytest.mark.parametrize("family", PAPER)
def test_variants_differ_in_nothing_else(family):
    """Every baseline is the paper run but for what makes it that baseline."""
    remit = load_config(RUNS / f"{family}_remit_paper.yaml")
    directories = set()
    for variant in VARIANTS:
        config = load_config(RUNS / f"{family}_{variant}_paper.yaml")
        directories.add(config.run_dir)
        for section in ("model", "init", "megatron", "optimizer", "loss", "checkpoint", "seed"):
            assert getattr(config, section) == getattr(remit, section), (variant, section)
        assert config.data.tokenizer == remit.data.tokenizer and config.data.document_mask == remit.data.document_mask
        assert (config.data.train == remit.data.train) == (variant != "miniplm")
        lines = (RUNS / f"{family}_{variant}_paper.yaml").read_text().splitlines()
        assert variant == "remit" or sum(not line.startswith("#") for line in lines) <= 4
    assert len(directories) == len(VARIANTS), "two runs in one directory"


@pytest.mark.parametrize("world_size", [8, 64])
@pytest.mark.parametrize("name", [*(f"{family}_remit_paper" for family in PAPER), *OFFICIAL])
def test_one_node_and_eight(name, world_size):
    _, numbers = numbers_of(load_config(RUNS / f"{name}.yaml"), world_size=world_size)
    assert numbers.data_parallel == world_size and numbers.microbatches >= 1
    assert numbers.microbatches * numbers.micro_batch_size * world_size == numbers.samples_per_step


def test_olmo_official_numbers():
    _, numbers = numbers_of(load_config(RUNS / "olmo2_1b_remit_official.yaml"))
    assert numbers.tokens_per_step == 512 * 4096 and abs(numbers.total_tokens - TOKENS) < numbers.tokens_per_step
    assert numbers.first_learning_rate == 7.4487e-5
    assert numbers.last_learning_rate == pytest.approx(7.4487e-5 / numbers.steps)  # linear, one step before 0


def test_smollm3_official_numbers():
    config = load_config(RUNS / "smollm3_3b_remit_official.yaml")
    _, numbers = numbers_of(config)
    assert (numbers.tokens_per_step, numbers.sequence_length, numbers.steps) == (2_359_296, 4096, 522_000)
    assert numbers.last_learning_rate == pytest.approx(2e-4 / 522_000)
    assert config.data.document_mask and load_model_description(config.model)["max_position_embeddings"] == 4096
    config = load_config(RUNS / "smollm3_3b_remit_official.yaml", ["megatron.train_iters=21193"])  # its comment
    _, numbers = numbers_of(config)
    assert abs(numbers.total_tokens - TOKENS) < numbers.tokens_per_step


def test_weight_decay_and_masks_are_the_families_own():
    rules = {}
    for family in PAPER:
        config = load_config(RUNS / f"{family}_remit_paper.yaml")
        rules[family] = (config.optimizer.decay_norms, config.optimizer.decay_embeddings, config.data.document_mask)
        arguments = examine(config, world_size=1, absent=[]).arguments
        adam = (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_eps, arguments.weight_decay)
        assert (*adam, arguments.clip_grad) == (0.9, 0.95, 1e-8, 0.1, 1.0)
    assert rules == {
        "olmo2_1b": (True, False, False),
        "smollm3_3b": (True, False, True),
        "youtu_2b": (None, None, False),
    }


@pytest.mark.parametrize("case", [case for case in FIRST_CASES if not case.startswith("llama-")])
def test_a_paper_run_takes_the_checkpoints_that_import_writes(case, tmp_path, monkeypatch):
    """From the Hugging Face model to a prepared run, by the commands of docs/data.md, without another tokenizer."""
    family = next(name for name in PAPER if name.startswith(case.split("-")[0]))
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    for seed, role in enumerate(("base", "rl")):
        make_case(tmp_path / f"hf_{role}", case, seed=seed, tokenizer=tokenizer)
        assert main(["import", "--hf", f"hf_{role}", "--output", f"checkpoints/{family}_{role}"]) == 0
    documents = write_documents(tmp_path / "text.jsonl", count=300, seed=3)
    (tmp_path / "data").mkdir()
    words = ["--input", str(documents), "--tokenizer", f"checkpoints/{family}_base", "--output", "data/text"]
    assert main(["data", "build", *words, "--workers", "1"]) == 0
    # Only the sizes are others than the file's.
    small = ["model=null", "data.train=data/text", "megatron.seq_length=64"]
    prepared = prepare(load_config(RUNS / f"{family}_remit_paper.yaml", small), world_size=1)
    assert prepared.init is not None and prepared.init.path == Path(f"checkpoints/{family}_base")
    assert prepared.reference is not None and prepared.reference.iteration == 0
    assert prepared.tokenizer.digest == load_tokenizer(tokenizer).digest == read_manifest("data/text").tokenizer_digest
    assert prepared.tokenizer.eod_id == 0, "what its configuration files say is found beside it"


# `model` beside `init`.


def examined(model: dict[str, Any], init: Path, tokenizer: Path) -> None:
    settings = {"seq_length": 64, "train_iters": 10, "lr": 1e-3}
    data = DataConfig(train=[[1.0, "data/a"]], tokenizer=str(tokenizer))
    objective = ObjectiveConfig(name="ntp")
    config = RunConfig(model=model, init=str(init), objective=objective, data=data, run_dir="runs/x", megatron=settings)
    examine(config, world_size=1)


@pytest.mark.parametrize("case", FIRST_CASES)
def test_what_a_run_chooses_may_differ_from_the_checkpoint(case, tmp_path):
    """transformers writes the default of its class where the authors' file has no initializer_range."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    init = make_case(tmp_path / "init", case, tokenizer=tokenizer)
    model = hf_values(case)
    examined(model | {"initializer_range": 0.0123, "max_position_embeddings": 512}, init, tokenizer)
    examined(model | {"attention_dropout": 0.1}, init, tokenizer)
    found = refused(lambda: examined(model | {"intermediate_size": 96}, init, tokenizer))
    assert found == "init: found a checkpoint with ffn_hidden_size 80; expected 96, as `model` says"


def test_what_only_the_checkpoint_speaks_of_counts_too(tmp_path):
    """The weights of SmolLM3 fit a Llama, and mean something else in it."""
    case, tokenizer = "smollm3-own_list_untied", make_tokenizer(tmp_path / "tokenizer")
    init = make_case(tmp_path / "init", case, tokenizer=tokenizer)
    model = {name: value for name, value in hf_values(case).items() if not name.startswith("no_rope")}
    found = refused(lambda: examined(model | {"model_type": "llama"}, init, tokenizer))
    assert found.startswith("init: found a checkpoint with no_rope_freq [")


# Dry runs where the files are not.


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_passes_the_dry_run(path, tmp_path, monkeypatch, capsys):
    """As it stands, with nothing of it on this machine and no other option."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "not found here: data.train " in text and "tokens in all" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_a_number_of_ranks_is_of_one_replica(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(RUNS / "example_remit.yaml")
    assert main(["train", path, "--dry-run"]) == 0
    assert "2 = tensor 1 x pipeline 2 x context 1 x data 1\n" in capsys.readouterr().out
    words = ["megatron.context-parallel-size=2", "megatron.transformer_impl=local", "--dry-run"]
    assert main(["train", path, *words]) == 0
    assert "4 = tensor 1 x pipeline 2 x context 2 x data 1\n" in capsys.readouterr().out
    assert main(["train", path, "--nproc", "4", "--dry-run"]) == 0
    assert "4 = tensor 1 x pipeline 2 x context 1 x data 2\n" in capsys.readouterr().out
    assert main(["train", path, "--nproc", "1", "--dry-run"]) == 2


def test_a_dry_run_refuses_rounds_that_the_interleaved_schedule_cannot_make(tmp_path, monkeypatch, capsys):
    """Megatron says so in its first step only, after models and data were made."""
    monkeypatch.chdir(tmp_path)
    words = ["train", str(RUNS / "example_remit.yaml"), "--dry-run", "megatron.num_virtual_stages_per_pipeline_rank=3"]
    assert main([*words, "megatron.micro_batch_size=1", "megatron.global_batch_size=4"]) == 0
    assert main([*words, "megatron.micro_batch_size=1", "megatron.global_batch_size=3"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: megatron.global_batch_size: found 3 (3 microbatches on each data-parallel rank)")


def test_a_dry_run_says_what_it_did_not_find():
    text = dry_run(load_config(RUNS / "olmo2_1b_remit_paper.yaml"), world_size=8)
    missing = [line.split(" (")[0] for line in text.splitlines() if line.startswith("not found here: ")]
    assert missing == [
        "not found here: init checkpoints/olmo2_1b_base",
        "not found here: data.tokenizer checkpoints/olmo2_1b_base",
        "not found here: reference.checkpoint checkpoints/olmo2_1b_rl",
        "not found here: data.train data/dolmino_mix_1124/blend.yaml",
    ]
    assert "run_dir: runs/olmo2_1b_paper/remit\n" in text and "50,000,297,984" in text


def refused(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_a_run_refuses_what_is_missing(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    path = RUNS / "olmo2_1b_remit_paper.yaml"
    assert refused(lambda: prepare(load_config(path), world_size=1)).startswith("init: found no directory")
    config = load_config(path, ["init=null"])
    assert refused(lambda: prepare(config, world_size=1)).startswith("tokenizer: found checkpoints/olmo2_1b_base")
    config = load_config(path, ["init=null", f"data.tokenizer={tokenizer}"])
    assert refused(lambda: prepare(config, world_size=1)).startswith("reference.checkpoint: found no directory")


def test_a_dry_run_checks_what_is_there(tmp_path):
    """What is missing excuses nothing else."""
    path = RUNS / "olmo2_1b_remit_paper.yaml"
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    entries = json.loads((tokenizer / "tokenizer.json").read_text())
    entries["model"]["vocab"]["too many"] = 100352
    (tokenizer / "tokenizer.json").write_text(json.dumps(entries))
    config = load_config(path, [f"data.tokenizer={tokenizer}"])
    assert refused(lambda: dry_run(config, world_size=1)).startswith("data.tokenizer: found 100353 entries")

    (tmp_path / "empty").mkdir()
    for key in ("init", "reference.checkpoint"):
        config = load_config(path, [f"{key}={tmp_path / 'empty'}"])
        assert refused(lambda config=config: dry_run(config, world_size=1)).startswith(
            f"{key}: found an empty directory"
        )
    config = load_config(path, ["megatron.micro_batch_size=3"])
    assert "micro_batch_size" in refused(lambda: dry_run(config, world_size=1))
    config = load_config(path, ["objective={name: kd}", "reference.source=cache", "reference.cache_dir=x"])
    assert refused(lambda: dry_run(config, world_size=1)).startswith("reference.source: found cache")


def test_a_dry_run_needs_the_checkpoint_for_its_architecture():
    config = load_config(RUNS / "olmo2_1b_remit_paper.yaml", ["model=null"])
    assert refused(lambda: dry_run(config, world_size=1)).startswith(
        "init: found no directory checkpoints/olmo2_1b_base"
    )
