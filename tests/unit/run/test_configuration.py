"""The configuration of a run: what is read, what is refused, and with which line."""

from __future__ import annotations

import dataclasses
import pickle
import typing
from pathlib import Path

import pytest

from remit_megatron.run.configuration import RunConfig, load_config, load_model_description, read_blend
from remit_megatron.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
MINIMAL = """\
model: tiny_llama
data: {train: data/a, tokenizer: tok}
run_dir: runs/x
"""


def write(path: Path, text: str = MINIMAL) -> Path:
    path.write_text(text)
    return path


def line_of(*args) -> str:
    with pytest.raises(UserError) as caught:
        load_config(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_and_canonical_blend(tmp_path):
    config = load_config(write(tmp_path / "run.yaml"))
    assert (config.objective.name, config.objective.epsilon, config.objective.centering) == ("remit", 0.2, "sequence")
    assert config.reference is None
    assert config.data.train == ["data/a"] and config.data.valid == []
    assert (config.seed, config.checkpoint.keep, config.checkpoint.resume) == (1234, 2, "auto")
    assert (config.optimizer.decay_norms, config.optimizer.decay_embeddings) == (None, None)
    assert config.checkpoints_dir == Path("runs/x/checkpoints") and config.data_cache_dir == Path("runs/x/data_cache")


def test_overrides_are_yaml_and_the_last_wins(tmp_path):
    overrides = ["objective.epsilon=null", "data.train=[[0.7, a], [3, b]]", "megatron.lr=3e-4", "seed=1", "seed=2"]
    config = load_config(write(tmp_path / "run.yaml"), overrides)
    assert config.objective.epsilon is None
    assert config.data.train == [[0.7, "a"], [3.0, "b"]]
    assert config.megatron == {"lr": 3e-4} and config.seed == 2


def test_model_override_keeps_the_named_model(tmp_path):
    config = load_config(write(tmp_path / "run.yaml"), ["model.vocab_size=77"])
    description = load_model_description(config.model)
    assert description["vocab_size"] == 77
    assert description == load_model_description("tiny_llama") | {"vocab_size": 77}


def test_base_is_merged_key_by_key_relative_to_the_file(tmp_path):
    (tmp_path / "shared").mkdir()
    write(
        tmp_path / "shared" / "base.yaml", MINIMAL + "megatron: {lr: 1.0e-3, seq_length: 64}\nlogging: {interval: 5}\n"
    )
    child = write(tmp_path / "run.yaml", "base: shared/base.yaml\nmegatron: {lr: 2.0e-3}\ndata: {train: [b, c]}\n")
    config = load_config(child)
    assert config.megatron == {"lr": 2e-3, "seq_length": 64}
    assert config.data.train == ["b", "c"] and config.data.tokenizer == "tok"
    assert config.logging.interval == 5


def test_interpolation_reaches_defaults_and_keeps_types(tmp_path):
    config = load_config(write(tmp_path / "run.yaml"), ["data.packing_seed=${seed}", "run_dir=runs/${objective.name}"])
    assert config.data.packing_seed == 1234 and config.run_dir == "runs/remit"


def test_to_yaml_reads_back_equal(tmp_path):
    config = load_config(
        ROOT / "configs/runs/example_remit.yaml", ["logging.wandb={project: p}", "checkpoint.keep=null"]
    )
    again = load_config(write(tmp_path / "resolved.yaml", config.to_yaml()))
    assert again == config and isinstance(again, RunConfig)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/common").glob("*.yaml")), ids=lambda path: path.name)
def test_everything_in_a_part_of_runs_is_right(path):
    """Places are left to the runs and scripts that start from it; test_family_runs.py looks at the runs."""
    places = ["run_dir=runs/x", "init=checkpoints/x", "data.train=data/a", "data.tokenizer=tok"]
    config = load_config(path, places)
    if config.model is not None:
        assert load_model_description(config.model)["model_type"]


def test_there_is_an_example_run():
    assert (ROOT / "configs/runs/example_remit.yaml").is_file()


WRONG = {
    "objective.epsilonn=3": "objective.epsilonn: found 3; "
    "expected one of name, epsilon, centering, keep, scope, temperature, ntp_weight; did you mean epsilon?",
    "seed=abc": "seed: found 'abc'; expected a whole number",
    "seed=true": "seed: found True; expected a whole number",
    "seed=0": "seed: found 0; expected 1 or more",
    "objective=3": "objective: found 3; "
    "expected a mapping with name, epsilon, centering, keep, scope, temperature, ntp_weight",
    "objective.epsilon=1.5": "objective.epsilon: found 1.5; expected a number from 0 to 1, or null for no clipping",
    "objective.centering=sequense": "objective.centering: found 'sequense'; expected one of sequence, document, none; "
    "did you mean sequence?",
    "objective.scope=batch": "objective.scope: found 'batch'; expected one of micro_batch, sequence, global_batch; "
    "did you mean micro_batch?",
    "objective.keep=0": "objective.keep: found 0.0; expected a number above 0 and at most 1",
    "objective.temperature=0": "objective.temperature: found 0.0; expected a number above 0",
    "objective.ntp_weight=2": "objective.ntp_weight: found 2.0; expected a number from 0 to 1",
    "data.document_mask=3": "data.document_mask: found 3; expected true or false",
    "data.train=[[0, a]]": "data.train[0]: found 0; expected a positive weight",
    "data.train=[]": "data.train: found an empty blend; expected at least one data set",
    "checkpoint.keep=two": "checkpoint.keep: found 'two'; expected a whole number or null",
    "checkpoint.resume=always": "checkpoint.resume: found 'always'; expected one of auto, never",
    "spikes.action=ignore": "spikes.action: found 'ignore'; expected one of skip, rollback",
    "spikes.deviations=0": "spikes.deviations: found 0.0; expected a number above 0",
    "spikes.window=3": "spikes.window: found 3; expected 4 or more",
    "spikes.give_up=0": "spikes.give_up: found 0; expected 1 or more",
    "logging.slow_rank=1": "logging.slow_rank: found 1.0; expected a number above 1, or null",
    "megatron=5": "megatron: found 5; expected a mapping",
    "run_dir=null": "run_dir: found nothing; expected the directory that receives what the run writes",
    "model=null": "model: found nothing; expected an architecture, or init with a checkpoint to take it from",
    "data.tokenizer=null": "data.tokenizer: found nothing; "
    "expected the directory of the tokenizer the data was built with",
    "reference.source=live": "reference.checkpoint: found nothing; expected the directory of the reference model",
    "reference={checkpoint: c, source: cache}": "reference.cache_dir: found nothing; "
    "expected the directory of the scores, for reference.source: cache",
    "reference={checkpoint: c, placement: replicate}": "reference.placement: found 'replicate'; "
    "expected one of pipeline, replicated, auto; did you mean replicated?",
    "reference={checkpoint: c, write_cache: true}": "reference.cache_dir: found nothing; "
    "expected the directory of the scores, for reference.write_cache: true",
    "seed": "override: found 'seed'; expected KEY=VALUE with a dotted key, such as objective.epsilon=0.1",
    "seed=[": "override seed: found did not find expected node content; expected valid YAML",
    "seed=${nope}": "seed: found Interpolation key 'nope' not found; expected an interpolation that resolves",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_values_say_what_is_wrong_in_one_line(override, tmp_path):
    assert line_of(write(tmp_path / "run.yaml"), [override]) == WRONG[override]


def test_key_of_megatron_at_the_top_is_sent_to_its_place(tmp_path):
    line = line_of(write(tmp_path / "run.yaml"), ["train_iters=10"])
    assert line.startswith("train_iters: found 10; expected one of model, init,")
    assert line.endswith("; arguments of Megatron go under megatron")


def test_missing_file(tmp_path):
    assert line_of(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: found no such file; expected a readable file"


def test_bad_yaml_names_the_line(tmp_path):
    path = write(tmp_path / "run.yaml", "seed: 3\ndata:\n  train: [a\nrun_dir: x\n")
    assert line_of(path).startswith(f"{path}:4: found ") and line_of(path).endswith("; expected valid YAML")


def test_a_key_given_twice_is_refused(tmp_path):
    path = write(tmp_path / "run.yaml", "seed: 3\nseed: 4\n")
    assert line_of(path) == f"{path}:2: found duplicate key seed; expected valid YAML"


def test_a_list_is_not_a_configuration(tmp_path):
    path = write(tmp_path / "run.yaml", "- seed\n")
    assert line_of(path) == f"{path}: found a list; expected a mapping of keys to values"


@pytest.mark.parametrize("text", ["false", "5", "1.5", "!!binary aGk="])
def test_a_bare_value_is_not_a_configuration(tmp_path, text):
    """OmegaConf asserts on it."""
    path = write(tmp_path / "run.yaml", f"{text}\n")
    assert line_of(path) == f"{path}: found one value alone; expected valid YAML"
    blend = write(tmp_path / "blend.yaml", f"{text}\n")
    run = write(tmp_path / "run.yaml", f"model: tiny_llama\nrun_dir: r\ndata: {{train: {blend}, tokenizer: t}}\n")
    assert line_of(run).startswith(f"{blend}: found one value alone; expected ")


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000, str(2**63)])
def test_integers_of_more_than_64_bits(tmp_path, number):
    """Python writes no integer of more than 4,300 digits, and makes no float of one above 1e308."""
    path = write(tmp_path / "run.yaml", f"objective: {{epsilon: {number}}}\n")
    assert line_of(path) == f"{path}: found an integer of more than 64 bits; expected valid YAML"
    with pytest.raises(UserError, match="override seed: found an integer of more than 64 bits"):
        load_config(write(tmp_path / "run.yaml"), [f"seed={number}"])


def test_a_date_that_is_none(tmp_path):
    path = write(tmp_path / "run.yaml", "seed: !!timestamp 2001-99-99\n")
    assert line_of(path) == f"{path}: found month must be in 1..12; expected valid YAML"


def test_a_mapping_is_no_blend(tmp_path):
    text = "model: tiny_llama\nrun_dir: r\ndata: {{tokenizer: t, train: a, valid: {}}}\n"
    path = write(tmp_path / "run.yaml", text.format("{a: 1}"))
    assert line_of(path).startswith("data.valid: found {'a': 1}; expected a prefix, a list of prefixes")
    assert load_config(write(tmp_path / "run.yaml", text.format("{}"))).data.valid == []


def test_a_key_without_a_name_is_shown_as_such(tmp_path):
    path = write(tmp_path / "run.yaml", "'': 3\n")
    assert line_of(path).startswith("'': found 3; expected one of model, ")


def test_base_in_a_circle_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    expected = "files that do not start from each other in a circle"
    assert line_of(tmp_path / "a.yaml") == f"b.yaml: base: found a.yaml -> b.yaml -> a.yaml; expected {expected}"


def test_user_error_survives_pickling(tmp_path):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path / "run.yaml"), ["seed=abc"])
    assert str(pickle.loads(pickle.dumps(caught.value))) == WRONG["seed=abc"]


