"""Import and export: bit-exact round trips, any layout in between, and inputs that are refused.

Round trips run over all families (tests/families.py); what is the same for all of them runs on Llama.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remit_megatron.conversion.source import resolve
from remit_megatron.runtime.errors import UserError
from tests.families import CASES, FIRST_CASES, VOCABULARY, hf_values, make_case
from tests.tiny import make_tokenizer

TIED = "llama-gqa_6_2_tied"
assert TIED in CASES


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, Path]:
    """Models of all cases, tied ones with a tokenizer."""
    root = tmp_path_factory.mktemp("convert")
    tokenizer = make_tokenizer(root / "tokenizer")
    models = {
        case: make_case(root / case, case, seed=seed, tokenizer=tokenizer if is_tied(case) else None)
        for seed, case in enumerate(CASES)
    }
    return {"root": root, "tied": models[TIED], **models}


def is_tied(case: str) -> bool:
    return hf_values(case)["tie_word_embeddings"]


def run_import(hf: str, output: str, dtype: str | None = None) -> None:
    """``remit import``, in a rank process."""
    import argparse

    from remit_megatron.conversion import command as convert

    parser = argparse.ArgumentParser()
    convert.add_import_arguments(parser)
    words = ["--hf", hf, "--output", output, *(["--dtype", dtype] if dtype else [])]
    assert convert.run_import(parser.parse_args(words)) == 0


def run_export(checkpoint: str, output: str, dtype: str | None = None, max_file_bytes: int | None = None) -> None:
    """``remit export``, in a rank process."""
    import argparse

    from remit_megatron.conversion import command as convert

    if max_file_bytes is not None:
        import patches

        patches.apply()
        from remit_megatron.conversion.to_huggingface import export_model

        return export_model(checkpoint, output, max_file_bytes=max_file_bytes)
    parser = argparse.ArgumentParser()
    convert.add_export_arguments(parser)
    words = ["--checkpoint", checkpoint, "--output", output, *(["--dtype", dtype] if dtype else [])]
    assert convert.run_export(parser.parse_args(words)) == 0


def refused(function_name: str, **kwargs: Any) -> str:
    """The one line of a UserError that a call ends with."""
    try:
        globals()[function_name](**kwargs)
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")


def resave(checkpoint: str, output: str, tp: int, pp: int, divisor: int) -> dict[str, list[int]]:
    """Loads a checkpoint on a layout and saves it from there, as a training run does; stored shapes by key."""
    import patches

    patches.apply()
    from megatron.core import dist_checkpointing

    from remit_megatron.conversion.loading import load_weights, sharded_weights
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.models.build import build_chunks, default_arguments, model_config
    from remit_megatron.runtime.checkpoints import write_manifest

    source = resolve(checkpoint)
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    with process_groups(**sizes) as groups:
        arguments = default_arguments(**sizes, make_vocab_size_divisible_by=divisor)
        chunks = build_chunks(model_config(source.hf_config, arguments), groups)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))  # what loading leaves out shows
        load_weights(chunks, source)
        for name, parameter in chunks[0].named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                first = groups.tp.rank() * parameter.shape[0]
                padding = parameter[max(0, min(parameter.shape[0], VOCABULARY - first)) :]
                assert not padding.any()
                padding.fill_(9.0)  # whatever a run leaves there must not come back
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            Path(output).mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save({"model": sharded_weights(chunks[0]), "iteration": 7}, output)
        held = dist_checkpointing.load_tensors_metadata(output)
        if torch.distributed.get_rank() == 0:
            shutil.copytree(source.hf_files, Path(output) / "hf")
            write_manifest(output, iteration=7)
        torch.distributed.barrier()
    return {key: list(tensor.global_shape) for key, tensor in held.items()}


@pytest.fixture(scope="module")
def imported(pool, material) -> dict[str, Path]:
    """Checkpoints of the models."""
    found = {}
    for name in CASES:
        found[name] = material["root"] / f"{name}_checkpoint"
        pool.run(run_import, world_size=1, hf=str(material[name]), output=str(found[name]))
    return found | {"tied": found[TIED]}


def save_whole(hf: str, output: str) -> None:
    """What ``remit import`` replaces: a model in memory, saved by Megatron's own writer."""
    import patches

    patches.apply()
    from megatron.core import dist_checkpointing

    from remit_megatron.conversion.loading import load_weights, sharded_weights
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.models.build import build_chunks, default_arguments, model_config

    source = resolve(hf)
    with process_groups(alone=True) as groups:
        arguments = default_arguments(transformer_impl="local")
        chunks = build_chunks(model_config(source.hf_config, arguments), groups, mixed_precision=False)
        load_weights(chunks, source)
        state = {"model": sharded_weights(chunks[0]), "checkpoint_version": 3.0, "iteration": 0}
        Path(output).mkdir()
        torch.serialization.set_crc32_options(False)  # the one thing that import leaves out
        try:
            dist_checkpointing.save(state, output, content_metadata={"singleton_local_shards": False})
        finally:
            torch.serialization.set_crc32_options(True)


