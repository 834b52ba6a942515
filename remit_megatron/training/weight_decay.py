"""Which parameters weight decay applies to, as overrides of Megatron's parameter groups.

Megatron's own rule: everything with one axis (norms, biases) is left out, everything else decays, embeddings included.
Recipes differ in both: OLMo 2 and SmolLM3 decay norms and not embeddings.
"""

from __future__ import annotations

from typing import Any

import torch

# Overrides of parameter groups by what selects the parameters: ParamKey -> ParamGroupOverride.
Overrides = dict[Any, Any]


def is_embedding(parameter: torch.nn.Parameter, name: str) -> bool:
    """Whether this is an input embedding, or the head of a model that ties the two.

    Megatron marks the two copies of a tied embedding, which are on different pipeline stages and must be treated alike;
    on one stage there is only the one parameter.

    Args:
        parameter: of a Megatron model, on any pipeline stage.
        name: its name, with or without the prefixes of wrappers.
    """
    return ".embedding." in f".{name}" or bool(getattr(parameter, "shared_embedding", False))


def weight_decay_overrides(
    standard: Overrides, *, decay_norms: bool | None, decay_embeddings: bool | None
) -> Overrides:
    """Megatron's overrides with another rule of weight decay.

    Args:
        standard: ``megatron.core.optimizer.get_standard_config_overrides``; entries that do not speak of weight decay
            are kept.
        decay_norms: whether parameters of one axis decay: norms, those that Transformer Engine fuses into a linear, and
            biases. None leaves them to ``standard``.
        decay_embeddings: whether embeddings decay (:func:`is_embedding`). None leaves them to ``standard``.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    if decay_norms is None and decay_embeddings is None:
        return standard
    without = {key: override for key, override in standard.items() if "wd_mult" in override}

    def left_out(parameter: torch.nn.Parameter, name: str) -> bool:
        if decay_embeddings is not None and is_embedding(parameter, name):
            return not decay_embeddings
        if decay_norms is not None and parameter.ndim == 1:
            return not decay_norms
        return any(key.matches(parameter, name) for key in without)

    if any(override != {"wd_mult": 0.0} for override in without.values()):
        raise ValueError(f"weight decay: found {list(without.values())}; expected only parameters left out of it")
    kept = {key: override for key, override in standard.items() if key not in without}
    rule = ParamWithNamePredicate(name=f"no_decay_norms_{decay_norms}_embeddings_{decay_embeddings}", fn=left_out)
    return kept | {ParamKey(with_name_predicate=rule): {"wd_mult": 0.0}}
