"""Recipes and blend files: what they may say, and what the shipped ones do say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from remit_megatron.data.blend import parse_blend
from remit_megatron.data.blend_file import read_blend_file, write_blend_file
from remit_megatron.data.recipe import HubPlace, load_recipe
from remit_megatron.run.configuration import load_config
from remit_megatron.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "configs/data"
SHIPPED = {"dolmino-mix-1124": 16, "smollm3-decay": 56, "youtu-own-mix": 4}


def refused(action, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        action(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_shipped_recipe_is_known_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert len(recipe.sources) == SHIPPED[name] == len(recipe.shares())
    assert math.fsum(recipe.shares().values()) == pytest.approx(1.0, abs=1e-12)


def test_smollm3_has_the_authors_weights():
    recipe = load_recipe(RECIPES / "smollm3-decay.yaml")
    weights = {source.name: source.weight for source in recipe.sources}
    assert math.fsum(weights.values()) == pytest.approx(1.00565, abs=1e-12), "what the authors' file sums to"
    shares = recipe.shares()
    assert shares["dclm"] == pytest.approx(0.3 / 1.00565) and shares["fw2-vie"] == pytest.approx(0.00005 / 1.00565)
    # Sums over the authors' file.
    sums = {"fw2-": 0.12405, "stack-edu-": 0.2117}
    for beginning, expected in sums.items():
        found = math.fsum(weight for name, weight in weights.items() if name.startswith(beginning))
        assert found == pytest.approx(expected, abs=1e-12), beginning


def test_dolmino_has_the_sizes_of_the_authors_files():
    recipe = load_recipe(RECIPES / "dolmino-mix-1124.yaml")
    weights = {source.name: source.weight for source in recipe.sources}
    assert (weights["dclm"], weights["flan"], weights["mathcoder2-synthmath"]) == (24.31, 8.54, 3.09 + 0.78258)
    assert recipe.shares()["dclm"] == pytest.approx(24.31 / 51.47204)
    assert {source.hub.name for source in recipe.sources if source.hub} == {"allenai/dolmino-mix-1124"}
    assert all(source.hub and source.hub.files == source.files for source in recipe.sources)


def recipe_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_what_a_recipe_may_say(tmp_path):
    text = """
