"""``remit import`` and ``remit export``. Light to import: Megatron comes with the work."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os

DTYPES = ("bf16", "fp32")
_M_MMAP_THRESHOLD = -3  # of malloc.h


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
    # It goes back to the system when it is freed: glibc raises its threshold for that with the first large block
    # that is freed, and then keeps weights in the heaps of several threads, by chance up to eight of them.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    import patches

    patches.apply()
    logging.getLogger("megatron").setLevel(logging.ERROR)
