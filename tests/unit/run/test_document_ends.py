"""Settings that go by the ends of documents are refused for data that does not mark them; and only for that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from remit_megatron.data.build import build_dataset
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.run.configuration import load_config
from remit_megatron.run.dry_run import dry_run
from remit_megatron.run.prepare import prepare
from remit_megatron.run.samples import check_document_ends, open_data, open_datasets
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.parallel import RankEnvironment
from tests.tiny import make_tokenizer, write_documents

ROOT = Path(__file__).resolve().parents[3]
NTP, REMIT = (ROOT / f"configs/runs/olmo2_1b_{name}_paper.yaml" for name in ("ntp", "remit"))
SETTINGS = {
    "data.mask_eod_loss": "data.mask_eod_loss=true",
    "data.document_mask": "data.document_mask=true",
    "objective.centering": "objective.centering=document",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Data sets of the same documents: with ends, without, and with ends that the texts spell out themselves, in all
    documents or in all but one."""
    root = tmp_path_factory.mktemp("ends")
    tokenizer = make_tokenizer(root / "tokenizer")
    source = write_documents(root / "corpus.jsonl", count=300, seed=1)
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    ended = [text + "<|endoftext|>" for text in texts]
    build_dataset([source], tokenizer, root / "with")
    build_dataset([source], tokenizer, root / "without", append_eod=False)
    for name, lines in {"spelled": ended, "all_but_one": [*ended[:150], texts[150], *ended[151:]]}.items():
        (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        build_dataset([root / "texts.jsonl"], tokenizer, root / name, append_eod=False)
    return root


def config_of(path: Path, root: Path, train: str, *words: str):
    given = [f"data.tokenizer={root / 'tokenizer'}", f"data.train=[[1.0,{root / train}]]", f"data.cache_dir={root}"]
    return load_config(path, [*given, "init=null", f"run_dir={root / 'run'}", *words])


def refused(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_dry_run_refuses_what_the_data_cannot_do(root, setting):
    for name, ending in (("without", 0), ("all_but_one", 299)):
        config = config_of(REMIT, root, name, SETTINGS[setting])
        value = "document" if setting == "objective.centering" else "true"
        found = f"{value} with {root / name}, built without end-of-document tokens ({ending} of 300 documents looked at"
        assert refused(lambda config=config: dry_run(config, world_size=1)).startswith(f"{setting}: found {found}")
    for name in ("with", "spelled", "not_here"):
        assert dry_run(config_of(REMIT, root, name, SETTINGS[setting]), world_size=1)


@pytest.mark.parametrize("setting", ["data.mask_eod_loss", "data.document_mask"])
def test_a_run_refuses_it_for_training_and_for_validation(root, setting):
    small = ("megatron.seq_length=64", "megatron.train_iters=1", SETTINGS[setting])

    def opened(train: str, *words: str):
        return open_datasets(prepare(config_of(NTP, root, train, *small, *words), world_size=1), 8)

    assert f"{setting}: found true with {root / 'without'}, " in refused(lambda: opened("without"))
    valid = f"data.valid=[[1.0,{root / 'without'}]]"
    evaluated = ("megatron.eval_iters=1", "megatron.eval_interval=1")
    assert f"{setting}: found true with {root / 'without'}, " in refused(lambda: opened("with", valid, *evaluated))
    for name in ("with", "spelled"):
        train, _ = opened(name)
        # What is masked is what the data marks: the prediction of a document's first token.
        masked = sum(int((sample["loss_mask"] == 0).sum()) for sample in (train[i] for i in range(8)))
        assert masked > 0 if setting == "data.mask_eod_loss" else masked == 0


def test_validation_on_training_data_is_said(root, caplog):
    """By what the data sets hold, not by their names."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(root / f"with{suffix}", root / f"copied{suffix}")
    small = ("megatron.seq_length=64", "megatron.train_iters=1", "megatron.eval_iters=1", "megatron.eval_interval=1")
    said = {}
    for name in ("copied", "without"):
        valid = f"data.valid=[[1.0,{root / name}]]"
        caplog.clear()
        open_data(prepare(config_of(NTP, root, "with", *small, valid), world_size=1), RankEnvironment(), samples=8)
        said[name] = [record.getMessage() for record in caplog.records if "data.valid" in record.getMessage()]
    expected = f"data.valid: {root / 'copied'} is training data, too: its loss says nothing about other text"
    assert said == {"copied": [expected], "without": []}


def test_settings_without_effect_refuse_nothing(root):
    tokenizer = load_tokenizer(root / "tokenizer")
    for path, words in ((NTP, ["objective.centering=document"]), (REMIT, []), (REMIT, ["objective.centering=none"])):
        check_document_ends(config_of(path, root, "without", *words), [str(root / "without")], tokenizer)


def test_another_end_of_document(root, tmp_path):
    """The same ids under a tokenizer whose end of text is another entry."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    changed = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"eos_token": "<|unknown|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(changed))
    assert read_manifest(root / "with").eod_id == 0 and load_tokenizer(tokenizer).eod_id == 1
    config = config_of(REMIT, root, "with", f"data.tokenizer={tokenizer}", "data.document_mask=true")
    found = f"true with {root / 'with'}, whose documents end in token 0, not in 1"
    assert refused(lambda: dry_run(config, world_size=1)).startswith(f"data.document_mask: found {found}")


def test_a_dry_run_refuses_data_without_a_sample(root, tmp_path):
    build_dataset([write_documents(tmp_path / "one.jsonl", count=1, seed=1)], root / "tokenizer", root / "short")
    for train, words in (("short", []), ("with", [f"data.valid=[{root / 'short'}]"])):
        config = config_of(NTP, root, train, "megatron.seq_length=64", *words)
        assert "tokens in all; expected at least 65" in refused(lambda config=config: dry_run(config, world_size=1))
    assert dry_run(config_of(NTP, root, "with", "megatron.seq_length=64"), world_size=1)
