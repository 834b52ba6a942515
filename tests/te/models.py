"""Models of Transformer Engine's layers and of the local ones on the ranks of a job; what they hold and compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.models import test_parity as parity
from tests.families import VOCABULARY
from tests.te.machine import activate

TE, LOCAL = "transformer_engine", "local"
# Layouts on which every rank holds something of every layer, and those that do not.
LAYOUTS: dict[str, dict[str, Any]] = {"one": {}, "tp2": {"tp": 2}, "tp2_sp": {"tp": 2, "sequence_parallel": True}}
PIPELINES: dict[str, dict[str, Any]] = {"pp2": {"pp": 2}}
_ALL = LAYOUTS | PIPELINES


def ranks_of(layout: str) -> int:
    """Processes of a layout."""
    return _ALL[layout].get("tp", 1) * _ALL[layout].get("pp", 1)


def sizes_of(layout: str) -> dict[str, int]:
    """The layout's parallel sizes, by Megatron's names."""
    sizes = _ALL[layout]
    return {
        "tensor_model_parallel_size": sizes.get("tp", 1),
        "pipeline_model_parallel_size": sizes.get("pp", 1),
    }


def build(directory: str, groups: Any, layout: str, layers: str, **choices: Any) -> list[Any]:
    """This rank's chunks, loaded. Padded vocabulary, as on GPUs."""
    from megatron.core.transformer.enums import AttnBackend

    from remit_megatron.conversion.loading import load_weights
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.build import build_chunks, default_arguments, model_config

    source = resolve(directory)
    arguments = default_arguments(
        make_vocab_size_divisible_by=8,
        attention_backend=AttnBackend.unfused,  # the one of Transformer Engine's that is plain torch
        sequence_parallel=_ALL[layout].get("sequence_parallel", False),
        **({"transformer_impl": layers} | sizes_of(layout) | choices),
    )
    chunks = build_chunks(model_config(source.hf_config, arguments), groups)
    for chunk in chunks:
        assert chunk.config.transformer_impl == layers
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))  # what loading leaves out shows
    load_weights(chunks, source)
    return chunks


def names_of(directory: str | Path) -> Any:
    """The family's table of weights."""
    from remit_megatron.conversion.source import resolve
    from remit_megatron.models.family import family_of

    config = resolve(directory).hf_config
    return family_of(config).names(config)


def contents(directories: dict[str, str], layout: str, layers: str) -> dict[str, Any]:
    """Of each model what this rank holds: name -> entry of the table, value, and the marks that Megatron reads."""
    activate()
    from remit_megatron.conversion.loading import weights_of
    from remit_megatron.conversion.processes import process_groups
    from remit_megatron.models.build import unwrap

    found: dict[str, Any] = {}
    with process_groups(**sizes_of(layout)) as groups:
        for case, directory in directories.items():
            (chunk,) = build(directory, groups, layout, layers)
            names = names_of(directory)
            found[case] = {
                name: {
                    "key": (layer, weight.local),
                    "value": parameter.detach().clone(),
                    "sequence_parallel": bool(getattr(parameter, "sequence_parallel", False)),
                    "tensor_model_parallel": bool(getattr(parameter, "tensor_model_parallel", False)),
                    "partition_dim": getattr(parameter, "partition_dim", -1),
                    "allreduce": getattr(parameter, "allreduce", True),
                    "decays": decays(f"module.module.{name}", parameter),
                }
                for name, layer, weight, parameter in weights_of(unwrap(chunk), names)
            }
            found[case]["modules"] = sorted({type(module).__name__ for module in unwrap(chunk).modules()})
    return found


def decays(name: str, parameter: torch.nn.Parameter) -> list[bool]:
    """Whether weight decay applies to a parameter under each rule that a run can ask for."""
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    from remit_megatron.training.weight_decay import weight_decay_overrides

    standard = get_standard_config_overrides(OptimizerConfig())
    found = []
    for norms, embeddings in ((None, None), (True, None), (False, True), (None, False), (True, False)):
        overrides = weight_decay_overrides(standard, decay_norms=norms, decay_embeddings=embeddings)
        without = [key for key, override in overrides.items() if override.get("wd_mult") == 0]
        found.append(not any(key.matches(parameter, name) for key in without))
    return found


class Additions(TorchDispatchMode):
    """Counts what adds to a gradient buffer and is no part of a product: operations, and the numbers they add."""

    def __init__(self, parameters: list[Any]):
        super().__init__()
        self._buffers = {parameter.main_grad.untyped_storage().data_ptr() for parameter in parameters}
        self.count = self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.add_.Tensor and args[0].untyped_storage().data_ptr() in self._buffers:
            self.count, self.numbers = self.count + 1, self.numbers + args[0].numel()
        return function(*args, **(kwargs or {}))


