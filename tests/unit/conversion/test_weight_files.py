"""Which files make a model, and which of their tensors: what transformers loads of the same directory, or one line."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from remit_megatron.conversion.loading import HuggingFaceWeights, same_values
from remit_megatron.conversion.source import resolve, with_dtype, with_head
from remit_megatron.conversion.weight_files import tensor_files
from remit_megatron.evaluation.models import find_models
from remit_megatron.runtime.checkpoints import write_manifest
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.exported import checkpoint_of
from tests.tiny import make_llama

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The model and others whose weights lie beside it, all of one shape."""
    root = tmp_path_factory.mktemp("models")
    tied = {name: make_llama(root / name, seed=seed, num_hidden_layers=2) for seed, name in enumerate(("m", "other"))}
    return tied | {"untied": make_llama(root / "untied", seed=7, num_hidden_layers=2, tie_word_embeddings=False)}


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / SINGLE)


def shard(tensors: dict[str, torch.Tensor], directory: Path, *, index: str = INDEX) -> None:
    names = sorted(tensors)
    files = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Every weight that the loader takes, by its Hugging Face name."""
    weights = HuggingFaceWeights(resolve(directory))
    names = sorted(name for name in tensor_files(directory) if name in weights._files.names() and name != HEAD)
    return {name: weights._tensor(name)[:] for name in names}


def as_transformers(directory: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    found = read(directory)
    assert found.keys() | {HEAD} == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name]), name


def index_of_other_shards(directory: Path, other: Path) -> None:
    shard(tensors_of(other), directory)


def index_without_shards(directory: Path, other: Path) -> None:
    index_of_other_shards(directory, other)
    for file in directory.glob("model-*.safetensors"):
        file.unlink()


def damaged_index(directory: Path, other: Path) -> None:
    (directory / INDEX).write_text("{")


def adapter_beside(directory: Path, other: Path) -> None:
    save_file({"base.lora_A": torch.ones(2)}, directory / "adapter_model.safetensors")


def consolidated_beside(directory: Path, other: Path) -> None:
    shutil.copy(other / SINGLE, directory / "consolidated.safetensors")


def pickles_beside(directory: Path, other: Path) -> None:
    torch.save(tensors_of(other), directory / "pytorch_model.bin")


def variant_beside(directory: Path, other: Path) -> None:
    shutil.copy(other / SINGLE, directory / "model.fp16.safetensors")


def sharded(directory: Path, other: Path) -> None:
    """No single file; another model's lies under another name."""
    shard(tensors_of(directory), directory)
    (directory / SINGLE).unlink()
    consolidated_beside(directory, other)
    variant_beside(directory, other)


def index_that_misplaces(directory: Path, other: Path) -> None:
    """Tensors in other shards than the index says: transformers reads all of its files."""
    shard(tensors_of(directory), directory)
    (directory / SINGLE).unlink()
    content = json.loads((directory / INDEX).read_text())
    first, second = sorted(set(content["weight_map"].values()))
    content["weight_map"] = {name: second if file == first else first for name, file in content["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps(content))


def older_index(directory: Path, other: Path) -> None:
    """An index from before buffers, and the copy of a tied head, were left out of the files."""
    shard(tensors_of(directory), directory)
    (directory / SINGLE).unlink()
    content = json.loads((directory / INDEX).read_text())
    gone = (HEAD, "model.layers.0.self_attn.rotary_emb.inv_freq")
    content["weight_map"] |= dict.fromkeys(gone, next(iter(content["weight_map"].values())))
    (directory / INDEX).write_text(json.dumps(content))


def links_of_a_hub(directory: Path, other: Path) -> None:
    """Each file a link to one elsewhere, as in a cache of the hub, and the weights by another name."""
    named_in_config(directory, other)
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(Path("..", "blobs", str(number)))


def named_in_config(directory: Path, other: Path) -> None:
    shutil.move(directory / SINGLE, directory / "own.safetensors")
    shutil.copy(other / SINGLE, directory / SINGLE)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors"}))


@pytest.mark.parametrize(
    "beside",
    [
        index_of_other_shards,
        index_without_shards,
        damaged_index,
        adapter_beside,
        consolidated_beside,
        pickles_beside,
        variant_beside,
        sharded,
        index_that_misplaces,
        older_index,
        named_in_config,
        links_of_a_hub,
    ],
)
def test_the_files_are_those_of_transformers(tmp_path, models, beside, caplog):
    directory = copy(models["m"], tmp_path / "m")
    expected = tensors_of(directory)
    beside(directory, models["other"])
    with caplog.at_level(logging.WARNING):
        found = read(directory)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    as_transformers(directory)
    stale = [record.getMessage() for record in caplog.records if "is passed over" in record.getMessage()]
    assert len(stale) == (beside in (index_of_other_shards, index_without_shards, damaged_index))


def test_an_index_of_the_one_file_is_not_stale(tmp_path, models, caplog):
    directory = copy(models["m"], tmp_path / "m")
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors_of(directory), SINGLE)}))
    with caplog.at_level(logging.WARNING):
        as_transformers(directory)
    assert "passed over" not in caplog.text


