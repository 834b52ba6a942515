"""The data of a run: made with its tokenizer, by either digest, and of ids that its model has rows for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from remit_megatron.data.build import build_dataset
from remit_megatron.data.largest_id import check_ids
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.evaluation.requests import Choice, Question, RequestSuite, RequestTask
from remit_megatron.run.configuration import load_config
from remit_megatron.run.dry_run import dry_run
from remit_megatron.run.samples import open_datasets
from remit_megatron.run.score_cache import _note_precision, _tokenizer_digest
from remit_megatron.runtime.errors import UserError
from remit_megatron.scoring.requests import encode_suite
from tests.tiny import make_llama
from tests.unit.data.test_tokenizer import make_tokenizer

ROWS = 270
EXTRA = tuple(f"<extra_{number}>" for number in range(40))


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A model of 270 rows, its tokenizer of 260 entries, one with 40 more, and data of both."""
    root = tmp_path_factory.mktemp("ids")
    make_tokenizer(root / "own")
    make_tokenizer(root / "more", special=("<s>", "<|endoftext|>", *EXTRA))
    make_llama(root / "model", seed=1, tokenizer=root / "own", vocab_size=ROWS, eos_token_id=259)
    texts = {"plain": "the thing " * 30, "few": f"the {EXTRA[9]} thing " * 30, "many": f"the {EXTRA[39]} thing " * 30}
    for name, text in texts.items():
        (root / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
        build_dataset([str(root / f"{name}.jsonl")], str(root / "more"), str(root / name))
    return root


def test_the_data_decides(material, tmp_path):
    largest = {name: read_manifest(material / name).largest_id for name in ("plain", "few", "many")}
    assert largest == {"plain": 259, "few": 269, "many": 299}
    for _ in range(2):  # with the manifest's word; and without, read once and then kept
        check_ids(material / "plain", ROWS, field="data.train")
        check_ids(material / "few", ROWS, field="data.train")
        with pytest.raises(UserError, match=r"data\.valid .*many: found ids up to 299; expected below 270"):
            check_ids(material / "many", ROWS, field="data.valid")
        for name in largest:
            if not (material / f"{name}.ids.json").exists():
                content = json.loads((material / f"{name}.json").read_text())
                content.pop("largest_id")
                (material / f"{name}.json").write_text(json.dumps(content))
    assert json.loads((material / "many.ids.json").read_text())["largest_id"] == 299
    (material / "many.ids.json").write_text(json.dumps({"bin": "of other data", "largest_id": 3}))
    with pytest.raises(UserError, match="ids up to 299"):
        check_ids(material / "many", ROWS, field="data.valid")


def configuration(material: Path, tmp_path: Path, train: str, valid: str | None = None) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"init: {material / 'model'}\n"
        "objective: {name: ntp}\n"
        f"data: {{train: [{material / train}], valid: [{material / valid if valid else ''}]}}\n"
        f"run_dir: {tmp_path / 'run'}\n"
        "megatron: {train_iters: 1, micro_batch_size: 1, global_batch_size: 1, seq_length: 8, lr: 1.0e-3, "
        "min_lr: 0.0, eval_iters: 1, eval_interval: 1}\n"
    )
    return load_config(path, [] if valid else ["data.valid=[]"])


@pytest.mark.parametrize(("train", "valid", "field"), [("many", None, "data.train"), ("plain", "many", "data.valid")])
def test_ids_without_a_row_are_refused_before_the_start(material, tmp_path, train, valid, field):
    config = configuration(material, tmp_path, train, valid)
    prepared = SimpleNamespace(
        config=config,
        hf_config={"vocab_size": ROWS},
        tokenizer=load_tokenizer(material / "own"),
        arguments=SimpleNamespace(seq_length=8, eval_iters=1, eval_global_batch_size=1),
    )
    for check in (lambda: dry_run(config), lambda: open_datasets(prepared, 1)):  # pyright: ignore[reportArgumentType]
        with pytest.raises(UserError) as refused:
            check()
        assert str(refused.value).startswith(f"{field} {material / 'many'}: found ids up to 299; expected below 270")
    good = configuration(material, tmp_path, "plain", "few")
    assert "data" in dry_run(good)
    prepared.config = good
    train_data, _ = open_datasets(prepared, 1)  # pyright: ignore[reportArgumentType]
    assert len(train_data) == 1