def step(
    directories: dict[str, str],
    tokens: list[list[int]],
    layout: str,
    layers: str,
    documents: list[list[int]] | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """As test_parity's: logits and gradients of two microbatches through Megatron's schedule; of four, of a sequence
    each, where stages exchange packed sequences.

    Args:
        documents: [b, s] numbers of documents that do not see each other; packed sequences for Transformer Engine, a
            mask for the local layers.
        choices: other arguments of Megatron.
    """
    activate()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from remit_megatron.conversion.processes import process_groups
    from tests.te.kernels import calls

    ids = torch.tensor(tokens)
    item = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": torch.ones(ids[:, 1:].shape)}
    item |= {} if documents is None else {"document_ids": torch.tensor(documents)}
    size = 1 if documents is not None and layout in PIPELINES else 2
    microbatches = [
        {name: tensor[first : first + size] for name, tensor in item.items()} for first in range(0, len(ids), size)
    ]
    results: dict[str, Any] = {}
    with process_groups(**sizes_of(layout)) as groups:
        model_parallel_cuda_manual_seed(1)
        for case, directory in directories.items():
            (chunk,) = build(directory, groups, layout, layers, **choices)
            chunk.train().requires_grad_(True)
            chunk.config.finalize_model_grads_func = finalize_model_grads
            ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
            model = DistributedDataParallel(chunk.config, ddp, chunk)
            model.zero_grad_buffer()
            logits: list[torch.Tensor] = []
            calls.clear()
            with Additions(list(chunk.parameters())) as additions:
                get_forward_backward_func()(
                    forward_step_func=_forward_step(groups, logits, layers, documents is not None, scale=2 / size),
                    data_iterator=iter(microbatches),
                    model=model,
                    num_microbatches=len(microbatches),
                    seq_length=parity.LENGTH,
                    micro_batch_size=size,
                    forward_only=False,
                )
            gradients = parity._gradients([model], names_of(directory))
            fused = [name for name, parameter in chunk.named_parameters() if parameter.grad_added_to_main_grad]
            results[case] = {"logits": logits, "gradients": gradients, "tp_rank": groups.tp.rank()}
            results[case] |= {"fused": fused, "calls": dict(calls)}
            if documents is not None and layers == TE:
                results[case] |= {"attention": _attention_errors(chunk)}
            results[case] |= {"additions": additions.count, "added": additions.numbers}
            results[case] |= {"sizes": {name: parameter.numel() for name, parameter in chunk.named_parameters()}}
    return results


def _attention_errors(chunk: Any) -> dict[str, float] | None:
    """What a run asks before its first step; None on a stage without a layer."""
    from megatron.core.transformer.attention import Attention

    from remit_megatron.models.attention_probe import packed_attention_errors

    attention = next((module for module in chunk.modules() if isinstance(module, Attention)), None)
    return None if attention is None else packed_attention_errors(attention, (5, 1, 12, 6), seed=1)


def _forward_step(groups: Any, logits: list[torch.Tensor], layers: str, document_mask: bool, *, scale: float) -> Any:
    """Sum of all tokens' losses, by our own way through a model; ``scale`` undoes the mean over more microbatches."""
    from remit_megatron.kernels import token_loss
    from remit_megatron.models.forward import ModelForward

    forward = ModelForward(eod_id=-1, groups=lambda: groups, document_mask=document_mask, packed_attention=layers == TE)

    def losses(*, hidden_states: Any, output_layer: Any, output_weight: Any, context: Any, **_: Any) -> torch.Tensor:
        values, _bias = output_layer(hidden_states, weight=output_weight)
        labels = context.labels
        values = values.transpose(0, 1).reshape(*labels.shape, -1).contiguous()  # packed sequences are [b * s, 1]
        shards = [torch.empty_like(values) for _ in range(groups.tp.size())]
        torch.distributed.all_gather(shards, values.detach().contiguous(), group=groups.tp)
        logits.append(torch.cat(shards, dim=-1))
        return token_loss(values, labels, tp_group=groups.tp, vocab_size=VOCABULARY)

    def forward_step(iterator: Any, model: Any) -> Any:
        return forward.run(model, forward.next(iterator), losses), lambda loss: (loss.sum() * scale, {})

    return forward_step


def whole_gradients(directory: Path, ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Gradients under Hugging Face names; of a parameter that every rank holds whole, the first rank's."""
    whole = {weight.local for weight in names_of(directory).layer if getattr(weight, "te_whole", False)}
    own = [[g for g in rank["gradients"] if rank["tp_rank"] == 0 or g[1] not in whole] for rank in ranks]
    return parity.merged(directory, [rank | {"gradients": g} for rank, g in zip(ranks, own, strict=True)])
