"""``remit data build``, ``remit data mix`` and ``remit data select``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from remit_megatron.data.build import build_dataset
from remit_megatron.data.merge import merge_datasets
from remit_megatron.data.miniplm import Keep
from remit_megatron.data.mix import BLEND, advice, mix, parse_tokens, plan_mix, table
from remit_megatron.data.recipe import load_recipe
from remit_megatron.data.select import select_miniplm
from remit_megatron.runtime.errors import EXIT_DONE, UserError
from remit_megatron.runtime.progress import format_duration


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit data build``."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="F",
        help="files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), patterns, directories of them, or a Hugging Face data "
        "set written by save_to_disk",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="Hugging Face directory, checkpoint, or tokenizer.json"
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="makes PREFIX.bin, PREFIX.idx and PREFIX.json"
    )
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes that tokenize (default: one per usable core)"
    )
    text = parser.add_mutually_exclusive_group()  # the one would leave the other without effect
    text.add_argument("--text-key", metavar="KEY", help="field that holds the text (default: text)")
    text.add_argument(
        "--template",
        metavar="TEXT",
        help="text made of several fields, as 'Question: {question}\\nAnswer: {answer}'; understands \\n, \\t and \\\\",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a bad line stops the build (default), or is counted and skipped",
    )
    parser.add_argument("--no-eod", action="store_true", help="append no end-of-document token")
    _add_special_tokens_option(parser)
    parser.add_argument("--max-documents", type=int, metavar="N", help="stop after N documents")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _add_special_tokens_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--add-special-tokens",
        action="store_true",
        help="put the tokens around each text that the tokenizer's post-processor adds (as begin of text)",
    )


def run_build(args: argparse.Namespace) -> int:
    """Builds what the command line asks for; returns the exit code."""
    template = args.template
    if template is not None:
        escapes = {"n": "\n", "t": "\t", "\\": "\\"}
        template = re.sub(r"\\([nt\\])", lambda match: escapes[match[1]], template)
    started = time.monotonic()
    manifest = build_dataset(
        args.input,
        tokenizer=args.tokenizer,
        output=args.output,
        workers=len(os.sched_getaffinity(0)) if args.workers is None else args.workers,
        text_key="text" if args.text_key is None else args.text_key,
        template=template,
        on_error=args.on_error,
        append_eod=not args.no_eod,
        add_special_tokens=args.add_special_tokens,
        max_documents=args.max_documents,
        overwrite=args.overwrite,
        progress=True,
    )
    skipped = f", {manifest.skipped} lines skipped" if manifest.skipped else ""
    print(
        f"{args.output}: {manifest.documents} documents, {manifest.tokens} tokens ({manifest.dtype}){skipped}, "
        f"took {format_duration(time.monotonic() - started)}"
    )
    return EXIT_DONE


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit data merge``."""
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="data sets of one tokenizer, without endings"
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="makes PREFIX.bin, PREFIX.idx and PREFIX.json"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run_merge(args: argparse.Namespace) -> int:
    """Merges what the command line asks for; returns the exit code."""
    started = time.monotonic()
    manifest = merge_datasets(args.input, args.output, overwrite=args.overwrite, progress=True)
    print(
        f"{args.output}: {len(args.input)} data sets, {manifest.documents} documents, {manifest.tokens} tokens, "
        f"took {format_duration(time.monotonic() - started)}"
    )
    return EXIT_DONE


def add_mix_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit data mix``."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, as those in configs/data")
    parser.add_argument("--root", default=".", metavar="DIR", help="folder that the recipe's files are in (default: .)")
    parser.add_argument("--tokenizer", metavar="DIR", help="Hugging Face directory, checkpoint, or tokenizer.json")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help=f"receives the data sets, one a source, and {BLEND}"
    )
    parser.add_argument(
        "--tokens", metavar="N", help="size of the mix (50e9, 50B): no source is read further than its share of it"
    )
    parser.add_argument(
        "--hub", action="store_true", help="read what has no files below --root from the Hugging Face hub"
    )
    parser.add_argument("--allow-missing", action="store_true", help="make the blend without sources that are missing")
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes that tokenize (default: one per usable core)"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a bad line stops the build (default), or is counted and skipped",
    )
    _add_special_tokens_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="build again what was built from something else")
    parser.add_argument("--dry-run", action="store_true", help="print shares, tokens and what is there; write nothing")


def run_mix(args: argparse.Namespace) -> int:
    """Mixes what the command line asks for; returns the exit code."""
    recipe, budget = load_recipe(args.recipe), parse_tokens(args.tokens)
    options: dict[str, Any] = dict(root=args.root, output=args.output, budget=budget, hub=args.hub)
    if args.dry_run:
        plans = plan_mix(recipe, allow_missing=args.allow_missing, **options)
        sys.stdout.write(table(plans) + advice(plans, args.root))
        return EXIT_DONE
    if args.tokenizer is None:
        raise UserError("--tokenizer", "nothing", "a Hugging Face directory, a checkpoint or a tokenizer.json file")
    plans = mix(
        recipe,
        tokenizer=args.tokenizer,
        allow_missing=args.allow_missing,
        workers=len(os.sched_getaffinity(0)) if args.workers is None else args.workers,
        on_error=args.on_error,
        add_special_tokens=args.add_special_tokens,
        overwrite=args.overwrite,
        progress=True,
        **options,
    )
    sys.stdout.write(table(plans))
    print(f"{Path(args.output) / BLEND}: {sum(plan.share > 0 for plan in plans)} sources")
    return EXIT_DONE


def add_select_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``remit data select``."""
    parser.add_argument("--method", choices=("miniplm",), required=True, help="how samples are chosen")
    parser.add_argument("--teacher", required=True, metavar="CACHE", help="score cache of the teacher")
    parser.add_argument("--reference", required=True, metavar="CACHE", help="score cache of the small reference")
    parser.add_argument(
        "--keep",
        required=True,
        metavar="SHARE|N",
        help="share of the samples, with a point (0.8), or number of samples (50000)",
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PREFIX", help="data sets, without endings; both caches have them"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PREFIX",
        help="makes PREFIX.bin, PREFIX.idx, PREFIX.json and PREFIX.selection.json",
    )
    parser.add_argument(
        "--mask-eod-loss",
        action="store_true",
        help="do not count the prediction of what follows an end of document (as data.mask_eod_loss of a run)",
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="folder for the index of the data (as data.cache_dir of a run)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run_select(args: argparse.Namespace) -> int:
    """Selects what the command line asks for; returns the exit code."""
    keep, started = Keep.parse(args.keep), time.monotonic()
    report = select_miniplm(
        args.data,
        teacher=args.teacher,
        reference=args.reference,
        keep=keep,
        output=args.output,
        mask_eod_loss=args.mask_eod_loss,
        cache_dir=args.cache_dir,
        overwrite=args.overwrite,
        progress=True,
    )
    scores = report["scores"]
    print(
        f"{args.output}: {report['kept']} of {scores['samples']} samples kept, {report['tokens']} tokens, scores of "
        f"{report['threshold']:.4f} nats or more (mean of all {scores.get('mean', float('nan')):.4f}), "
        f"took {format_duration(time.monotonic() - started)}"
    )
    return EXIT_DONE
