"""Logits and gradients of Megatron's model against transformers, on every layout; tiny random models of all families
(tests/families.py)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import CASES, FIRST_CASES, VOCABULARY, make_case

LENGTH = 24
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2_virtual": {"pp": 2, "virtual": 2},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_pp2_sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Random models on disk."""
    root = tmp_path_factory.mktemp("models")
    return {case: make_case(root / case, case, seed=seed) for seed, case in enumerate(CASES)}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """[4, LENGTH + 1]: two microbatches of two."""
    return torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def run_megatron(directories: dict[str, str], tokens: list[list[int]], layout: dict[str, Any]) -> dict[str, Any]:
    """This rank's logits and gradients of each model on a layout, through Megatron's schedule."""
    import patches

    patches.apply()
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from remit_megatron.conversion.processes import process_groups

    tp, pp, virtual = layout.get("tp", 1), layout.get("pp", 1), layout.get("virtual")
    ids = torch.tensor(tokens)
    results: dict[str, Any] = {}
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": virtual,
    }
    with process_groups(**sizes) as groups:
        model_parallel_cuda_manual_seed(1)
        for name, directory in directories.items():
            chunks, names = _trainable(
                directory, groups, {**sizes, "sequence_parallel": bool(layout.get("sequence_parallel"))}
            )
            logits: list[torch.Tensor] = []
            buffers = [iter(ids.split(2)) for _ in chunks]
            get_forward_backward_func()(
                forward_step_func=_forward_step(groups, logits),
                data_iterator=buffers if virtual else buffers[0],
                model=chunks if virtual else chunks[0],
                num_microbatches=2,
                seq_length=LENGTH,
                micro_batch_size=2,
                forward_only=False,
            )
            results[name] = {"logits": logits, "gradients": _gradients(chunks, names), "tp_rank": groups.tp.rank()}
    return results


def _trainable(directory: str, groups: Any, layout: dict[str, Any]) -> tuple[list[Any], Any]:
    """Chunks under DistributedDataParallel, which is what finalize_model_grads works on."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.build import build_chunks, default_arguments, model_config
    from remit_megatron.models.family import family_of

    source = resolve(directory)
    config = model_config(source.hf_config, default_arguments(make_vocab_size_divisible_by=8, **layout))
    chunks = build_chunks(config, groups)
    load_weights(chunks, source)
    wrapped = []
    for chunk in chunks:
        chunk.train().requires_grad_(True)
        chunk.config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        wrapped.append(DistributedDataParallel(chunk.config, ddp, chunk))
        wrapped[-1].zero_grad_buffer()
    return wrapped, family_of(source.hf_config).names(source.hf_config)


def _forward_step(groups: Any, logits: list[torch.Tensor]):
    from remit_megatron.kernels import token_loss

    def losses(*, hidden_states, output_layer, output_weight, context, **_):
        values, _bias = output_layer(hidden_states, weight=output_weight)
        shards = [torch.empty_like(values) for _ in range(groups.tp.size())]
        torch.distributed.all_gather(shards, values.detach().contiguous(), group=groups.tp)
        logits.append(torch.cat(shards, dim=-1).transpose(0, 1))
        loss = token_loss(values, context.t().contiguous(), tp_group=groups.tp, vocab_size=VOCABULARY)
        return loss.t()

    def forward_step(iterator, model):
        ids = next(iterator)
        positions = torch.arange(LENGTH).expand(len(ids), -1)
        output = model(ids[:, :-1], positions, None, output_processor=losses, output_processor_context=ids[:, 1:])
        return output, lambda loss: (loss.sum(), {})

    return forward_step


def _gradients(chunks: list[Any], names: Any) -> list[tuple[int | None, str, torch.Tensor]]:
    from remit_megatron.conversion.loading import weights_of
    from remit_megatron.models.build import unwrap

    return [
        (layer, weight.local, parameter.main_grad.clone())
        for chunk in chunks
        for _, layer, weight, parameter in weights_of(unwrap(chunk), names)
    ]


def truth(directory: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of transformers, of the same loss: a mean over the two microbatches, as in the schedule."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    logits = model(tokens[:, :-1]).logits
    loss = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum() / 2
    loss.backward()
    return logits.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def merged(directory: Path, ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Gradients under Hugging Face names, from all ranks, through the table of weights."""
    from remit_megatron.conversion.source import read_config
    from remit_megatron.models.family import family_of
    from remit_megatron.models.mapping import Shape

    config = read_config(directory)
    family = family_of(config)
    values, names = family.arguments(config), family.names(config)
    shape = Shape(values["num_attention_heads"], values["num_query_groups"], values["vocab_size"])
    shards: dict[tuple[int | None, str], dict[int, torch.Tensor]] = {}
    for rank in ranks:
        for layer, local, gradient in rank["gradients"]:
            shards.setdefault((layer, local), {})[rank["tp_rank"]] = gradient
    gradients: dict[str, torch.Tensor] = {}
    for layer, weight in names.weights(values["num_layers"]):
        pieces = shards.pop((layer, weight.local))
        tensors = weight.write([pieces[rank] for rank in sorted(pieces)], shape)
        gradients |= dict(zip(names.hf_names(layer, weight), tensors, strict=True))
    assert not shards
    return gradients


