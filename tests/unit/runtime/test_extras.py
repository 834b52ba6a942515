"""A command whose optional packages are not installed says so in one line, before any work."""

from __future__ import annotations

import json
import sys

import pytest

from remit_megatron.cli import main
from remit_megatron.posttrain.verifiers import CHECKS

SFT = {"model": "no/such/model", "run_dir": "run", "data": {"train": ["some.jsonl"]}}
ANALYZE = ["--student", "a", "--reference", "b", "--input", "c.jsonl", "--output", "out"]


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [
        ("trl", ["posttrain", "sft", "sft.yaml", "--dry-run"], "posttrain"),
        ("trl", ["posttrain", "sft", "sft.yaml", "--nproc", "2"], "posttrain"),
        ("trl", ["quickstart", "--output", "out"], "posttrain"),
        ("lm_eval", ["evaluate", ".", "--suite", "easy", "--output", "out"], "evaluate"),
        ("scipy", ["evaluate", ".", "--suite", "easy", "--output", "out"], "evaluate"),
        ("scipy", ["evaluate", "compare", "a", "b"], "evaluate"),
        ("statsmodels", ["evaluate", "compare", "a", "b"], "evaluate"),
        ("scipy", ["check", "reference", "run.yaml"], "evaluate"),
        ("matplotlib", ["analyze", "heatmap", *ANALYZE], "analysis"),
    ],
)
def test_a_missing_package_is_one_line(module, words, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "sft.yaml").write_text(json.dumps(SFT))
    (tmp_path / "run.yaml").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"pip install 'remit-megatron[{extra}]'" in said and said.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_verifier_s_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"no math-verify; expected .*remit-megatron\[posttrain\]"):
        CHECKS["math"]("1/2")
