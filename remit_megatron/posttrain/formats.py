"""The lines of a stage in the forms that other engines read, as one plain file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remit_megatron.posttrain.examples import Example, for_template
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.files import temporary_sibling


def as_they_are(example: Example, stage: str, verifier: str | None) -> dict[str, Any]:
    """remit's own lines, with the verifier in each."""
    return example.fields if stage != "rlvr" else {"verifier": verifier, **example.fields}


def swift(example: Example, stage: str, verifier: str | None) -> dict[str, Any]:
    """ms-swift's standard form: ``messages``, and ``rejected_response`` (dpo) or ``solution`` (rlvr)."""
    fields = for_template(example, stage)
    if stage == "sft":
        if "text" in fields:
            return {"messages": [{"role": "assistant", "content": fields["text"]}]}
        return {"messages": fields.get("messages") or fields["prompt"] + fields["completion"]}
    if stage == "dpo":
        rejected = _one_answer(example, fields["rejected"])
        return {"messages": fields["prompt"] + fields["chosen"], "rejected_response": rejected}
    return {"messages": fields["prompt"], "solution": example.fields["answer"]} | _named(example, verifier)


def verl(example: Example, stage: str, verifier: str | None) -> dict[str, Any]:
    """verl's form: ``messages`` for SFT; for reinforcement learning ``prompt``, ``data_source``, ``reward_model``."""
    if stage == "dpo":
        raise UserError("command.format", "verl, for dpo", "lines or swift: verl has no such form")
    if stage == "sft":
        return swift(example, stage, verifier)
    named = _named(example, verifier)
    return {
        "data_source": named["verifier"],
        "prompt": for_template(example, stage)["prompt"],
        "reward_model": {"style": "rule", "ground_truth": example.fields["answer"]},
        "extra_info": {"verifier_args": json.dumps(example.fields.get("verifier_args", {}))},
    }


def nemo_rl(example: Example, stage: str, verifier: str | None) -> dict[str, Any]:
    """NeMo-RL's: ``messages`` (SFT, and RL with the answer as the assistant's), or ``prompt``, ``chosen``,
    ``rejected``."""
    fields = for_template(example, stage)
    if stage == "dpo":
        answers = {name: _one_answer(example, fields[name]) for name in ("chosen", "rejected")}
        return {"prompt": fields["prompt"], **answers}
    if stage == "sft":
        return swift(example, stage, verifier)
    return {"messages": [*fields["prompt"], {"role": "assistant", "content": example.fields["answer"]}]}


FORMATS: dict[str, Callable[[Example, str, str | None], dict[str, Any]]] = {
    "lines": as_they_are,
    "swift": swift,
    "verl": verl,
    "nemo_rl": nemo_rl,
}


def write_format(
    path: Path, examples: Sequence[Example], *, form: str, stage: str, verifier: str | None = None
) -> None:
    """Writes JSON lines, or Parquet where the name ends so; whole or not at all."""
    rows = [FORMATS[form](example, stage, verifier) for example in examples]
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_sibling(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
        else:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _one_answer(example: Example, messages: list[dict[str, str]]) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(example.place, f"{len(messages)} messages as an answer", "one of the assistant's")
    return messages[0]["content"]


def _named(example: Example, verifier: str | None) -> dict[str, Any]:
    return {"verifier": example.fields.get("verifier", verifier)}