@pytest.fixture(scope="module")
def expected(models, tokens) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Logits and gradients of transformers."""
    return {name: truth(directory, tokens) for name, directory in models.items()}


@pytest.fixture(scope="module")
def on_layout(pool, models, tokens):
    """Runs all models on a layout, once; gives the results of its ranks by model."""

    @cache
    def run(layout: str) -> dict[str, list[dict[str, Any]]]:
        sizes = LAYOUTS[layout]
        ranks = pool.run(
            run_megatron,
            world_size=sizes.get("tp", 1) * sizes.get("pp", 1),
            directories={name: str(path) for name, path in models.items()},
            tokens=tokens.tolist(),
            layout=sizes,
        )
        return {name: [rank[name] for rank in ranks] for name in models}

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(models, expected, on_layout, case, layout):
    results = on_layout(layout)[case]
    logits, gradients = expected[case]
    assert logits.std() > 0.5, "logits of a size that errors would show in"
    tolerance = 1e-5 if layout == "one" else 5e-5
    for found in (torch.cat(result["logits"]) for result in results if result["logits"]):
        assert found.shape[-1] > VOCABULARY and not found[..., VOCABULARY:].any(), "padding rows are zero"
        assert (found[..., :VOCABULARY] - logits).abs().max() <= tolerance
    ours, alone = merged(models[case], results), merged(models[case], on_layout("one")[case])
    assert ours.keys() == alone.keys() == gradients.keys()
    for weight, gradient in gradients.items():
        error = ((ours[weight] - gradient).norm() / gradient.norm()).item()
        assert error <= 1e-5, f"{weight}: {error} from transformers"
        error = ((ours[weight] - alone[weight]).abs().max() / alone[weight].abs().max()).item()
        assert error <= 1e-5, f"{weight}: {error} from one process"


def bf16_logits(directory: str, tokens: list[list[int]]) -> torch.Tensor:
    """Logits of a frozen bf16 model."""
    import patches

    patches.apply()
    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.build import build_chunks, default_arguments, model_config

    source = resolve(directory)
    with process_groups() as groups, torch.no_grad():
        (chunk,) = build_chunks(model_config(source.hf_config, default_arguments(params_dtype=torch.bfloat16)), groups)
        load_weights([chunk], source)
        assert {parameter.dtype for parameter in chunk.parameters()} == {torch.bfloat16}
        ids = torch.tensor(tokens)
        return chunk(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


@pytest.mark.parametrize("case", FIRST_CASES)
def test_bf16_is_as_good_as_transformers(pool, models, tokens, case):
    import transformers

    directory = models[case]
    with torch.no_grad():
        exact = transformers.AutoModelForCausalLM.from_pretrained(directory)(tokens).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)(tokens).logits
    (ours,) = pool.run(bf16_logits, world_size=1, directory=str(directory), tokens=tokens.tolist())
    assert (ours - exact).norm() <= 1.2 * (theirs.float() - exact).norm()
