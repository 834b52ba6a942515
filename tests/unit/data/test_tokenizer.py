"""The tokenizer wrapper: no added tokens, end-of-document token, identity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from remit_megatron.data.tokenizer import Tokenizer, load_tokenizer
from remit_megatron.runtime.errors import UserError

DOLMA2 = Path(__file__).resolve().parents[3] / "../shared/data/dolma2_tokenizer.json"


def make_tokenizer(
    directory: Path, *, special: tuple[str, ...] = ("<s>", "<|endoftext|>"), truncation: int = 0
) -> Path:
    """A byte-level tokenizer with two merges; ``special`` get the ids behind the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "th", "the"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], len(vocabulary))]
        )
    if truncation:
        backend.enable_truncation(truncation)
        backend.enable_padding(length=truncation)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    return directory


def test_nothing_is_added_cut_or_padded(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, truncation=4))
    texts = ["the thing", "x", "", "Zürich 東京 \U0001f600\r\n"]
    ids = tokenizer.encode_batch(texts)
    assert [len(row) for row in ids] == [6, 1, 0, len(texts[3].encode())]
    assert [tokenizer.decode(row) for row in ids] == texts
    assert tokenizer.vocab_size == 256 + 2 + 2
    assert tokenizer.encode_batch(["a<|endoftext|>"])[0][-1] == tokenizer.eod_id == 259


def test_eod_sources(tmp_path):
    directory = make_tokenizer(tmp_path / "t", special=("<s>", "<|endoftext|>", "<end>", "<stop>"))

    def eod(**files: object) -> int:
        for path in directory.iterdir():
            if path.name != "tokenizer.json":
                path.unlink()
        for name, content in files.items():
            (directory / f"{name}.json").write_text(json.dumps(content))
        return load_tokenizer(directory).eod_id

    assert eod() == 259
    assert eod(tokenizer_config={"eos_token": "<end>"}, config={"eos_token_id": 258}) == 260
    assert eod(tokenizer_config={"eos_token": {"content": "<stop>"}}) == 261
    assert eod(tokenizer_config={"eos_token": None}, generation_config={"eos_token_id": [261, 260]}) == 261
    assert eod(config={"eos_token_id": 260}) == 260
    with pytest.raises(UserError, match=r"tokenizer_config\.json: found eos_token '<gone>'"):
        eod(tokenizer_config={"eos_token": "<gone>"})
    with pytest.raises(UserError, match=r"config\.json: found eos_token_id 999"):
        eod(config={"eos_token_id": 999})
    bare = tmp_path / "bare.json"
    bare.write_text((directory / "tokenizer.json").read_text())
    assert load_tokenizer(bare).eod_id == 259


def test_no_eod_names_what_was_looked_for(tmp_path):
    directory = make_tokenizer(tmp_path, special=())
    (directory / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no eos_token in config\.json and none of <\|endoftext\|>.*--no-eod"):
        _ = load_tokenizer(directory).eod_id


def test_unreadable(tmp_path):
    with pytest.raises(UserError, match=r"--tokenizer: found .*absent, which does not exist"):
        load_tokenizer(tmp_path / "absent", field="--tokenizer")
    with pytest.raises(UserError, match=r"without tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_checkpoint_has_its_tokenizer_in_a_folder(tmp_path):
    directory = make_tokenizer(tmp_path / "hf", special=("<s>", "<end>"))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 259}))
    assert load_tokenizer(tmp_path).path == directory / "tokenizer.json" and load_tokenizer(tmp_path).eod_id == 259
    make_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).path == tmp_path / "tokenizer.json", "its own comes first"