def test_a_single_file_of_another_name_is_taken(tmp_path, models):
    """transformers finds nothing there; what is right here stays right."""
    directory = copy(models["m"], tmp_path / "m")
    expected = tensors_of(directory)
    shutil.move(directory / SINGLE, directory / "weights.safetensors")
    adapter_beside(directory, models["other"])
    consolidated_beside(directory, models["other"])
    found = read(directory)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def only_adapter(directory: Path, other: Path) -> None:
    (directory / SINGLE).unlink()
    adapter_beside(directory, other)


def two_variants(directory: Path, other: Path) -> None:
    shutil.move(directory / SINGLE, directory / "model.fp16.safetensors")
    shutil.copy(other / SINGLE, directory / "model.bf16.safetensors")


def pickled_before_variant(directory: Path, other: Path) -> None:
    shutil.move(directory / SINGLE, directory / "model.fp16.safetensors")
    pickles_beside(directory, other)


def only_pickled_shards(directory: Path, other: Path) -> None:
    (directory / SINGLE).unlink()
    (directory / "pytorch_model.bin.index.json").write_text("{}")


def named_outside(directory: Path, other: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    name = f"../{other.name}/{SINGLE}"
    (directory / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))


def name_that_no_file_can_have(directory: Path, other: Path) -> None:
    (directory / SINGLE).unlink()
    (directory / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": {"a": "a" * 300}}))


def adapter_to_apply(directory: Path, other: Path) -> None:
    """transformers then loads the model with it where peft is installed (tests/unit/runtime/test_whole_model.py)."""
    adapter_beside(directory, other)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (name_that_no_file_can_have, "which is not there; expected every file that the index names"),
        (only_adapter, "only adapter_model.safetensors"),
        (two_variants, "2 safetensors files and no model.safetensors.index.json"),
        (pickled_before_variant, "only pytorch_model.bin, which transformers takes before model.fp16.safetensors"),
        (only_pickled_shards, "only pytorch_model.bin.index.json"),
        (named_outside, "transformers_weights: found ../other/model.safetensors"),
        (adapter_to_apply, "adapter_config.json beside the model, an adapter that transformers applies"),
    ],
)
def test_what_is_no_model_here_is_refused_by_name(tmp_path, models, change, found):
    directory = copy(models["m"], tmp_path / "m")
    copy(models["other"], tmp_path / "other")
    change(directory, tmp_path / "other")
    with pytest.raises(UserError) as refused:
        resolve(directory)
    assert found in str(refused.value) and "\n" not in str(refused.value)


