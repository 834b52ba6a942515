"""Analyses of models against a direct computation by transformers, in float32, to 1e-4; what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
import transformers

from remit_megatron.analysis import measure, models
from remit_megatron.cli import main
from tests.tiny import make_llama
from tests.unit.analysis.conftest import TEXTS

TOLERANCE = 1e-4


def direct(directory, text: str) -> tuple[list[int], torch.Tensor]:
    """Token ids of a text and the [s - 1, V] log-probabilities of all but the first, by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return ids, torch.log_softmax(logits.double(), -1)


def of_labels(ids: list[int], logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of seven positions: the seams between blocks are in every test."""
    monkeypatch.setattr(models, "_BLOCK_BYTES", 4 * 51 * 7)


def test_heatmap_equals_transformers(tiny, tmp_path):
    words = ["analyze", "heatmap", "--student", tiny["student"], "--reference", tiny["reference"]]
    assert main([str(w) for w in [*words, "--input", tiny["texts"], "--output", tmp_path]]) == 0
    lines = [json.loads(line) for line in (tmp_path / "heatmap.jsonl").read_text().splitlines()]
    texts = [text for text in TEXTS if len(text) > 1]
    assert len(lines) == len(texts)
    bits = size = 0.0
    for line, text in zip(lines, texts, strict=True):
        ids, student = direct(tiny["student"], text)
        _, reference = direct(tiny["reference"], text)
        expected = of_labels(ids, reference) - of_labels(ids, student)
        assert line["tokens"] == list(text) and line["token_ids"] == ids  # the tokenizer has an entry a character
        assert len(line["delta"]) == len(ids) and line["delta"][0] is None
        torch.testing.assert_close(
            torch.tensor(line["delta"][1:], dtype=torch.double), expected, rtol=0, atol=TOLERANCE
        )
        assert expected.abs().max() > 0.5  # the models do differ
        # Eq. 4 and 5, by their own words.
        weight = (2 * torch.sigmoid(expected - expected.mean())).clamp(0.8, 1.2)
        torch.testing.assert_close(torch.tensor(line["weight"][1:], dtype=torch.double), weight, rtol=0, atol=TOLERANCE)
        bits -= float(of_labels(ids, student).sum()) / math.log(2)
        size += len(text.encode()) - 1
    summary = json.loads((tmp_path / "heatmap.json").read_text())
    assert summary["student_bits_per_byte"] == pytest.approx(bits / size, abs=TOLERANCE)
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    # The page shows every text whole and says every number.
    page = (tmp_path / "heatmap.html").read_text()
    shown = re.findall(r'<div class="text">(.*?)</div>', page, re.DOTALL)
    assert [re.sub(r"<[^>]+>", "", text) for text in shown] == texts
    assert page.count('title="Δ') == sum(len(text) - 1 for text in texts)
    assert f'title="Δ{lines[0]["delta"][1]:+.3f} ' in page


def test_kl_equals_transformers(tiny, tmp_path):
    words = ["analyze", "kl", "--student", tiny["student"], tiny["later"], "--reference", tiny["reference"]]
    assert main([str(w) for w in [*words, "--input", tiny["texts"], "--output", tmp_path]]) == 0
    data = json.loads((tmp_path / "kl.json").read_text())
    assert [model["model"] for model in data["models"]] == ["student", "later"]
    for model in data["models"]:
        forward, backward, bits, size = [], [], 0.0, 0
        for text in [text for text in TEXTS if len(text) > 1]:
            ids, p = direct(tiny[model["model"]], text)
            _, q = direct(tiny["reference"], text)
            forward.append((q.exp() * (q - p)).sum(1))
            backward.append((p.exp() * (p - q)).sum(1))
            bits -= float(of_labels(ids, p).sum()) / math.log(2)
            size += len(text.encode()) - 1
        for name, values in (("kl_reference_model", forward), ("kl_model_reference", backward)):
            assert model[name]["value"] == pytest.approx(float(torch.cat(values).mean()), abs=TOLERANCE)
            assert model[name]["value"] > 0.1
        assert model["sums_by_text"]["kl_to_model"] == pytest.approx([float(v.sum()) for v in forward], rel=1e-5)
        assert model["bits_per_byte"] == pytest.approx(bits / size, abs=TOLERANCE)
    for name in ("kl.png", "kl.part.json"):
        assert (tmp_path / name).stat().st_size


def test_shift_counts_ranks(tiny, tmp_path):
    words = ["analyze", "shift", "--models", tiny["student"], tiny["later"], "--reference", tiny["reference"]]
    assert main([str(w) for w in [*words, "--input", tiny["texts"], "--output", tmp_path]]) == 0
    pairs = {(p["model"], p["other"]): p for p in json.loads((tmp_path / "shift.json").read_text())["pairs"]}
    assert set(pairs) == {("student", "reference"), ("later", "student"), ("later", "reference")}
    for (model, other), found in pairs.items():
        ranks, variation = [], []
        for text in [text for text in TEXTS if len(text) > 1]:
            _, p = direct(tiny[model], text)
            _, q = direct(tiny[other], text)
            order = p.argsort(dim=1, descending=True)
            ranks.append(1 + (order == q.argmax(1, keepdim=True)).int().argmax(1))
            variation.append((p.exp() - q.exp()).abs().sum(1) / 2)
        rank = torch.cat(ranks)
        means = {name: mean["value"] for name, mean in found["means"].items()}
        assert means["unshifted"] == pytest.approx(float((rank == 1).double().mean()))
        assert means["marginal"] == pytest.approx(float(((rank == 2) | (rank == 3)).double().mean()))
        assert means["unshifted"] + means["marginal"] + means["shifted"] == pytest.approx(1)
        assert means["total_variation"] == pytest.approx(float(torch.cat(variation).mean()), abs=TOLERANCE)


def test_a_model_is_not_shifted_from_itself(tiny, tmp_path):
    words = ["analyze", "shift", "--models", tiny["student"], "--reference", tiny["student"]]
    assert main([str(w) for w in [*words, "--input", tiny["texts"], "--output", tmp_path]]) == 0
    means = json.loads((tmp_path / "shift.json").read_text())["pairs"][0]["means"]
    assert means["unshifted"]["value"] == 1
    assert means["kl_to_model"]["value"] == 0 and means["total_variation"]["value"] == 0


def test_weights_by_class_and_token(tiny, tmp_path):
    words = ["analyze", "weights", "--student", tiny["student"], tiny["later"], "--reference", tiny["reference"]]
    words += ["--epsilon", "0.3", "--min-count", "3"]
    assert main([str(w) for w in [*words, "--input", tiny["texts"], "--output", tmp_path]]) == 0
    data = json.loads((tmp_path / "weights.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "weights.jsonl").read_text().splitlines()]
    by_class: dict[str, list[float]] = {}
    by_token: dict[str, list[float]] = {}
    for text, line in zip([text for text in TEXTS if len(text) > 1], lines, strict=True):
        ids, p = direct(tiny["student"], text)
        _, q = direct(tiny["reference"], text)
        delta = of_labels(ids, q) - of_labels(ids, p)
        expected = (2 * torch.sigmoid(delta - delta.mean())).clamp(0.7, 1.3).tolist()
        assert line["weights"][0][0] is None
        assert line["weights"][0][1:] == pytest.approx(expected, abs=TOLERANCE)
        for character, weight in zip(text[1:], expected, strict=True):
            kind = "digits" if character.isdigit() else "space" if character == " " else None
            if kind:
                by_class.setdefault(kind, []).append(weight)
            by_token.setdefault(character, []).append(weight)
    first = data["models"][0]
    for kind, values in by_class.items():
        assert first["by_class"][kind]["value"] == pytest.approx(sum(values) / len(values), abs=TOLERANCE)
        assert first["by_class"][kind]["tokens"] == len(values)
    means = {token: sum(v) / len(v) for token, v in by_token.items() if len(v) >= 3}
    assert {row["token"]: row["weight"] for row in first["by_token"]} == pytest.approx(means, abs=TOLERANCE)
    listed = [row["weight"] for row in first["by_token"]]
    assert listed == sorted(listed, reverse=True)
    assert data["correlation_with_first"][0] == pytest.approx(1) and data["correlation_with_first"][1] < 0.99


def test_the_interval_is_over_texts():
    """Against the same number by its definition; and it covers, where tokens of a text go together."""
    mean = measure.mean_over_tokens([2.0, 9.0, 4.0], [2, 3, 4])
    values = [2 - 2 * 15 / 9, 9 - 3 * 15 / 9, 4 - 4 * 15 / 9]
    half = measure.Z_95 * math.sqrt(3 / 2 * sum(v * v for v in values)) / 9
    assert (mean.value, mean.half) == (pytest.approx(15 / 9), pytest.approx(half))
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1000):
        level = torch.randn(60, 1, generator=generator)
        tokens = level + 0.3 * torch.randn(60, 20, generator=generator)
        found = measure.mean_over_tokens(tokens.sum(1).tolist(), [20] * 60)
        covered += found.low <= 0 <= found.high
    assert 930 <= covered <= 970


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--reference": "other"}, "tokenizer: found other tokens in other than in student"),
        ({"--student": "nothing"}, "--student: found no directory"),
        ({"--student": "broken"}, "--student: found "),
        ({"--input": "nothing"}, "--input: found no file"),
        ({"--max-texts": "0"}, "--max-texts: found 0"),
        ({"--epsilon": "2"}, "--epsilon: found 2"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, capsys, changes, said):
    shutil.copytree(tiny["student"], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing of the kind")
    options = {"--student": "student", "--reference": "reference", "--input": "texts"} | changes
    words = ["analyze", "heatmap", "--output", str(tmp_path / "out")]
    for option, value in options.items():
        named = option in {"--student", "--reference", "--input"}
        words += [option, str(tiny.get(value, tmp_path / value)) if named else value]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + said) and error.count("\n") == 1, error
    assert not (tmp_path / "out" / "heatmap.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: found no JSON"),
        ('{"text": 3}', "line 2: found text 3"),
        ("[]", "line 2: found list"),
        ('{"text": "half a pair \\ud83d"}', "line 2: found no JSON"),
        ('{"text": ' + "[" * 100_000, "line 2: found no JSON (nested too deeply)"),
        ('{"text": "a", "text": "b"}', "line 2: found no JSON (text 2 times, with different values)"),
        (json.dumps({"text": "a" * 130}), "line 2: found 130 tokens; expected at most 128"),
    ],
)
def test_bad_lines_are_named(tiny, tmp_path, capsys, line, said):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    words = ["analyze", "kl", "--student", tiny["student"], "--reference", tiny["reference"]]
    words += ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["heatmap", "kl"])
def test_a_model_without_numbers_or_weights_is_refused(tiny, tmp_path, capsys, name):
    """A NaN would be a hole in the figures, and what is missing transformers draws at random."""
    from safetensors.torch import load_file, save_file

    cases = {"nan": "model.norm.weight", "one": "model.embed_tokens.weight"}
    for directory, change in (cases | {"missing": "model.layers.1.mlp.up_proj.weight"}).items():
        shutil.copytree(tiny["reference"], tmp_path / directory)
        file = tmp_path / directory / "model.safetensors"
        weights = load_file(file)
        if directory != "missing":
            weights[change][-1] = torch.nan  # of the matrix, the row of one letter
        else:
            del weights[change]
        save_file(weights, file, metadata={"format": "pt"})
        words = ["analyze", name, "--student", tiny["student"], "--reference", tmp_path / directory]
        words += ["--input", tiny["texts"], "--output", tmp_path / "out"]
        assert main([str(word) for word in words]) == 2
        said = {"missing": f"found no {change}"}.get(directory, "which gives numbers that are not finite")
        error = capsys.readouterr().err
        assert error.startswith("error: --reference: found ") and said in error and error.count("\n") == 1, error


def test_dropout_saved_in_a_tokenizer_is_off(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.5)
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = models.TextTokenizer(tmp_path, field="tokenizer")
    assert {tuple(tokenizer.tokenize(1, "ab" * 20).ids) for _ in range(50)} == {(2,) * 20}


def test_max_tokens_cuts(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a" * 130}) + "\n")
    words = ["analyze", "heatmap", "--student", tiny["student"], "--reference", tiny["reference"], "--max-tokens", 20]
    words += ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    assert len(json.loads((tmp_path / "out" / "heatmap.jsonl").read_text())["delta"]) == 20


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    """Its logits are not the output layer of the hidden states: our numbers would not be the model's."""
    from tests.tiny import make_model, make_tokenizer

    values = dict(
        model_type="gemma2",
        vocab_size=51,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
    )
    directory = make_model(tmp_path / "model", values, seed=0, tokenizer=make_tokenizer(tmp_path / "tokenizer"))
    (source,) = models.open_sources([("--student", str(directory))])
    with pytest.raises(models.UserError, match="--student: found Gemma2ForCausalLM"):
        models.TextModel(source, field="--student")


def test_vocabularies_of_other_sizes_are_refused(tiny, tmp_path):
    wide = make_llama(tmp_path / "wide", seed=5, vocab_size=64, tokenizer=tiny["student"].parent / "tokenizer")
    sources = models.open_sources([("a", str(tiny["student"])), ("b", str(wide))])
    first, second = (models.TextModel(source, field="m") for source in sources)
    with pytest.raises(models.UserError, match="51 in student, 64 in wide"):
        models.require_same_vocabulary(first, second)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "auto"},  # of the kinds of error that transformers raises for these, two are its own
        {"text_config": {"a": 1}},
        {"hidden_size": "48"},
        {"layer_types": ["x"]},
        {"hidden_act": "nothing"},
        {"_attn_implementation": "flash_attention_2"},
        {"model_type": "unheard", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_transformers_does_not_load_is_one_line(tiny, tmp_path, capsys, monkeypatch, changes):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether code of the directory may run"))
    shutil.copytree(tiny["student"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | changes))
    words = ["analyze", "kl", "--student", tmp_path / "model", "--reference", tiny["reference"]]
    assert main([str(w) for w in [*words, "--input", tiny["texts"], "--output", tmp_path / "out"]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and ("which transformers cannot load" in error or "does not load" in error)


def test_an_adapter_is_refused(tiny, tmp_path, capsys):
    """Here peft is installed: the figures would be those of another model than Megatron would be given."""
    shutil.copytree(tiny["student"], tmp_path / "student")
    (tmp_path / "student" / "adapter_config.json").write_text("{}")
    words = ["analyze", "kl", "--student", tmp_path / "student", "--reference", tiny["reference"]]
    assert main([str(word) for word in [*words, "--input", tiny["texts"], "--output", tmp_path / "out"]]) == 2
    assert "adapter_config.json beside the model" in capsys.readouterr().err


def test_tokens_of_every_file_are_counted(tiny, tmp_path, capsys):
    """A token that tokenizer_config.json alone adds is one here too; one that the model has no row for is named."""
    directory = tmp_path / "student"
    shutil.copytree(tiny["student"], directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    added = {"44": {"content": "12+34", "special": True, **flags}, "45": {"content": "<row>", "special": True, **flags}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    words = ["analyze", "heatmap", "--student", directory, "--reference", directory, "--output", tmp_path / "out"]
    assert main([str(word) for word in [*words, "--input", tiny["texts"]]]) == 0
    line = json.loads((tmp_path / "out" / "heatmap.jsonl").read_text().splitlines()[0])
    assert line["token_ids"] == direct(directory, TEXTS[0])[0]
    assert "12+34" in line["tokens"]
    rows = {"vocab_size": max(line["token_ids"])}
    (directory / "config.json").write_text(json.dumps(json.loads((directory / "config.json").read_text()) | rows))
    assert main([str(word) for word in [*words, "--input", tiny["texts"]]]) == 2
    assert f"line 1: found ids up to {rows['vocab_size']}; expected below" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    from remit_megatron.analysis.texts import read_texts

    (tmp_path / "in.jsonl").write_bytes('\ufeff{"text": "one", "text": "one"}\r\n\n{"text": "two"}'.encode())
    assert read_texts(str(tmp_path / "in.jsonl")) == [(1, "one"), (3, "two")]
