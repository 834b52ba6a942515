"""How many steps a run has, from its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def planned_steps(megatron: Mapping[str, Any], last: Mapping[str, Any] | None) -> int | None:
    """Steps of the whole run; None where the configuration does not say it in steps or samples.

    Args:
        megatron: that part of the run's configuration; names with hyphens or underscores.
        last: the last record of metrics.jsonl, from which on samples are counted in steps: those before may have had
            another batch. None where there is none.
    """
    values = {str(name).replace("-", "_"): value for name, value in megatron.items()}
    if values.get("train_iters"):
        return int(values["train_iters"])
    if not values.get("train_samples") or not values.get("global_batch_size"):
        return None
    samples, batch, length = int(values["train_samples"]), int(values["global_batch_size"]), values.get("seq_length")
    if not last or not length or last.get("consumed_tokens") is None:
        return samples // batch
    return int(last["iteration"]) + max(samples - int(last["consumed_tokens"]) // int(length), 0) // batch