def name_twice(directory: Path) -> None:
    content = (directory / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b"{", b'{"__metadata__":{},', 1)
    (directory / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (name_twice, "a name twice in"),
        (lambda directory: (directory / "config.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda directory: (directory / "config.json").write_text("\ufeff{}"), "no JSON"),
    ],
    ids=["a name twice", "depth", "mark"],
)
def test_texts_that_are_not_read_alike(tmp_path, models, change, found):
    """What the libraries of other programs refuse, is not taken here."""
    directory = copy(models["m"], tmp_path / "m")
    change(directory)
    with pytest.raises(UserError, match=found):
        resolve(directory)
    with pytest.raises(Exception):  # noqa: B017 - of any kind, but for safetensors its own
        transformers.AutoModelForCausalLM.from_pretrained(directory)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = tensors_of(directory)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_equal_copy_of_a_tied_head_is_ignored(tmp_path, models, dtype):
    directory = copy(models["m"], tmp_path / "m")
    as_transformers(rewrite(directory, lambda t: t.update({HEAD: t[EMBEDDING].to(dtype, copy=True)})))


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.index_put_((torch.tensor(50), torch.tensor(47)), torch.tensor(9.0)),
        lambda head: head[:-1].clone(),
        lambda head: head.bfloat16(),
    ],
    ids=["one value", "shape", "rounded"],
)
def test_another_head_in_a_tied_model_is_refused(tmp_path, models, change):
    directory = rewrite(
        copy(models["m"], tmp_path / "m"), lambda t: t.update({HEAD: change(t[EMBEDDING].clone()).contiguous()})
    )
    with pytest.raises(UserError) as refused:
        HuggingFaceWeights(resolve(directory))
    message = str(refused.value)
    assert message.startswith("config.json tie_word_embeddings: found true, and lm_head.weight differs")
    assert "\n" not in message