sources:
- {name: plain, weight: 5e-5}
- {name: listed, weight: 2, files: [a/b/, c/*.jsonl], text_key: content}
- name: both
  weight: 0.5
  hub: {name: owner/data.set, files: [x, y/*], revision: v1/2}
  template: "{q} {a}"
"""
    plain, listed, both = load_recipe(recipe_of(tmp_path, text)).sources
    assert (plain.weight, plain.files, plain.text_key, plain.hub) == (5e-5, ("plain",), "text", None)
    assert (listed.files, listed.text_key) == (("a/b", "c/*.jsonl"), "content")
    assert both.hub == HubPlace("owner/data.set", ("x", "y/*"), "v1/2") and both.template == "{q} {a}"
    shares = load_recipe(tmp_path / "recipe.yaml").shares(["plain", "both"])
    assert shares == pytest.approx({"plain": 5e-5 / 0.50005, "both": 0.5 / 0.50005})


WRONG = {
    "": "no sources; expected `sources:` with a list of them",
    "sources: []": "no sources",
    "sources: [1": "expected a recipe",
    "tokenizer: x\nsources: [{name: a, weight: 1}]": "tokenizer: found an unknown key; expected one of sources",
    "sources: [a]": "sources[0]: found 'a'; expected a mapping with name, weight",
    "sources: [{name: a, wieght: 1}]": "wieght: found an unknown key; expected one of name, weight, files, hub, "
    "text_key, template; did you mean weight?",
    "sources: [{weight: 1}]": "sources[0].name: found nothing",
    "sources: [{name: a/b, weight: 1}]": "sources[0].name: found 'a/b'",
    "sources: [{name: blend, weight: 1}]": "sources[0].name: found 'blend'",
    "sources: [{name: a}]": "sources[0] (a).weight: found nothing; expected a number above 0",
    "sources: [{name: a, weight: 0}]": "weight: found 0; expected a number above 0",
    "sources: [{name: a, weight: -1.5}]": "weight: found -1.5; expected a number above 0",
    "sources: [{name: a, weight: .inf}]": "weight: found inf; expected a number above 0",
    "sources: [{name: a, weight: 1.0e308}]": "weight: found 1e+308; expected a number above 0 (1e-50 to 1e+50)",
    "sources: [{name: a, weight: 1, text_key: q, template: '{q} {a}'}]": "text_key: found one beside a template",
    "sources: [{name: a.yaml, weight: 1}]": "sources[0].name: found 'a.yaml'",
    "sources: [{name: a, weight: .nan}]": "weight: found nan; expected a number above 0",
    "sources: [{name: a, weight: true}]": "weight: found True; expected a number above 0",
    "sources: [{name: a, weight: much}]": "weight: found 'much'; expected a number above 0",
    "sources: [{name: a, weight: 1}, {name: b, weight: 1}, {name: a, weight: 2}]": "sources[2].name: found a, the name "
    "of another source; expected a name of its own for each source",
    "sources: [{name: a, weight: 1, files: []}]": "files: found []",
    "sources: [{name: a, weight: 1, files: /data/a}]": "files: found /data/a; expected places relative to --root",
    "sources: [{name: a, weight: 1, hub: owner/name}]": "hub: found 'owner/name'; expected a mapping with name, files",
    "sources: [{name: a, weight: 1, hub: {name: name}}]": "hub.name: found 'name'; expected owner/name",
    "sources: [{name: a, weight: 1, hub: {name: o/n, split: train}}]": "hub.split: found an unknown key",
    "sources: [{name: a, weight: 1, hub: {name: o/n, revision: 1}}]": "hub.revision: found 1",
    "sources: [{name: a, weight: 1, text_key: 3}]": "text_key: found 3; expected a text",
    "sources: [{name: a, weight: 1, template: no field}]": "template: found 'no field'",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_recipes_are_one_clear_line(tmp_path, text):
    message = refused(load_recipe, recipe_of(tmp_path, text))
    assert WRONG[text] in message and "recipe.yaml" in message


def test_a_recipe_that_is_not_there(tmp_path):
    assert refused(load_recipe, tmp_path / "none.yaml").startswith("RECIPE: found")


# Blend files.


def test_blend_file_round_trip(tmp_path):
    entries = [(0.7, "web"), (4.97e-05, "rare")]
    write_blend_file(tmp_path / "blend.yaml", entries, comment="one\ntwo")
    assert (tmp_path / "blend.yaml").read_text().startswith("# one\n# two\nblend:\n")
    total = 0.7 + 4.97e-05
    read = read_blend_file(tmp_path / "blend.yaml")
    assert read == [(0.7 / total, str(tmp_path / "web")), (4.97e-05 / total, str(tmp_path / "rare"))]


WRONG_BLENDS = {
    "blend: [1": "blend.yaml:2: found",
    "train: [[1, a]]": "found the keys train",
    "blend: [[1, a]]\nseed: 1": "found the keys blend, seed",
    "- [1, a]": "found list",
    "blend: []": "found the keys blend",
    "blend: [a]": "blend[0]: found 'a'; expected [weight, prefix] with a weight above 0",
    "blend: [[1, a], [0, b]]": "blend[1]: found [0, 'b']",
    "blend: [[1, other.yaml]]": "blend[0]: found [1, 'other.yaml']",
}


@pytest.mark.parametrize("text", WRONG_BLENDS)
def test_wrong_blend_files(tmp_path, text):
    (tmp_path / "blend.yaml").write_text(text)
    assert WRONG_BLENDS[text] in refused(read_blend_file, tmp_path / "blend.yaml")


def test_a_run_takes_a_blend_file(tmp_path):
    write_blend_file(tmp_path / "blend.yaml", [(3.0, "web"), (1.0, "math")])
    run = tmp_path / "run.yaml"
    run.write_text("model: tiny_llama\ndata: {tokenizer: tok}\nrun_dir: runs/x\n")
    web, math_ = str(tmp_path / "web"), str(tmp_path / "math")
    config = load_config(run, [f"data.train={tmp_path}/blend.yaml"])
    assert config.data.train == [[0.75, web], [0.25, math_]], "the run's own configuration says what it is trained on"
    assert parse_blend(str(tmp_path / "blend.yaml")) == parse_blend(config.data.train)

    config = load_config(run, [f"data.train=[[6, {tmp_path}/blend.yaml], [2, own]]"])
    assert config.data.train == [[4.5, web], [1.5, math_], [2.0, "own"]]
    message = refused(load_config, run, [f"data.train=[{tmp_path}/blend.yaml, own]"])
    assert message.startswith("data.train[0]: found") and "without a weight" in message

    # Where it is not, a dry run can go on; opening the data cannot.
    config = load_config(run, [f"data.train={tmp_path}/none.yaml"])
    assert config.data.train == [f"{tmp_path}/none.yaml"]
    assert refused(parse_blend, config.data.train).startswith(
        f"data.train[0]: found {tmp_path}/none.yaml (No such file"
    )
