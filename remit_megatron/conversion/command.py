"""``remit import`` and ``remit export``, and the loading of weights. Light to import: Megatron comes with the work."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from remit_megatron.conversion.source import ModelSource

DTYPES = ("bf16", "fp32")


def load_weights(
    chunks: Sequence[torch.nn.Module],
    source: ModelSource,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Fills every parameter of this rank's model chunks from ``source``, in place, in the parameters' own dtype.

    Collective over all ranks where the source is a checkpoint. Only weights are read, no optimizer. Rows that pad the
    vocabulary are set to zero. From safetensors, memory beyond the model is about one tensor.

    Args:
        chunks: of :func:`remit_megatron.models.build.build_chunks`, or of a training run (wrapped or not).
        source: what :func:`remit_megatron.conversion.source.resolve` found; the chunks must have been built from its
            ``hf_config``.
        on_bytes: called with the bytes filled so far, after each parameter read from safetensors.

    Raises:
        UserError: a weight is missing or unknown, or has another shape than the model.
    """
    from remit_megatron.conversion.loading import fill

    fill(chunks, source, on_bytes=on_bytes)


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit import``."""
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face directory: config.json, *.safetensors")
    parser.add_argument("--output", required=True, metavar="CKPT", help="the checkpoint; must not exist")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: bf16 where all of them are, else fp32)"
    )


def run_import(args: argparse.Namespace) -> int:
    """Hugging Face directory to a Megatron checkpoint, in one process."""
    _start()
    from remit_megatron.conversion.to_megatron import import_model

    import_model(args.hf, args.output, dtype=args.dtype)
    return 0


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit export``."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="CKPT", help="a checkpoint, or a run directory (its newest complete one)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the Hugging Face directory; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as in the checkpoint)")


def run_export(args: argparse.Namespace) -> int:
    """Megatron checkpoint of any layout to a Hugging Face directory, in one process."""
    _start()
    from remit_megatron.conversion.to_huggingface import export_model

    export_model(args.checkpoint, args.output, dtype=args.dtype)
    return 0


def _start() -> None:
    """Before the first import of torch and Megatron. What Megatron says of its own plans is not the user's concern."""
    # Every weight goes into memory that is new to the process; small pages would take a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import patches

    patches.apply()
    logging.getLogger("megatron").setLevel(logging.ERROR)