def test_a_tied_matrix_under_the_heads_name(tmp_path, models):
    """transformers ties in whichever direction there is a weight."""
    directory = copy(models["m"], tmp_path / "m")
    expected = tensors_of(directory)[EMBEDDING]
    rewrite(directory, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    weights = HuggingFaceWeights(resolve(directory))
    (embedding,) = weights.tensors(None, weights.names.embedding, expected.shape)
    assert torch.equal(embedding[:], expected) and torch.equal(loaded[EMBEDDING], expected)


@pytest.mark.parametrize("head", [False, True], ids=["none", "copy"])
def test_a_model_that_was_saved_without_its_head(tmp_path, models, head):
    """As AutoModel saves it: the names have no prefix, and transformers takes them all the same."""
    directory = copy(models["m"], tmp_path / "m")
    shutil.copytree(directory, tmp_path / "bare")
    transformers.AutoModel.from_pretrained(directory).save_pretrained(tmp_path / "bare")
    if head:
        rewrite(tmp_path / "bare", lambda t: t.update({HEAD: t["embed_tokens.weight"].clone()}))
    assert "embed_tokens.weight" in tensors_of(tmp_path / "bare")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare").state_dict()
    source = resolve(tmp_path / "bare")
    assert source.hf_config["architectures"] == ["LlamaModel"]
    assert with_head(source.hf_config) == source.hf_config | {"architectures": ["LlamaForCausalLM"]}
    for other in (
        {},
        {"architectures": None},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": "LlamaModel"},
    ):
        assert with_head(other) is other
    weights = HuggingFaceWeights(source)
    weights.check()
    assert len(weights.used()) == len(expected) - 1
    for name in expected.keys() - {HEAD}:
        assert torch.equal(weights._tensor(name)[:], expected[name]), name
        assert torch.equal(expected[name], tensors_of(directory)[name])


def wrapped(name: str) -> str:
    return "model." + name


def bare_in_one_layer(name: str) -> str:
    return name.removeprefix("model.") if ".layers.0." in name else name


def bare(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize("name", ["m", "untied"])
@pytest.mark.parametrize("rename", [wrapped, bare_in_one_layer, bare])
def test_a_part_of_the_names_more_or_less(tmp_path, models, rename, name):
    """transformers takes the name of the base model off, or puts it on, where that gives a name that it knows."""
    directory = copy(models[name], tmp_path / "model")
    held = tensors_of(directory)
    if name == "m":
        held[HEAD] = held[EMBEDDING].clone()
    save_file({rename(key): tensor for key, tensor in held.items()}, directory / SINGLE, metadata={"format": "pt"})
    expected = transformers.AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).state_dict()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    weights = HuggingFaceWeights(resolve(directory))
    weights.check()
    for key in expected:
        assert torch.equal(loaded[key], expected[key]), key
        if key != HEAD or name == "untied":
            assert torch.equal(weights._tensor(key)[:], expected[key]), key


def test_names_that_would_be_one_are_refused(tmp_path, models):
    directory = copy(models["untied"], tmp_path / "model")
    rewrite(directory, lambda held: held.update({"layers.0.mlp.up_proj.weight": torch.ones(80, 48)}))
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight \(1 unknown\)"):
        HuggingFaceWeights(resolve(directory))


@pytest.mark.parametrize("names", [(EMBEDDING,), (EMBEDDING, HEAD)])
def test_a_number_in_place_of_the_embedding_is_refused(tmp_path, models, names):
    directory = copy(models["m"], tmp_path / "model")
    rewrite(directory, lambda held: held.update({name: torch.tensor(1.0) for name in names}))
    with pytest.raises(UserError, match="embed_tokens"):
        HuggingFaceWeights(resolve(directory)).check()


def test_metadata_that_is_null_is_none(tmp_path, models):
    directory = copy(models["m"], tmp_path / "model")
    content = (directory / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"__metadata__": None}).encode()
    (directory / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    as_transformers(directory)


def manifest_of_others(directory: Path) -> None:
    (directory / "manifest.json").write_text(json.dumps({"name": "model", "files": []}))


def manifest_of_posttrain(directory: Path) -> None:
    write_manifest(directory, step=3)


def folder_hf(directory: Path) -> None:
    (directory / "hf").mkdir()


def metadata_of_others(directory: Path) -> None:
    (directory / ".metadata").write_text("{}")


def checkpoints_of_others(directory: Path) -> None:
    (directory / "checkpoints" / "checkpoint-500").mkdir(parents=True)


@pytest.mark.parametrize(
    "beside", [manifest_of_others, manifest_of_posttrain, folder_hf, metadata_of_others, checkpoints_of_others]
)
def test_what_a_checkpoint_also_has_makes_no_checkpoint_of_a_model(tmp_path, models, beside):
    directory = copy(models["m"], tmp_path / "model")
    beside(directory)
    assert resolve(directory).kind == "huggingface"
    as_transformers(directory)
    assert checkpoint_of(directory) is None
    (model,) = find_models([str(directory)])
    assert (model.checkpoint, model.path) == (False, directory)


def test_an_untied_model_without_head_is_refused(tmp_path, models):
    directory = rewrite(copy(models["untied"], tmp_path / "m"), lambda t: t.pop(HEAD))
    weights = HuggingFaceWeights(resolve(directory))
    with pytest.raises(UserError, match=r"found no tensor lm_head\.weight; expected .*tie_word_embeddings"):
        weights.used()


def test_same_values():
    one = torch.tensor([1.0, float("nan"), -0.0])
    assert same_values(one, one.double()) and same_values(one, torch.tensor([1.0, float("nan"), 0.0]).bfloat16())
    assert not same_values(one, torch.tensor([1.0, 2.0, 0.0]))
    assert not same_values(torch.tensor([1 + 2**-20]), torch.tensor([1.0]).half())


def test_only_weights_of_the_model_count(tmp_path, models):
    """Buffers and the copy of a tied head have no say in the dtype of an import, and may have dtypes of their own."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()
        tensors[HEAD] = tensors[EMBEDDING].float()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(6, dtype=torch.float64)

    used = HuggingFaceWeights(resolve(rewrite(copy(models["m"], tmp_path / "m"), change))).used()
    assert {tensor.dtype for tensor in used} == {torch.bfloat16} and len(used) == 2 + 9 * 2

    def one_in_double(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()

    bad = HuggingFaceWeights(resolve(rewrite(copy(models["m"], tmp_path / "bad"), one_in_double)))
    with pytest.raises(UserError, match=r"model\.norm\.weight: found dtype float64; expected one of F32"):
        bad.used()


@pytest.mark.parametrize(
    "keys", [(), ("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")], ids=lambda keys: " ".join(keys) or "none"
)
def test_every_dtype_key_says_the_same(tmp_path, models, keys):
    config = json.loads((models["m"] / "config.json").read_text())
    config.pop("dtype", None)
    changed = with_dtype(config | dict.fromkeys(keys, "bfloat16"), "float32")
    directory = copy(models["m"], tmp_path / "m")
    (directory / "config.json").write_text(json.dumps(changed))
    assert {changed[key] for key in keys or ("dtype",)} == {"float32"}
    assert changed.keys() - config.keys() == set(keys or ("dtype",))
    assert transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").dtype == torch.float32
