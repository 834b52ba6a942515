"""remit's verifiers as verl's ``custom_reward_function``: path of this file, name ``compute_score``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from remit_megatron.posttrain.verifiers import find_verifier


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None, **_: Any
) -> float:
    """The reward of a completion; ``data_source`` is the verifier's name, as ``command.format: verl`` writes it."""
    arguments = json.loads((extra_info or {}).get("verifier_args") or "{}")
    return find_verifier(data_source)(solution_str, ground_truth, **arguments)