def test_digest_is_of_plain_text(tmp_path):
    """What an instruction-tuned release changes leaves the digest alone; what changes ids of plain text does not."""
    base = load_tokenizer(make_tokenizer(tmp_path / "base")).digest
    chat = make_tokenizer(tmp_path / "chat", special=("<s>", "<|endoftext|>", "<|im_start|>"), truncation=9)
    assert load_tokenizer(chat).digest == base

    def changed(**parts: object) -> str:
        content = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
        for path, value in parts.items():
            *parents, name = path.split("__")
            place = content
            for parent in parents:
                place = place[parent]
            place[name] = value
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(content, indent=3))
        return load_tokenizer(path).digest

    assert changed() == base
    assert changed(model__merges=["t h", "th e"]) == base  # the older spelling of the same merges
    assert changed(model__byte_fallback=None, post_processor=None, decoder=None, added_tokens=[]) == base
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}  # use_regex left out
    for same in (byte_level, byte_level | {"trim_offsets": False, "use_regex": True}):
        assert changed(pre_tokenizer=same) == base
        assert changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [same]}) == base
    assert changed(normalizer={"type": "Sequence", "normalizers": []}) == base
    assert changed(model__continuing_subword_prefix="", model__end_of_word_suffix="", model__dropout=0.0) == base
    different = {
        changed(model__merges=[["t", "h"]]),
        changed(model__ignore_merges=True),
        changed(model__byte_fallback=True),
        changed(model__dropout=0.1),
        changed(model__dropout=0.2),
        changed(model__unk_token="t"),
        changed(model__unk_token="h"),
        changed(model__fuse_unk=True),
        changed(model__end_of_word_suffix="h"),
        changed(normalizer={"type": "NFC"}),
        changed(pre_tokenizer=byte_level | {"add_prefix_space": True}),
        changed(pre_tokenizer=byte_level | {"use_regex": False}),
        changed(model__vocab__th=257, model__vocab__the=256),
    }
    assert len(different | {base}) == 14

    def metaspace(**values: object) -> str:
        return changed(pre_tokenizer={"type": "Metaspace", "replacement": "▁"} | values)

    assert metaspace(add_prefix_space=True) == metaspace(prepend_scheme="always") == metaspace(split=True)
    never = metaspace(prepend_scheme="never")
    assert metaspace(add_prefix_space=False, prepend_scheme="never") == never
    assert len({never, metaspace(), metaspace(split=False), metaspace(prepend_scheme="first")}) == 4


def test_digest_of_the_same_tokenizer_saved_again(tmp_path):
    """As transformers writes it, with another class, and back."""
    import transformers

    first = load_tokenizer(make_tokenizer(tmp_path / "first"))
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "first")
    saved.save_pretrained(tmp_path / "again")
    (tmp_path / "first" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    transformers.AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "gpt2")
    digests = {load_tokenizer(tmp_path / name).digest for name in ("first", "again", "gpt2")}
    assert digests == {first.digest}


def test_words_that_were_added_are_plain_text(tmp_path):
    """`add_tokens` with the words of a field: the ids of its texts are others, and those of a reference without them
    are not."""
    directory = make_tokenizer(tmp_path / "base")
    base = load_tokenizer(directory)

    def added(*contents: str, **flags: bool) -> Tokenizer:
        backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        backend.add_tokens([tokenizers.AddedToken(content, **flags) for content in contents])
        path = tmp_path / "added.json"
        backend.save(str(path))
        return load_tokenizer(path)

    for same in (added("<think>", "[INST]", "|||IP_ADDRESS|||", "<|x|>"), added("<tool>", special=True)):
        assert same.digest == base.digest and same.digests[0] == same.digest
    others = [added("thing"), added("other"), added("thing", "other"), added("other", "thing"), added("   ")]
    others += [added("thing", lstrip=True), added("thing", single_word=True), added("C++"), added("第一")]
    assert others[0].encode_batch(["thing"]) != base.encode_batch(["thing"])
    digests = [tokenizer.digest for tokenizer in others]
    assert len({base.digest, *digests}) == len(others) + 1
    assert added("thing", special=True).digest == digests[0], "how a token is shown changes no id"
    # Data and caches that were made before words counted are still those of this tokenizer.
    assert others[0].digests[:2] == (digests[0], base.digest) and len(others[0].digests) == 3
    assert digests[0] not in base.digests


def test_former_digests_stay_accepted(tmp_path):
    """The number that version 0.1 computed for this very tokenizer."""
    opened = load_tokenizer(make_tokenizer(tmp_path))
    former = "c5c56e7e30f496499dbc87a4db0817773154876b2fb989423b28e96231c3df89"
    assert opened.digests == (opened.digest, former) and opened.digest != former


def test_dolma2():
    if not DOLMA2.exists():
        pytest.skip(f"{DOLMA2} is missing")
    tokenizer = load_tokenizer(DOLMA2)
    assert tokenizer.vocab_size == 100_278
    assert tokenizer.eod_id == 100_257
    text = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n\tfür 東京 \U0001f600"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
