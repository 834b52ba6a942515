"""Multi-latent attention: two faults of upstream under tensor parallelism, context parallelism, packed documents, and
the names of remote code. Parity with transformers on every layout is in test_models_parity.py."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import test_conversion as convert
from tests.distributed.models import test_parity as parity
from tests.families import VOCABULARY, hf_values, make_case

CASE = "youtu-narrow_values_tied"
ROPE_KEY = 6  # rows of the rotary key in the down projection of keys and values, after those of the latent
DOCUMENTS = (5, 1, 12, 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny random model."""
    return make_case(tmp_path_factory.mktemp("latent") / "model", CASE, seed=4)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """[4, LENGTH + 1]: two microbatches of two."""
    return torch.randint(0, VOCABULARY, (4, parity.LENGTH + 1), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(model, tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of transformers."""
    return parity.truth(model, tokens)


@contextlib.contextmanager
def undone(patch: str | None):
    """Without one of the patches, as upstream is."""
    import patches

    patches.apply()
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    targets: dict[str, tuple[Any, str]] = {
        "mla_rope_key_gradient": (MLASelfAttention, "_qkv_down_projection"),
        "mla_query_norm_gradient": (finalize, "_allreduce_non_tensor_model_parallel_grads"),
    }
    if patch is None:
        yield
        return
    owner, name = targets[patch]
    patched = getattr(owner, name)
    setattr(owner, name, patched.__wrapped__)
    try:
        yield
    finally:
        setattr(owner, name, patched)


def run_without(patch: str | None, directory: str, tokens: list[list[int]], layout: dict[str, Any]) -> dict[str, Any]:
    """A rank's logits and gradients, with a patch undone."""
    with undone(patch):
        return parity.run_megatron({"model": directory}, tokens, layout)["model"]


def gradient_errors(pool, model, tokens, expected, *, without: str | None, sequence_parallel: bool) -> dict[str, float]:
    """Largest differences from transformers' gradients, relative to their largest value, on two tensor-parallel
    ranks."""
    layout = {"tp": 2, "sequence_parallel": sequence_parallel}
    ranks = pool.run(
        run_without, world_size=2, patch=without, directory=str(model), tokens=tokens.tolist(), layout=layout
    )
    logits, gradients = expected
    for rank in ranks:
        found = torch.cat(rank["logits"])[..., :VOCABULARY]
        assert (found - logits).abs().max() < 5e-5, "the forward pass is right in any case"
    ours = parity.merged(model, ranks)
    return {name: ((ours[name] - g).abs().max() / g.abs().max()).item() for name, g in gradients.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2_sp"])
def test_gradient_of_the_shared_rotary_key(pool, model, tokens, expected, sequence_parallel):
    check = {"sequence_parallel": sequence_parallel}
    broken = gradient_errors(pool, model, tokens, expected, without="mla_rope_key_gradient", **check)
    down = [broken[f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"] for layer in range(4)]
    assert min(down) > 1e-2, "upstream has been repaired: drop the patch"
    assert broken["model.layers.0.input_layernorm.weight"] > 1e-2, "what comes before is wrong, too"
    repaired = gradient_errors(pool, model, tokens, expected, without=None, **check)
    assert max(repaired.values()) <= 1e-5


def test_gradient_of_the_query_norm(pool, model, tokens, expected):
    broken = gradient_errors(pool, model, tokens, expected, without="mla_query_norm_gradient", sequence_parallel=False)
    norms = {f"model.layers.{layer}.self_attn.q_a_layernorm.weight" for layer in range(4)}
    for name, error in broken.items():
        if name in norms:
            assert error == pytest.approx(1.0, rel=1e-4), "twice the gradient; if not, upstream has changed"
        else:
            assert error <= 1e-5, name
    # Under sequence parallelism a rank sees a part of the tokens: there the sum is right, and stays.
    with_parts = gradient_errors(
        pool, model, tokens, expected, without="mla_query_norm_gradient", sequence_parallel=True
    )
    assert max(with_parts.values()) <= 1e-5
    for sequence_parallel in (False, True):
        repaired = gradient_errors(pool, model, tokens, expected, without=None, sequence_parallel=sequence_parallel)
        assert max(repaired.values()) <= 1e-5


class Duplicated(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds whole, as Transformer Engine's down projections are."""

    def __init__(self, sharded: torch.nn.Module, group: Any, sequence_parallel: bool):
        super().__init__()
        shards = [torch.empty_like(sharded.weight) for _ in range(group.size())]
        torch.distributed.all_gather(shards, sharded.weight.data.contiguous(), group=group)
        self.weight = torch.nn.Parameter(torch.cat(shards))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


def duplicated_gradients(
    patch: str | None, directory: str, tokens: list[list[int]], sequence_parallel: bool
) -> dict[str, Any]:
    """This rank's gradients of the down projections where every rank holds them whole."""
    import patches

    patches.apply()
    from remit_megatron.conversion import loading

    fill = loading.load_weights

    def load_and_duplicate(chunks, source):
        fill(chunks, source)
        for layer in chunks[0].decoder.layers:
            attention = layer.self_attention
            for name in ("linear_q_down_proj", "linear_kv_down_proj"):
                group = attention.tp_group
                setattr(attention, name, Duplicated(getattr(attention, name), group, sequence_parallel))

    loading.load_weights = load_and_duplicate
    try:
        layout = {"tp": 2, "sequence_parallel": sequence_parallel}
        found = run_without(patch, directory, tokens, layout)
    finally:
        loading.load_weights = fill
    return {
        f"model.layers.{layer}.{hf}": gradient
        for layer, name, gradient in found["gradients"]
        for part, hf in (("linear_q_down", "self_attn.q_a_proj.weight"), ("linear_kv_down", KEY_VALUE_DOWN))
        if part in name
    }


KEY_VALUE_DOWN = "self_attn.kv_a_proj_with_mqa.weight"


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2_sp"])
def test_duplicated_down_projections(pool, model, tokens, expected, sequence_parallel):
    """Transformer Engine's arrangement: wrong upstream without sequence parallelism, right with it, right here in both,
    and alike on all ranks, or copies of weights would drift apart."""
    arguments = {"directory": str(model), "tokens": tokens.tolist(), "sequence_parallel": sequence_parallel}
    for patch in ("mla_rope_key_gradient", None):
        first, second = pool.run(duplicated_gradients, world_size=2, patch=patch, **arguments)
        assert len(first) == 8
        for name, found in first.items():
            gradient = expected[1][name]
            error = ((found - gradient).abs().max() / gradient.abs().max()).item()
            if patch is not None and not sequence_parallel and name.endswith(KEY_VALUE_DOWN):
                assert error > 1e-2 and not torch.allclose(found[-ROPE_KEY:], second[name][-ROPE_KEY:], rtol=1e-2)
            elif patch is None or sequence_parallel:
                assert error <= 1e-5, name
                assert torch.allclose(found, second[name], rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def context_parallel(directory: str, ids: list[list[int]], documents: list[list[int]] | None) -> dict[str, Any]:
    """This rank's logits and its part of the gradients of their sum of squares, on all ranks as one context."""
    import patches

    patches.apply()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_batch_on_this_cp_rank

    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.attention import document_attention_mask
    from remit_megatron.models.build import build_chunks, default_arguments, model_config
    from remit_megatron.runtime import parallel

    environment = parallel.rank_environment()
    parallel.initialize(environment)
    size = environment.world_size
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    source = resolve(directory)
    (chunk,) = build_chunks(model_config(source.hf_config, default_arguments(context_parallel_size=size)), groups)
    load_weights([chunk], source)
    chunk.requires_grad_(True)
    whole = {"tokens": torch.tensor(ids), "position_ids": torch.arange(len(ids[0])).expand(len(ids), -1).contiguous()}
    if documents is not None:
        whole["documents"] = torch.tensor(documents)
    batch = get_batch_on_this_cp_rank(whole, False, cp_group=groups.cp) if size > 1 else whole
    mask = None if documents is None else document_attention_mask(batch["documents"], cp_group=groups.cp)
    logits = chunk(batch["tokens"], batch["position_ids"], mask)
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in chunk.named_parameters()}
    return {"logits": logits.detach(), "gradients": gradients, "position_ids": batch["position_ids"]}


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_contexts_and_documents(pool, model, world_size, documents):
    """Logits of each document as transformers computes them for it alone, and the same gradients on two ranks."""
    import transformers

    ids = torch.randint(0, VOCABULARY, (2, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(7))
    lengths = DOCUMENTS if documents else (sum(DOCUMENTS),)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        logits = torch.cat([reference(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    arguments = {"directory": str(model), "ids": ids.tolist(), "documents": [numbers] * 2 if documents else None}
    ranks = pool.run(context_parallel, world_size=world_size, **arguments)
    for rank in ranks:
        wanted = logits.gather(1, rank["position_ids"][:, :, None].expand(-1, -1, VOCABULARY))
        assert (rank["logits"] - wanted).abs().max() <= 1e-5
    if world_size > 1:
        (alone,) = pool.run(context_parallel, world_size=1, **arguments)
        for name, gradient in alone["gradients"].items():
            total = torch.stack([rank["gradients"][name] for rank in ranks]).sum(0)
            assert (total - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_names_of_remote_code(pool, model, tokens, expected, tmp_path):
    """A directory as the authors publish it: their model type and code files, theta at the top level, the tied head a
    second time. What comes back is the same model under the names that transformers knows."""
    import transformers

    published = tmp_path / "published"
    published.mkdir()
    config = json.loads((model / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config |= {
        "model_type": "youtu_llm",
        "rope_scaling": None,
        "architectures": ["YoutuLLMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_youtu.YoutuForCausalLM"},
    }
    (published / "config.json").write_text(json.dumps(config))
    (published / "modeling_youtu.py").write_text("raise RuntimeError('code from a checkpoint was run')\n")
    weights = load_file(model / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | head, published / "model.safetensors", metadata={"format": "pt"})

    checkpoint, output = tmp_path / "checkpoint", tmp_path / "output"
    pool.run(convert.run_import, world_size=1, hf=str(published), output=str(checkpoint))
    pool.run(convert.run_export, world_size=1, checkpoint=str(checkpoint), output=str(output))
    back = load_file(output / "model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors"]
    written = json.loads((output / "config.json").read_text())
    assert written == {name: value for name, value in config.items() if name != "auto_map"} | {
        "model_type": "youtu",
        "architectures": ["YoutuForCausalLM"],
    }
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert type(loaded).__name__ == "YoutuForCausalLM"
    with torch.no_grad():
        assert torch.equal(loaded(tokens[:, :-1]).logits, expected[0])


def refused_layout(directory: str, tp: int) -> str:
    """The line that building on ``tp`` ranks ends with."""
    import patches

    patches.apply()
    from remit_megatron.conversion.source import read_config
    from remit_megatron.models.build import default_arguments, model_config
    from remit_megatron.runtime.errors import UserError

    try:
        model_config(read_config(Path(directory)), default_arguments(tensor_model_parallel_size=tp))
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")


def test_layout_that_does_not_divide_a_latent(pool, model):
    values = hf_values(CASE)
    (line,) = pool.run(refused_layout, world_size=1, directory=str(model), tp=4)
    assert "tensor_model_parallel_size: found 4" in line and f"q_lora_rank ({values['q_lora_rank']})" in line
