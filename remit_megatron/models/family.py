"""Model families: what a Hugging Face ``config.json`` means to Megatron, and who owns which architecture.

A family is one file that defines ``FAMILY``; it is registered by one line in ``MODULES``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from remit_megatron.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from remit_megatron.models.mapping import NameMap

# One line per family: the module remit_megatron.models.<name> defines FAMILY.
MODULES = ("llama", "olmo2", "smollm3", "youtu")

# Lists as long as a model has layers are made before anything else could notice that a number is no count.
_MOST_LAYERS = 100_000
_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: how people call it.
        model_types: ``model_type`` values of config.json that mean this family: that of transformers, then aliases.
        arguments: config.json content to Megatron arguments, by their ``dest``; raises UserError for a field with a
            value that this family does not support.
        layer_spec: specification of one transformer layer. Called with the TransformerConfig, whose
            ``transformer_impl`` says which kind of modules to use.
        names: config.json content to the table of weights.
        exported: config.json content as an export writes it, for names that transformers does not know; the content
            itself, and then the file byte for byte, where nothing changes.
        zero_rows: config.json content to the rows, by the tensor's name, that transformers sets to zero when it loads a
            model.
        unlisted_parameters: config.json content to the parameters of one layer that Megatron's arguments do not tell
            of, as (sharded over tensor-parallel ranks, held by each of them).
        layer_flags: flags of Megatron that its layers of Transformer Engine take and those of some other family do not.
    """

    name: str
    model_types: tuple[str, ...]
    arguments: Callable[[dict[str, Any]], dict[str, Any]]
    layer_spec: Callable[[TransformerConfig], ModuleSpec]
    names: Callable[[dict[str, Any]], NameMap]
    exported: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf_config: hf_config
    zero_rows: Callable[[dict[str, Any]], dict[str, int]] = lambda hf_config: {}
    unlisted_parameters: Callable[[dict[str, Any]], tuple[int, int]] = lambda hf_config: (0, 0)
    layer_flags: frozenset[str] = frozenset()


@cache
def families() -> dict[str, Family]:
    """All families by name."""
    found = [importlib.import_module(f"remit_megatron.models.{module}").FAMILY for module in MODULES]
    return {family.name: family for family in found}


def family_of(hf_config: dict[str, Any]) -> Family:
    """The family that owns a config.json.

    Raises:
        UserError: no family knows its ``model_type``.
    """
    model_type = hf_config.get("model_type")
    for family in families().values():
        if model_type in family.model_types:
            return family
    known = sorted(model_type for family in families().values() for model_type in family.model_types)
    raise UserError("config.json model_type", model_type, f"one of {', '.join(known)}")


def required(hf_config: dict[str, Any], field: str) -> Any:
    """A field of config.json that no default can replace.

    Raises:
        UserError: it is absent or null.
    """
    value = hf_config.get(field)
    if value is None:
        raise UserError(f"config.json {field}", "nothing", "a value: the architecture cannot be guessed")
    return value


def require(hf_config: dict[str, Any], field: str, supported: tuple[Any, ...]) -> None:
    """Refuses a value that would be computed wrongly; an absent field has its Hugging Face default, ``supported[0]``.

    Raises:
        UserError: the value is not one of ``supported``; 0 is not false, and 6.0 is not 6.
    """
    value = hf_config.get(field, supported[0])
    if not any(value == choice and type(value) is type(choice) for choice in supported):
        raise UserError(f"config.json {field}", value, " or ".join(str(choice) for choice in supported))


def whole(hf_config: dict[str, Any], field: str) -> int:
    """A size or a count that no default can replace.

    Raises:
        UserError: it is absent or null, or not a whole number that a model can have.
    """
    value = required(hf_config, field)
    largest = _MOST_LAYERS if field == "num_hidden_layers" else _LARGEST_SIZE
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise UserError(f"config.json {field}", repr(value), f"a whole number from 1 to {largest}")
    return value


def number(hf_config: dict[str, Any], field: str, default: float | None = None) -> float:
    """A number of at least 0; absent or null, it is ``default``.

    Raises:
        UserError: it is something else, or not finite; or it is absent and has no default.
    """
    value = hf_config.get(field)
    value = required(hf_config, field) if default is None else default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(f"config.json {field}", repr(value), "a number, at least 0")
    return value


def flag(hf_config: dict[str, Any], field: str, default: bool) -> bool:
    """A field that is true or false; absent, it is ``default``.

    Raises:
        UserError: it is something else; null is, as in transformers.
    """
    value = hf_config.get(field, default)
    if not isinstance(value, bool):
        raise UserError(f"config.json {field}", repr(value), "true or false")
    return value


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a checkpoint.

    Attributes:
        theta: base of the frequencies; an int where it is whole, because Megatron's option parses an int.
        kind: ``default``, ``llama3``, ... in the words of transformers.
        parameters: the other parameters of ``kind``.
    """

    theta: int | float
    kind: str
    parameters: dict[str, Any]


def rope_of(hf_config: dict[str, Any]) -> Rope:
    """Rope as config.json has it: ``rope_parameters`` (transformers 5), or ``rope_theta`` with ``rope_scaling``
    (before).

    The theta is always the checkpoint's own, in either spelling; what it is where a file says nothing, families add
    before, as the classes of transformers do.

    Raises:
        UserError: there is no theta, or it is not a positive number; or both spellings are there and differ, of which
            transformers takes ``rope_scaling``.
    """
    parameters, scaling = hf_config.get("rope_parameters"), hf_config.get("rope_scaling")
    field = "rope_parameters.rope_theta"
    if parameters is not None and scaling and scaling != parameters:
        raise UserError("config.json rope_scaling", scaling, "null beside rope_parameters, or the same")
    if parameters is None:
        if scaling and not isinstance(scaling, dict):
            raise UserError("config.json rope_scaling", scaling, "one set of parameters, or null")
        parameters = dict(scaling or {})
        field = "rope_theta"
    elif not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise UserError("config.json rope_parameters", repr(parameters), "one set of parameters for all layers")
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", None)
    if theta is None:
        theta = hf_config.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not math.isfinite(theta) or theta <= 0:
        raise UserError(f"config.json {field}", theta, "a positive number")
    # "type" is the spelling of transformers before 4.45; where both are there, they agree or the new one counts.
    legacy_kind = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", legacy_kind)
    for partial in (parameters.pop("partial_rotary_factor", None), hf_config.get("partial_rotary_factor")):
        if partial is not None and partial != 1.0:
            raise UserError("config.json partial_rotary_factor", partial, "1.0")
    return Rope(theta=int(theta) if float(theta).is_integer() else theta, kind=kind, parameters=parameters)


def down_projections(arguments: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What tensor parallelism must divide besides heads and feed-forward: rows of the down projections of multi-latent
    attention, which the local layers shard and Transformer Engine's do not.

    Args:
        arguments: Megatron arguments by ``dest``, ``transformer_impl`` among them.

    Returns:
        (name, rows) of each; empty for other models and other layers.
    """
    if not arguments["multi_latent_attention"] or arguments["transformer_impl"] != "local":
        return []
    key_value = ("kv_lora_rank + qk_pos_emb_head_dim", arguments["kv_lora_rank"] + arguments["qk_pos_emb_head_dim"])
    query = arguments["q_lora_rank"]
    return [key_value] if query is None else [("q_lora_rank", query), key_value]