def test_model_is_found_as_file_directory_and_name(tmp_path, monkeypatch):
    named = load_model_description("tiny_llama")
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf" / "config.json", '{"model_type": "llama", "hidden_size": 8}')
    assert load_model_description(str(tmp_path / "hf")) == {"model_type": "llama", "hidden_size": 8}
    assert load_model_description(str(ROOT / "configs/models/tiny_llama.yaml")) == named
    (tmp_path / "configs/models").mkdir(parents=True)
    write(tmp_path / "configs/models/tiny_llama.yaml", "model_type: llama\nhidden_size: 9\n")
    monkeypatch.chdir(tmp_path)
    assert load_model_description("tiny_llama")["hidden_size"] == 9  # the current directory comes before the repository


def test_unknown_and_unusable_models(tmp_path):
    with pytest.raises(UserError, match=r"^model: found 'tiny_lama'; .*did you mean tiny_llama\?$"):
        load_model_description("tiny_lama")
    with pytest.raises(UserError, match="no model_type"):
        load_model_description({"hidden_size": 3})
    with pytest.raises(UserError, match=r"config\.json:2: found .*; expected valid JSON"):
        load_model_description(str(write(tmp_path / "config.json", '{\n "a": }')))


# Parameter counts as published with each model; the formula is written out for one architecture on purpose, so that it
# does not share a mistake with remit_megatron.run.derived.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1b", 1_711_376_384),
        ("llama3_1b", 1_235_814_400),
    ],
)
def test_model_descriptions_have_the_published_sizes(name, parameters):
    model = load_model_description(name)
    hidden, head = model["hidden_size"], model["head_dim"]
    attention = hidden * head * (2 * model["num_attention_heads"] + 2 * model["num_key_value_heads"])
    layer = attention + 3 * hidden * model["intermediate_size"] + 2 * hidden
    assert model["tie_word_embeddings"] is True
    assert model["vocab_size"] * hidden + model["num_hidden_layers"] * layer + hidden == parameters