def test_a_suite_of_ids_without_a_row_is_refused(material):
    """What a run would only meet between two steps, or before its first."""
    tokenizer = load_tokenizer(material / "more")
    for number, right in ((9, True), (39, False)):
        choices = (Choice("the", f" {EXTRA[number]}"), Choice("the", " thing"))
        suite = RequestSuite("own", (RequestTask("a/b", "acc", None, (Question(0, choices, 1),), ""),))
        if right:
            assert len(encode_suite(suite, tokenizer, sequence_length=64, vocab_size=ROWS).requests) == 2
            continue
        with pytest.raises(UserError, match=r"a/b: ' <extra_39>': found ids up to 299; expected below 270"):
            encode_suite(suite, tokenizer, sequence_length=64, vocab_size=ROWS)


def test_data_of_the_former_digest_is_the_run_s(material, tmp_path):
    config = configuration(material, tmp_path, "plain")
    tokenizer = load_tokenizer(material / "own")
    content = json.loads((material / "plain.json").read_text())
    assert content["tokenizer_digest"] == tokenizer.digest
    arguments = SimpleNamespace(seq_length=8, eval_iters=1, eval_global_batch_size=1)
    prepared = SimpleNamespace(config=config, hf_config={"vocab_size": ROWS}, tokenizer=tokenizer, arguments=arguments)
    try:
        for digest, right in ((tokenizer.digests[1], True), ("0" * 64, False)):
            (material / "plain.json").write_text(json.dumps(content | {"tokenizer_digest": digest}))
            if right:
                train, _ = open_datasets(prepared, 1)  # pyright: ignore[reportArgumentType]
                assert _tokenizer_digest(tokenizer.digests, train, tmp_path / "none.json") == digest
            else:
                with pytest.raises(UserError, match="data of the tokenizer with digest 0000"):
                    open_datasets(prepared, 1)  # pyright: ignore[reportArgumentType]
    finally:
        (material / "plain.json").write_text(json.dumps(content))


def test_a_score_cache_keeps_the_digest_that_it_was_made_with(tmp_path):
    from remit_megatron.reference.cache import ReferenceCache
    from remit_megatron.reference.cache_format import CacheIdentity

    digests = ("a" * 64, "b" * 64)

    def blend(*found: str) -> Any:
        return SimpleNamespace(
            datasets=[SimpleNamespace(manifest=SimpleNamespace(tokenizer_digest=digest)) for digest in found]
        )

    path = tmp_path / "cache" / "manifest.json"
    assert _tokenizer_digest(digests, blend("b" * 64, "b" * 64), path) == "b" * 64
    assert _tokenizer_digest(digests, blend("a" * 64, "b" * 64), path) == "a" * 64
    identity = CacheIdentity(
        reference="c" * 64, tokenizer="b" * 64, sequence_length=8, packing_seed=0, document_mask=False, eod_id=0
    )
    ReferenceCache.open(tmp_path / "cache", identity=identity, create=True)
    assert _tokenizer_digest(digests, blend("a" * 64), path) == "b" * 64
    assert _tokenizer_digest(("a" * 64, "d" * 64), blend("a" * 64), path) == "a" * 64, "another tokenizer's cache"


def test_logprobs_of_texts_without_a_row_are_refused(material, tmp_path):
    from remit_megatron.scoring.logprobs import _refuse_unknown_ids

    tokenizer = load_tokenizer(material / "more")
    path = tmp_path / "texts.jsonl"
    texts = ["the", f"the {EXTRA[9]}", f"the {EXTRA[10]} {EXTRA[39]} the"]
    for count, refused in ((2, False), (3, True)):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:count]))
        if refused:
            with pytest.raises(UserError, match=r"texts\.jsonl:3: found ids up to 299; expected below 270"):
                _refuse_unknown_ids(tokenizer, path, ROWS)
        else:
            _refuse_unknown_ids(tokenizer, path, ROWS)


def test_scores_of_another_precision_are_said(tmp_path, caplog):
    _note_precision(tmp_path, "float32", made=False)  # a cache of an earlier version says nothing
    assert list(tmp_path.iterdir()) == []
    _note_precision(tmp_path, "float32", made=True)
    _note_precision(tmp_path, "float32", made=False)
    assert caplog.messages == []
    _note_precision(tmp_path, "bfloat16", made=False)
    assert "were computed in float32, and this job computes in bfloat16" in caplog.messages[0]
