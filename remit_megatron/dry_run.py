"""``remit train --dry-run``: what a run would be, also where its files are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from remit_megatron.config import RunConfig
from remit_megatron.data.blend_file import is_blend_file
from remit_megatron.data.manifest import manifest_path
from remit_megatron.prepare import examine


def dry_run(config: RunConfig, *, world_size: int) -> str:
    """The resolved configuration, the numbers that follow from it, and a line for each thing a run would need and this
    machine does not have: runs are often planned where the weights are not.

    Raises:
        UserError: anything is wrong that can be checked here.
    """
    absent: list[str] = []
    found = examine(config, world_size=world_size, absent=absent)  # applies the patches, which come before Megatron
    from remit_megatron.models.family import family_of
    from remit_megatron.plan_numbers import describe

    unlisted = family_of(found.hf_config).unlisted_parameters(found.hf_config)
    missing = [*absent, *_absent_data(config)]
    notes = "".join(f"not found here: {line} (a run needs it; it was not checked)\n" for line in missing)
    return config.to_yaml() + "\n" + describe(config, found.arguments, unlisted=unlisted) + notes


def _absent_data(config: RunConfig) -> Iterator[str]:
    for key, blend in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        for entry in blend:
            path = entry if isinstance(entry, str) else entry[1]
            if not Path(path if is_blend_file(path) else manifest_path(path)).exists():
                yield f"{key} {path}"
