"""Whether transformers makes of a Hugging Face directory the model that its files say, asked before it is used.

It draws weights that it misses at random, with a warning, and applies an adapter that lies beside a model where `peft`
is installed, without one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remit_megatron.runtime.errors import UserError

ADAPTER = "adapter_config.json"


def refuse_adapter(directory: Path, *, field: str) -> None:
    """Refuses a model with an adapter beside it: what it is depends on which packages are installed.

    Raises:
        UserError: there is ``adapter_config.json``.
    """
    if (directory / ADAPTER).is_file():
        found = f"{directory / ADAPTER} beside the model, an adapter that transformers applies where peft is installed"
        expected = "merged weights (merge_and_unload of peft), or the directory without it for the model alone"
        raise UserError(field, found, expected)


def check_whole(directory: Path, *, field: str, any_kind: bool = False) -> None:
    """Refuses a directory of which transformers would make another model, or none. No weight is read but its header.

    Args:
        directory: with config.json and safetensors.
        field: how messages name it.
        any_kind: leave what is no causal language model, or needs code of its own, to whoever loads it.

    Raises:
        UserError: an adapter, a weight that is missing or has another shape, or files that cannot be loaded.
    """
    refuse_adapter(directory, field=field)
    import torch
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    state = torch.get_rng_state()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            device_map="meta",
            local_files_only=True,
            use_safetensors=None if any_kind else True,  # whoever loads any kind takes pickled weights, too
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever its classes make of these files
        if any_kind:
            return
        reason = " ".join(str(error).split())[:200]
        found = f"{directory}, which transformers cannot load ({type(error).__name__}: {reason})"
        raise UserError(field, found, "a causal language model") from None
    finally:
        torch.set_rng_state(state)
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    loading: dict[str, Any] = loaded[1]
    if missing := sorted(loading["missing_keys"]):
        found = f"no {missing[0]} in {directory}{_and_others(missing)}"
        raise UserError(field, found, "every weight that config.json implies: transformers draws others at random")
    if other := sorted(loading["mismatched_keys"], key=str):
        name, has, wanted = other[0]
        found = f"{name} of shape {tuple(has)} in {directory}{_and_others(other)}"
        raise UserError(field, found, f"{tuple(wanted)}, as config.json says")


def _and_others(names: list[Any]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
