"""FP8 through Transformer Engine: what this machine can run, what a layout must fit, the settings of a frozen model.

A training model's settings are Megatron's (``megatron.fp8`` and its companions). A frozen model has its own, never the
student's: :func:`frozen_arguments`. Its linear weights exist in FP8 only, one byte each and one scale per tensor or per
block, in all layers but the first and the last; embedding, head, norms and those two layers stay as they are.

Recipes: ``delayed`` scales a tensor by what its earlier values were, ``tensorwise`` by its own largest value,
``blockwise`` 128 x 128 (weights) and 1 x 128 (activations) elements, ``mxfp8`` 32 elements at a time.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from typing import Any

from remit_megatron.models.frozen import STUDENT_STEP
from remit_megatron.models.spec import transformer_engine_usable
from remit_megatron.runtime.errors import UserError

# Recipe -> the Transformer Engine that Megatron demands for it, and the question that tells whether a GPU can run it.
_RECIPES = {
    "delayed": ("1.0", "is_fp8_available"),
    "tensorwise": ("2.2.0.dev0", "is_fp8_available"),
    "mxfp8": ("2.1.0", "is_mxfp8_available"),
    "blockwise": ("2.3.0.dev0", "is_fp8_block_scaling_available"),
    "custom": ("2.9.0.dev0", "is_fp8_available"),
}
RECIPES = tuple(_RECIPES)
# What a frozen model may use: `delayed` cannot leave the first and the last layer alone, and would carry state from one
# step to the next, so that a score would depend on what was scored before.
FROZEN_RECIPES = ("tensorwise", "blockwise", "mxfp8")

# Megatron's arguments of low precision, at the values that switch it off. Those that only some installations have are
# set where they are found.
_OFF: dict[str, Any] = {
    "fp8": None,
    "fp8_recipe": "delayed",
    "fp8_param_gather": False,
    "fp8_quantizer_factory": None,
    "fp8_margin": 0,
    "fp8_interval": 1,
    "fp8_amax_history_len": 1,
    "fp8_amax_compute_algo": "most_recent",
    "fp8_wgrad": True,
    "fp8_output_proj": False,
    "first_last_layers_bf16": False,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
    "fp4": None,
    "fp4_recipe": "nvfp4",
    "fp4_param_gather": False,
    "fp4_quantizer_factory": None,
    "te_precision_config_file": None,
}
_OFF_WHERE_FOUND: dict[str, Any] = {"kitchen_config_file": None, "kitchen_recipe_number": None}


def frozen_arguments(
    args: argparse.Namespace, *, fp8: str | None = None, recipe: str = "tensorwise"
) -> argparse.Namespace:
    """A run's arguments for its frozen reference: all as they are, but for the student's precision and step.

    Args:
        args: Megatron's namespace of the run; not modified.
        fp8: None keeps the weights in the run's 16-bit (or 32-bit) type. ``e4m3`` or ``hybrid``: linear weights are
            made and held in FP8. The two differ in gradients only, which a frozen model has none of.
        recipe: one of `FROZEN_RECIPES`. No effect without ``fp8``.

    Returns:
        Arguments for :func:`remit_megatron.models.build.model_config`.
    """
    if recipe not in FROZEN_RECIPES:
        raise ValueError(f"recipe: found {recipe!r}; expected one of {', '.join(FROZEN_RECIPES)}")
    own = argparse.Namespace(**vars(args))
    for name, value in _OFF.items():
        setattr(own, name, value)
    for name, value in (_OFF_WHERE_FOUND | STUDENT_STEP).items():
        if hasattr(own, name):
            setattr(own, name, copy.copy(value))
    if fp8 is not None:
        own.fp8, own.fp8_recipe = fp8, recipe
        own.fp8_param_gather = True  # Megatron's name for weights that exist in FP8 only
        own.first_last_layers_bf16 = True
        own.use_cpu_initialization = False  # quantized where it is made; the weights are loaded anyway
    return own


def missing(recipe: str) -> str | None:
    """Why this machine cannot run a recipe, in one line; None where it can.

    Transformer Engine is asked, so that its answer about the GPU, CUDA and itself is the one that holds.
    """
    if not transformer_engine_usable():
        return "it needs Transformer Engine and a GPU"
    from megatron.core.extensions import transformer_engine
    from megatron.core.utils import get_te_version, is_te_min_version

    version, question = _RECIPES[recipe]
    if not is_te_min_version(version):
        return f"it needs Transformer Engine {version.removesuffix('.dev0')}, and {get_te_version()} is installed"
    state: Any = getattr(transformer_engine, "FP8GlobalStateManager")  # noqa: B009 - exists with Transformer Engine only
    available, reason = getattr(state, question)()
    return None if available else reason.rstrip(".")


def support() -> dict[str, str | None]:
    """Every recipe with what :func:`missing` says of it."""
    return {recipe: missing(recipe) for recipe in RECIPES if recipe != "custom"}


def check_run(values: Mapping[str, Any]) -> None:
    """Refuses FP8 settings of a training model that this machine, the model or the layout cannot carry out.

    Args:
        values: Megatron's arguments by name, with the model's among them.

    Raises:
        UserError: naming the setting.
    """
    if not values["fp8"]:
        if values["fp8_param_gather"]:
            raise UserError("megatron.fp8_param_gather", "true without megatron.fp8", "false, or fp8: e4m3 or hybrid")
        return
    recipe = str(getattr(values["fp8_recipe"], "value", values["fp8_recipe"]))
    if reason := missing(recipe):
        raise UserError("megatron.fp8", f"{values['fp8']} with fp8_recipe {recipe}", f"null: {reason}")
    if values["first_last_layers_bf16"] and recipe == "delayed":
        raise UserError(
            "megatron.first_last_layers_bf16",
            "true with fp8_recipe delayed",
            "false, or fp8_recipe tensorwise, blockwise or mxfp8",
        )
    check_sizes("megatron.fp8", values, values, recipe=recipe)


def check_frozen(fp8: str, recipe: str, model: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Refuses an FP8 reference that this machine, its sizes or the run's layout cannot carry out.

    Args:
        fp8, recipe: as in :func:`frozen_arguments`.
        model: Megatron's arguments that describe the reference.
        args: Megatron's namespace of the run.

    Raises:
        UserError: naming the setting.
    """
    if reason := missing(recipe):
        raise UserError("reference.fp8", f"{fp8} with fp8_recipe {recipe}", f"null: {reason}")
    if args.transformer_impl != "transformer_engine":
        raise UserError("reference.fp8", fp8, "null with megatron.transformer_impl local")
    if model["num_layers"] < 3:
        expected = "null: its first and last layers stay as they are, which leaves none"
        raise UserError("reference.fp8", f"{fp8} for a model of {model['num_layers']} layers", expected)
    check_sizes("reference.fp8", model, vars(args), recipe=recipe)


