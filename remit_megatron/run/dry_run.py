"""``remit train --dry-run``: what a run would be, also where its files are not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remit_megatron.data.blend_file import is_blend_file
from remit_megatron.data.manifest import manifest_path
from remit_megatron.run.configuration import RunConfig
from remit_megatron.run.prepare import examine


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
    _check_present_data(config, found.hf_config["vocab_size"])
    from remit_megatron.models.family import family_of
    from remit_megatron.run.derived import describe

    unlisted = family_of(found.hf_config).unlisted_parameters(found.hf_config)
    missing = [*absent, *_absent_data(config)]
    notes = "".join(f"not found here: {line} (a run needs it; it was not checked)\n" for line in missing)
    return config.to_yaml() + "\n" + describe(config, found.arguments, unlisted=unlisted) + notes


def _fewest_ranks(config: RunConfig) -> int:
    """Ranks that hold the model once."""
    from remit_megatron.run.megatron_args import read_overrides

    chosen = read_overrides(config.megatron)
    axes = ("tensor_model", "pipeline_model", "context")
    return math.prod(max(chosen.get(f"{axis}_parallel_size") or 1, 1) for axis in axes)


def _absent_data(config: RunConfig) -> Iterator[str]:
    for key, blend in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        for entry in blend:
            if not _is_there(path := _path(entry)):
                yield f"{key} {path}"


def _check_present_data(config: RunConfig, rows: int) -> None:
    """Refuses data that is here and has tokens without a row in the model."""
    from remit_megatron.data.blend import parse_blend
    from remit_megatron.data.largest_id import check_ids

    for key, blend in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        present = [entry for entry in blend if _is_there(_path(entry))]
        for entry in parse_blend(present, field=key) if present else ():
            if _is_there(entry.prefix):
                check_ids(entry.prefix, rows, field=key)


def _path(entry: Any) -> str:
    return entry if isinstance(entry, str) else entry[1]


def _is_there(path: str) -> bool:
    return Path(path if is_blend_file(path) else manifest_path(path)).exists()
