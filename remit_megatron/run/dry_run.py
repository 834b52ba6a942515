"""``remit train --dry-run``: what a run would be, also where its files are not."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remit_megatron.data.blend import parse_blend, summarize_blend
from remit_megatron.data.blend_file import is_blend_file
from remit_megatron.data.largest_id import check_ids
from remit_megatron.data.manifest import manifest_path
from remit_megatron.data.tokenizer import Tokenizer
from remit_megatron.run.checks import check_rounds
from remit_megatron.run.configuration import RunConfig, blend_prefixes
from remit_megatron.run.directory import read_config
from remit_megatron.run.prepare import examine
from remit_megatron.run.resume import check_data, compare_settings, data_record, training_settings
from remit_megatron.run.samples import check_document_ends
from remit_megatron.runtime.checkpoints import read_manifest

if TYPE_CHECKING:
    from remit_megatron.conversion.source import ModelSource


def dry_run(config: RunConfig, *, world_size: int | None = None) -> str:
    """The resolved configuration, the numbers that follow from it, and a line for each thing a run would need and this
    machine does not have: runs are often planned where the weights are not.

    Args:
        world_size: ranks of the run; None is one replica of the model.

    Raises:
        UserError: anything is wrong that can be checked here.
    """
    import patches

    patches.apply()
    absent: list[str] = []
    ranks = _fewest_ranks(config) if world_size is None else world_size
    found = examine(config, world_size=ranks, absent=absent)
    check_rounds(found.arguments)
    for source in (None if found.goes_on else found.init, found.reference):
        _check_weights(source)
    properties: dict[str, Any] = {}
    if found.goes_on and found.init is not None:
        settings = training_settings(vars(found.arguments), config)
        before = read_config(Path(config.run_dir or ""))
        properties = read_manifest(found.init.path).properties
        compare_settings(properties, settings, config, found.arguments, text=before)
    from remit_megatron.models.family import family_of
    from remit_megatron.run.derived import describe

    unlisted = family_of(found.hf_config).unlisted_parameters(found.hf_config)
    there, absent_data = _data(config)
    for key, prefix in there:
        check_ids(prefix, found.hf_config["vocab_size"], field=key)
    if found.tokenizer is not None:
        check_document_ends(config, [prefix for _, prefix in there], found.tokenizer)
        if not absent_data:
            _check_samples(config, found.arguments, found.tokenizer, properties)
    missing = [*absent, *absent_data]
    notes = "".join(f"not found here: {line} (a run needs it; it was not checked)\n" for line in missing)
    return config.to_yaml() + "\n" + describe(config, found.arguments, unlisted=unlisted) + notes


def _check_samples(
    config: RunConfig, arguments: argparse.Namespace, tokenizer: Tokenizer, properties: dict[str, Any]
) -> None:
    """Refuses data that a run would refuse once it opens it, and other data than the run has been trained on."""
    length = arguments.seq_length
    for key, blend in (("data.valid", config.data.valid), ("data.train", config.data.train)):
        if not blend:
            continue
        summary = summarize_blend(
            parse_blend(blend, field=key),
            sequence_length=length,
            packing_seed=config.data.packing_seed,
            tokenizer_digest=tokenizer.digests,
            eod_id=tokenizer.eod_id,
        )
        if key == "data.train" and "data" in properties:
            now = data_record(summary.datasets, summary.weights, config, sequence_length=length)
            check_data(properties["data"], now, config, consumed=int(properties.get("consumed_samples", 0)))


def _check_weights(source: ModelSource | None) -> None:
    """Refuses Hugging Face weights that the run would refuse once it has begun to load them."""
    if source is not None and source.kind == "huggingface":
        from remit_megatron.conversion.loading import HuggingFaceWeights

        HuggingFaceWeights(source).check()


def _fewest_ranks(config: RunConfig) -> int:
    """Ranks that hold the model once."""
    from remit_megatron.run.megatron_args import read_overrides

    chosen = read_overrides(config.megatron)
    axes = ("tensor_model", "pipeline_model", "context")
    return math.prod(max(chosen.get(f"{axis}_parallel_size") or 1, 1) for axis in axes)


def _data(config: RunConfig) -> tuple[list[tuple[str, str]], list[str]]:
    """Key and prefix of the data sets that are there, and a line for each entry that is not."""
    there, absent = [], []
    for key, blend in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        for path in blend_prefixes(blend):
            if not Path(path if is_blend_file(path) else manifest_path(path)).exists():
                absent.append(f"{key} {path}")
            elif not is_blend_file(path):  # blend files that are there have been replaced by their contents
                there.append((key, path))
    return there, absent
