"""Two models through Megatron on several layouts: heatmap, divergence over the vocabulary and bits per byte, against a
direct computation by transformers in float32, to 1e-4."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from remit_megatron import cli
from tests.distributed.scoring.test_logprobs import refused, run_logprobs
from tests.tiny import make_llama, make_tokenizer

TOLERANCE = 1e-4
TEXTS = ["the sum 12+34=46, so that 46-34=12.", "a", "because 7+8=15, therefore 15 is due?", "abc def 0123 " * 6]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, Path]:
    """Two models of 53 tokens, which no number of ranks divides, and of different depth; texts."""
    root = tmp_path_factory.mktemp("pairs")
    tokenizer = make_tokenizer(root / "tokenizer")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    changes = {"student": {}, "reference": {"num_hidden_layers": 2, "tie_word_embeddings": False}}
    models = {
        name: make_llama(root / name, seed=seed, tokenizer=tokenizer, vocab_size=53, **values)
        for seed, (name, values) in enumerate(changes.items())
    }
    return {"root": root, "texts": root / "texts.jsonl", **models}


@pytest.fixture(scope="module")
def expected(material) -> list[dict[str, torch.Tensor]]:
    """Of each text of two tokens or more, by transformers: log-probabilities and the divergence both ways."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(material["student"])
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(material[name], dtype=torch.float32)
        for name in ("student", "reference")
    ]
    found = []
    for text in (text for text in TEXTS if len(text) > 1):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in models)
        labels = ids[0, 1:, None]
        values = {"logprobs": p.gather(1, labels)[:, 0], "reference_logprobs": q.gather(1, labels)[:, 0]}
        found.append(values | {"kl": (q.exp() * (q - p)).sum(1), "back": (p.exp() * (p - q)).sum(1)})
    assert min(float(values["kl"].max()) for values in found) > 0.5  # they do differ
    return found


@pytest.mark.parametrize(("ranks", "tp", "pp"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_scores_of_two_models_equal_transformers(pool, material, expected, ranks, tp, pp):
    output = material["root"] / f"scores_{tp}_{pp}.jsonl"
    words = ["--hf", str(material["student"]), "--reference", str(material["reference"])]
    words += ["--input", str(material["texts"]), "--output", str(output), "--batch-tokens", "64"]
    pool.run(run_logprobs, world_size=ranks, words=[*words, "--nproc", str(ranks), "--tp", str(tp), "--pp", str(pp)])
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == len(TEXTS) and records[1]["kl"] == [None]
    for record, wanted in zip((r for r in records if len(r["token_ids"]) > 1), expected, strict=True):
        for name in ("logprobs", "reference_logprobs", "kl"):
            assert record[name][0] is None
            torch.testing.assert_close(
                torch.tensor(record[name][1:], dtype=torch.double), wanted[name], rtol=0, atol=TOLERANCE
            )


def test_a_reference_of_another_vocabulary(pool, material, tmp_path):
    other = make_llama(tmp_path / "other", seed=2, tokenizer=material["root"] / "tokenizer", vocab_size=60)
    words = ["--hf", str(material["student"]), "--reference", str(other), "--input", str(material["texts"])]
    (message,) = pool.run(refused, world_size=1, words=[*words, "--output", str(tmp_path / "out.jsonl")])
    assert message.startswith("--reference: found a vocabulary of 60; expected 53")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.fixture
def analyze(material, tmp_path, monkeypatch):
    """`remit analyze`, which starts its own ranks: the folder that it has written."""
    monkeypatch.delenv("RANK", raising=False)
    words = ["--student", material["student"], "--reference", material["reference"], "--input", material["texts"]]

    def run(name: str, *layout: str):
        assert cli.main(["analyze", name, *map(str, words), "--output", str(tmp_path / name), *layout]) == 0
        return tmp_path / name

    return run


@pytest.mark.slow
def test_a_heatmap_on_ranks_equals_transformers(analyze, expected):
    lines = [json.loads(line) for line in (analyze("heatmap", "--tp", "2") / "heatmap.jsonl").read_text().splitlines()]
    for line, wanted in zip(lines, expected, strict=True):
        delta = wanted["reference_logprobs"] - wanted["logprobs"]
        torch.testing.assert_close(torch.tensor(line["delta"][1:], dtype=torch.double), delta, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_divergences_on_ranks_equal_transformers(analyze, expected):
    (found,) = json.loads((analyze("kl", "--pp", "2") / "kl.json").read_text())["models"]
    for name, column in (("kl_reference_model", "kl"), ("kl_model_reference", "back")):
        mean = float(torch.cat([values[column] for values in expected]).mean())
        assert found[name]["value"] == pytest.approx(mean, abs=TOLERANCE)
    total = sum(float(values["logprobs"].sum()) for values in expected)
    size = sum(len(text.encode()) - 1 for text in TEXTS if len(text) > 1)
    assert found["bits_per_byte"] == pytest.approx(-total / math.log(2) / size, abs=TOLERANCE)
    assert "total_variation" not in found["means"]


def test_layouts_that_cannot_be(material, tmp_path, capsys):
    words = ["--student", material["student"], "--reference", material["reference"], "--input", material["texts"]]
    for more, said in ((["--tp", "0"], "--tp: found 0"), (["--tp", "2", "--nproc", "3"], "--nproc: found 3")):
        assert cli.main(["analyze", "kl", *map(str, words), "--output", str(tmp_path), *more]) == 2
        assert said in capsys.readouterr().err
