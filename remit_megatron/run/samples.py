"""The samples of a run: training and validation, opened from its configuration."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from remit_megatron.data.boundaries import check_boundaries
from remit_megatron.data.manifest import read_manifest
from remit_megatron.data.tokenizer import Tokenizer
from remit_megatron.run.configuration import RunConfig
from remit_megatron.run.prepare import Prepared, objective_settings
from remit_megatron.runtime import parallel
from remit_megatron.runtime.errors import UserError

logger = logging.getLogger(__name__)


def open_data(prepared: Prepared, environment: parallel.RankEnvironment, *, samples: int) -> tuple[Any, Any]:
    """Opens the training and validation samples: rank 0 first, which builds the index that the others map.

    Args:
        samples: that the run has read when it is done (`prepare.count_from`).
    """
    train: Any = None
    valid: Any = None
    for turn in (environment.rank == 0, environment.rank != 0):
        with parallel.same_fate("opening the data"):
            if turn:
                train, valid = open_datasets(prepared, samples)
    if environment.rank == 0 and valid is not None:
        for prefix in seen_in_training(train.datasets, valid.datasets):
            logger.warning("data.valid: %s is training data, too: its loss says nothing about other text", prefix)
    return train, valid


def seen_in_training(train: Sequence[Any], valid: Sequence[Any]) -> list[str]:
    """Prefixes of validation data whose samples a run also trains on, by content and not by name.

    Args:
        train, valid: data sets with ``prefix`` and ``identity`` (`PackedDataset`).
    """
    known = {dataset.identity for dataset in train}
    return [dataset.prefix for dataset in valid if dataset.identity in known]


def open_datasets(prepared: Prepared, train_samples: int) -> tuple[Any, Any]:
    """The run's training samples, and its validation samples or None."""
    from remit_megatron.data.blend import open_blend, parse_blend
    from remit_megatron.data.largest_id import check_ids

    config, arguments = prepared.config, prepared.arguments
    common: dict[str, Any] = dict(
        sequence_length=arguments.seq_length,
        packing_seed=config.data.packing_seed,
        cache_dir=config.data_cache_dir,
        tokenizer_digest=prepared.tokenizer.digests,
        eod_id=prepared.tokenizer.eod_id,
        mask_eod_loss=config.data.mask_eod_loss,
        seed=config.seed,
    )
    if not config.data.train:
        raise UserError("data.train", "nothing", "a list of [weight, prefix] pairs")
    given = {name: getattr(config.data, name) for name in ("train", "valid")}
    blends = {name: parse_blend(blend, field=f"data.{name}") for name, blend in given.items() if blend}
    for name, blend in blends.items():
        for entry in blend:
            check_ids(entry.prefix, prepared.hf_config["vocab_size"], field=f"data.{name}")
    check_document_ends(config, [entry.prefix for blend in blends.values() for entry in blend], prepared.tokenizer)
    train = open_blend(blends["train"], num_samples=train_samples, **common)
    if "valid" not in blends:
        return train, None
    # The same samples at every validation, so that its losses compare.
    valid_samples = arguments.eval_iters * arguments.eval_global_batch_size
    return train, RepeatedSamples(open_blend(blends["valid"], num_samples=valid_samples, **common))


def check_document_ends(config: RunConfig, prefixes: Iterable[str], tokenizer: Tokenizer) -> None:
    """Refuses settings that go by the ends of documents where the data does not mark them.

    Args:
        prefixes: data sets that are there.

    Raises:
        UserError: naming the setting and the data set; or a data set that cannot be read.
    """
    by_ends = {
        "data.mask_eod_loss": "true" if config.data.mask_eod_loss else None,
        "data.document_mask": "true" if config.data.document_mask else None,
        "objective.centering": "document" if objective_settings(config).get("centering") == "document" else None,
    }
    asked = {setting: value for setting, value in by_ends.items() if value is not None}
    if not asked:
        return
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        for setting, value in asked.items():
            check_boundaries(prefix, manifest, tokenizer.eod_id, setting=setting, value=value)


class RepeatedSamples:
    """A data set gone through again and again, always in the same order. Its length is Megatron's idea of enough."""

    def __init__(self, samples: Any):
        from megatron.core.datasets.utils import Split

        self._samples, self.datasets = samples, samples.datasets
        self.split = Split.valid  # Megatron's loader takes the validation batch sizes by it

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, index: int) -> Any:
        return self._samples[index % len(self._samples)]