def stored_metadata(directory: Path) -> dict[str, Any]:
    """Everything in ``.metadata`` but the random name and the path of the writer."""
    import pickle

    metadata = vars(pickle.loads((directory / ".metadata").read_bytes()))  # the test's own file
    return {name: value for name, value in metadata.items() if name != "storage_meta"}


def same_model(first: Path, second: Path) -> None:
    """Weights, configuration, tokenizer: bit for bit."""
    left, right = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (first / name).exists() == (second / name).exists()
        if (first / name).exists():
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(pool, material, imported, name):
    source = resolve(imported[name], digests=True)
    assert (source.kind, source.iteration) == ("checkpoint", 0)
    assert (source.tokenizer is not None) == is_tied(name)
    output = material["root"] / f"{name}_exported"
    pool.run(run_export, world_size=1, checkpoint=str(imported[name]), output=str(output))
    same_model(material[name], output)
    # The whole file: header and order are those of the safetensors package.
    assert (output / "model.safetensors").read_bytes() == (material[name] / "model.safetensors").read_bytes()
    assert not [path.name for path in material["root"].iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("name", CASES)
def test_import_writes_what_megatron_would(pool, material, imported, name):
    """Plan, metadata and weights of the streamed checkpoint: those of a model in memory, to the last byte but CRCs."""
    whole = material["root"] / f"{name}_whole"
    pool.run(save_whole, world_size=1, hf=str(material[name]), output=str(whole))
    found, expected = stored_metadata(imported[name]), stored_metadata(whole)
    assert found.keys() == expected.keys() and "all_local_plans" in found
    for field, value in expected.items():
        assert found[field] == value, field
    ours = {path.name for path in imported[name].iterdir()} - {"hf", "manifest.json"}
    assert ours == {path.name for path in whole.iterdir()} == {".metadata", "__0_0.distcp", "metadata.json"}
    for file in ("__0_0.distcp", "metadata.json"):
        assert (imported[name] / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("name", CASES)
def test_any_layout_in_between(pool, material, imported, name):
    first, second = (material["root"] / f"{name}_run" / "checkpoints" / f"iter_{i:07d}" for i in (3, 7))
    shapes = pool.run(resave, world_size=4, checkpoint=str(imported[name]), output=str(first), tp=2, pp=2, divisor=64)[
        0
    ]
    assert shapes["embedding.word_embeddings.weight"] == [256, 48], "padded to 64 x TP"
    assert ("output_layer.weight" in shapes) != is_tied(name)
    # A narrower and a wider vocabulary than the stored one.
    shapes = pool.run(resave, world_size=2, checkpoint=str(first), output=str(second), tp=2, pp=1, divisor=1)[0]
    assert shapes["embedding.word_embeddings.weight"] == [132, 48]
    output = material["root"] / f"{name}_from_run"
    # A run directory stands for its newest complete checkpoint.
    pool.run(run_export, world_size=1, checkpoint=str(first.parent.parent), output=str(output))
    same_model(material[name], output)


@pytest.mark.parametrize("name", FIRST_CASES)
def test_keys_are_those_of_transformer_engine(pool, material, imported, name):
    """A checkpoint of the local spec loads into a model of the Transformer Engine spec: both write the fused names."""
    from remit_megatron.models.family import family_of

    config = json.loads((material[name] / "config.json").read_text())
    names = family_of(config).names(config)
    output = str(material["root"] / f"{name}_keys")
    shapes = pool.run(resave, world_size=1, checkpoint=str(imported[name]), output=output, tp=1, pp=1, divisor=1)[0]
    expected = {"decoder.layers." + weight.te for weight in names.layer}
    expected |= {weight.te for weight in (names.embedding, *names.final, names.head) if weight is not None}
    assert {key for key in shapes if not key.endswith("_extra_state")} == expected


def test_export_over_several_files(pool, material, imported):
    import transformers

    output = material["root"] / "several"
    pool.run(run_export, world_size=1, checkpoint=str(imported["tied"]), output=str(output), max_file_bytes=50_000)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(output / f).values())
    expected = transformers.LlamaForCausalLM.from_pretrained(material["tied"]).state_dict()
    for name, tensor in transformers.LlamaForCausalLM.from_pretrained(output).state_dict().items():
        assert torch.equal(tensor, expected[name])
    # The sharded directory is a source itself.
    again = material["root"] / "several_checkpoint"
    pool.run(run_import, world_size=1, hf=str(output), output=str(again))
    back = material["root"] / "several_back"
    pool.run(run_export, world_size=1, checkpoint=str(again), output=str(back))
    same_model(material["tied"], back)


def test_dtypes(pool, material, imported):
    root = material["root"]
    exact = load_file(material["tied"] / "model.safetensors")
    pool.run(run_export, world_size=1, checkpoint=str(imported["tied"]), output=str(root / "bf16"), dtype="bf16")
    rounded = load_file(root / "bf16" / "model.safetensors")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert json.loads((root / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    # Weights that are bf16 throughout stay so, and come back bit for bit.
    pool.run(run_import, world_size=1, hf=str(root / "bf16"), output=str(root / "bf16_checkpoint"))
    pool.run(run_export, world_size=1, checkpoint=str(root / "bf16_checkpoint"), output=str(root / "bf16_back"))
    same_model(root / "bf16", root / "bf16_back")
    # An fp32 model loads a bf16 checkpoint; the values are the rounded ones.
    pool.run(run_import, world_size=1, hf=str(root / "bf16"), output=str(root / "wide"), dtype="fp32")
    pool.run(run_export, world_size=1, checkpoint=str(root / "wide"), output=str(root / "wide_back"))
    wide = load_file(root / "wide_back" / "model.safetensors")
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in rounded.items())


def altered(material: dict[str, Path], name: str, change) -> Path:
    """A copy of the tied model with other tensors."""
    directory = material["root"] / name
    shutil.copytree(material["tied"], directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_tensors_that_are_no_weights_change_nothing(pool, material):
    """A tied bf16 model whose file holds its head a second time, and rotary buffers, in wider types; with two keys for
    the dtype, both of them wrong."""
    import transformers

    def widen(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].bfloat16()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(5, dtype=torch.float64)

    directory, root = altered(material, "with_head", widen), material["root"]
    expected = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32", "torch_dtype": "float32"}))
    templates = {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/rag.jinja": "{{ documents }}"}
    (directory / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        (directory / name).write_text(text)
    checkpoint, output = root / "with_head_checkpoint", root / "head_back"
    pool.run(run_import, world_size=1, hf=str(directory), output=str(checkpoint))
    said = json.loads((checkpoint / "hf" / "config.json").read_text())
    assert said["dtype"] == said["torch_dtype"] == "bfloat16"
    pool.run(run_export, world_size=1, checkpoint=str(checkpoint), output=str(output), dtype="fp32")
    back = load_file(output / "model.safetensors")
    assert back.keys() == load_file(material["tied"] / "model.safetensors").keys()
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in back.items())
    said = json.loads((output / "config.json").read_text())
    assert said["dtype"] == said["torch_dtype"] == "float32"
    assert transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.float32
    assert transformers.AutoTokenizer.from_pretrained(output).chat_template == {
        "default": "{{ messages }}",
        "rag": "{{ documents }}",
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "no tensor model.layers.2.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}), "q_proj.bias (1 unknown)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), "shape (47,)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}), "dtype I32"),
        (lambda t: t.update({"lm_head.weight": torch.full((VOCABULARY, 48), 9.0)}), "tie_word_embeddings: found true"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "head"],
)
def test_import_refuses_and_leaves_nothing(pool, material, request, change, expected):
    name = request.node.callspec.id
    directory = altered(material, f"bad_{name}", change)
    output = material["root"] / f"bad_{name}_checkpoint"
    (line,) = pool.run(refused, world_size=1, function_name="run_import", hf=str(directory), output=str(output))
    assert expected in line and "expected" in line
    assert not [path for path in material["root"].iterdir() if output.name in path.name]


def import_on_a_full_disk(hf: str, output: str) -> str:
    """Runs out of space at the fifth weight; what the caller sees."""
    import errno
    import os

    import patches

    patches.apply()
    from remit_megatron.conversion import to_megatron

    left = iter(range(5))
    read = to_megatron.HuggingFaceWeights.read

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), output)
        return read(*args, **kwargs)

    to_megatron.HuggingFaceWeights.read = failing
    try:
        to_megatron.import_model(hf, output)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    finally:
        to_megatron.HuggingFaceWeights.read = read
    raise AssertionError("not refused")


def test_import_that_breaks_off_leaves_nothing(pool, material):
    """The error itself reaches the command line, not torch's BaseException around it."""
    output = material["root"] / "full_disk"
    (line,) = pool.run(import_on_a_full_disk, world_size=1, hf=str(material["tied"]), output=str(output))
    assert line == f"{output}: No space left on device"
    assert not [path for path in material["root"].iterdir() if output.name in path.name]


def test_refuses_wrong_kinds_and_taken_names(pool, material, imported):
    root = material["root"]
    cases = [
        (
            {"function_name": "run_import", "hf": str(imported["tied"]), "output": str(root / "x")},
            "a Megatron checkpoint",
        ),
        ({"function_name": "run_import", "hf": str(material["tied"]), "output": str(imported["tied"])}, "which exists"),
        (
            {"function_name": "run_export", "checkpoint": str(material["tied"]), "output": str(root / "x")},
            "a Hugging Face",
        ),
    ]
    for kwargs, expected in cases:
        (line,) = pool.run(refused, world_size=1, **kwargs)
        assert expected in line
    assert not (root / "x").exists()


def test_export_refuses_damage(pool, material, imported):
    """One flipped byte in the weights is found before anything is written."""
    directory = material["root"] / "damaged"
    shutil.copytree(imported["tied"], directory)
    weights = next(directory.glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    output = material["root"] / "from_damaged"
    (line,) = pool.run(refused, world_size=1, function_name="run_export", checkpoint=str(directory), output=str(output))
    assert weights.name in line and "sha256" in line and not output.exists()
