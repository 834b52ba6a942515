"""Which parallel sizes divide an architecture: asked of a run's arguments, of a reference, and of every model built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remit_megatron.models.family import down_projections
from remit_megatron.runtime.errors import UserError

# Arguments that spell out how many layers a stage has; Megatron checks them.
_UNEVEN = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)


def check_tensor_parallel(values: Mapping[str, Any], size: int, *, shared_groups: bool = True) -> None:
    """Refuses a tensor-parallel size that does not divide the architecture.

    Args:
        values: Megatron arguments that describe it, ``transformer_impl`` among them.
        size: of tensor parallelism.
        shared_groups: whether several ranks may share a query group. A run does not train such a layout.

    Raises:
        UserError: naming ``tensor_model_parallel_size``.
    """
    parts = [(f"{values['num_attention_heads']} attention heads", values["num_attention_heads"])]
    groups = values["num_query_groups"] if values.get("group_query_attention", True) else None
    if groups is not None and not (shared_groups and size % groups == 0):
        parts.append((f"{groups} query groups (key-value heads)", groups))
    columns = values["ffn_hidden_size"]
    parts.append((f"{columns} columns of the feed-forward layer", columns))
    latent = "{} ({})" if shared_groups else "{}, {}"
    parts += [(latent.format(what, rows), rows) for what, rows in down_projections(values)]
    for what, count in parts:
        if count is not None and count % size:
            raise UserError("tensor_model_parallel_size", size, f"a divisor of the model's {what}")


def pipeline_layers(values: Mapping[str, Any], layout: Mapping[str, Any]) -> tuple[int, str] | None:
    """What pipeline stages share evenly: how many, and of what. None where the arguments spell the stages out.

    Args:
        values: Megatron arguments that describe the architecture.
        layout: Megatron arguments of the run.
    """
    if any(layout.get(key) is not None for key in _UNEVEN):
        return None
    layers, what = values["num_layers"], "layers"
    for key in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"):
        if layout[key]:
            layers, what = layers + 1, "layers, embedding and loss counted"
    return layers, what


def check_pipeline_parallel(values: Mapping[str, Any], layout: Mapping[str, Any], *, virtual_stages: int = 1) -> None:
    """Refuses pipeline stages that do not divide the layers.

    Args:
        values, layout: as for :func:`pipeline_layers`.
        virtual_stages: of each rank.

    Raises:
        UserError: naming ``pipeline_model_parallel_size``.
    """
    shared, stages = pipeline_layers(values, layout), layout["pipeline_model_parallel_size"] * virtual_stages
    if shared is not None and shared[0] % stages:
        layers, what = shared
        virtual = ", with virtual stages" if virtual_stages > 1 else ""
        raise UserError("pipeline_model_parallel_size", stages, f"a divisor of the model's {layers} {what}{virtual}")