@pytest.mark.parametrize(
    "value", [5, [[1.0]], [["a", "b"]], ["a", [1, "b"]], [[True, "a"]], [[float("nan"), "a"]], [""]]
)
def test_blends_that_cannot_be_read(value):
    with pytest.raises(UserError, match=r"^data\.train"):
        read_blend("data.train", value)


@pytest.mark.parametrize("value", ["a", ["a", "b"], [[2, "a"], [0.5, "b"]]])
def test_a_blend_means_the_same_to_the_data_layer_before_and_after(value):
    from remit_megatron.data.blend import parse_blend

    # A prefix without a weight counts by its tokens there: a weight made up here would change the mixture.
    assert parse_blend(read_blend("data.train", value)) == parse_blend(value)


def test_every_key_is_documented():
    text = (ROOT / "docs/configuration.md").read_text()

    def keys(schema: type, prefix: str):
        hints = typing.get_type_hints(schema)
        for item in dataclasses.fields(schema):
            yield f"{prefix}{item.name}"
            for hint in (hints[item.name], *typing.get_args(hints[item.name])):
                if dataclasses.is_dataclass(hint):
                    yield from keys(hint, f"{prefix}{item.name}.")

    assert "logging.wandb.mode" in list(keys(RunConfig, ""))
    missing = [key for key in keys(RunConfig, "") if f"| `{key}` |" not in text]
    assert not missing