def check_sizes(field: str, model: Mapping[str, Any], layout: Mapping[str, Any], *, recipe: str) -> None:
    """Refuses token counts and weights that FP8 matrix products cannot take.

    Rows and columns of every operand must be multiples of 16 (``mxfp8``: 32), on every rank. Transformer Engine checks
    some of it in the middle of the first step (forward alone would do with multiples of 8 tokens, gradients would not).

    Args:
        field: the setting that asks for FP8.
        model: Megatron's arguments that describe the model.
        layout: parallel sizes, ``seq_length`` and micro-batch sizes of the run.
        recipe: one of `RECIPES`.

    Raises:
        UserError: naming what does not fit.
    """
    multiple = 32 if recipe == "mxfp8" else 16
    tp, cp = layout["tensor_model_parallel_size"], layout["context_parallel_size"]
    split = cp * (tp if layout["sequence_parallel"] else 1)
    for key in ("micro_batch_size", "eval_micro_batch_size"):
        if layout[key] is None:
            continue
        tokens = layout["seq_length"] // split * layout[key]
        if tokens % multiple:
            shared = f" over {split} ranks" if split > 1 else ""
            raise UserError(
                "megatron.seq_length",
                f"{layout['seq_length']}{shared} x {key} {layout[key]} = {tokens} tokens a rank",
                f"a multiple of {multiple} with {field} ({recipe})",
            )
    for name, size in _sizes(model).items():
        if size % (multiple * tp if name not in _WHOLE else multiple):
            over = f" over {tp} tensor-parallel ranks" if tp > 1 and name not in _WHOLE else ""
            raise UserError(
                field, f"{recipe} with {name} {size}{over}", f"multiples of {multiple} on every rank, or null"
            )


# Sizes that tensor parallelism does not cut.
_WHOLE = ("hidden_size", "q_lora_rank", "kv_lora_rank", "columns of the latent key-value projection")


def _sizes(model: Mapping[str, Any]) -> dict[str, int]:
    """Rows and columns of the weights of a layer, before tensor parallelism cuts them."""
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    sizes = {"hidden_size": hidden, "ffn_hidden_size": model["ffn_hidden_size"]}
    if model.get("multi_latent_attention"):
        key_columns = model["qk_head_dim"] + model["qk_pos_emb_head_dim"]
        sizes |= {
            "columns of the queries": heads * key_columns,
            "kv_lora_rank": model["kv_lora_rank"],
            "columns of the latent key-value projection": model["kv_lora_rank"] + model["qk_pos_emb_head_dim"],
            "columns of keys and values": heads * (model["qk_head_dim"] + model["v_head_dim"]),
            "columns of the attention's output": heads * model["v_head_dim"],
        }
        return sizes | ({"q_lora_rank": model["q_lora_rank"]} if model.get("q_lora_rank") else {})
    groups = model["num_query_groups"] if model.get("group_query_attention") else heads
    columns = model.get("kv_channels") or hidden // heads
    return sizes | {
        "columns of queries, keys and values": (heads + 2 * groups) * columns,
        "columns of the attention's output": heads * columns,
    }
