"""Published post-training data, in the forms that open-instruct reads, to the lines of a stage.

    sft    messages                                   tulu-3-sft-olmo-2-mixture
    dpo    chosen, rejected: whole conversations      olmo-2-0425-1b-preference-mix
    rlvr   messages, ground_truth, dataset            RLVR-GSM-MATH-IF-Mixed-Constraints, RLVR-MATH

``dataset`` names open-instruct's verifier, and ours: ``ifeval`` with a function's name in its ground truth is
``ifeval_old`` (open-instruct's ``--remap_verifier ifeval=ifeval_old``). Every line is checked as a run would check it,
and its answer is read once, so that no run ends over one in its midst.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remit_megatron.data.inputs import expand_inputs
from remit_megatron.data.readers import iter_records
from remit_megatron.posttrain.examples import Example, check_fields
from remit_megatron.posttrain.rewards import VerifiedReward
from remit_megatron.runtime.errors import UserError, did_you_mean, show
from remit_megatron.runtime.files import temporary_sibling

FIELDS = {
    "sft": ("messages",),
    "dpo": ("chosen", "rejected"),
    "rlvr": ("messages", "ground_truth", "dataset"),
}
# open-instruct's verifier -> ours. Its GSM8K takes the last number of a completion, its MATH compares as Minerva does.
_VERIFIERS = {"gsm8k": "gsm8k", "math": "math", "ifeval": "ifeval_old", "ifeval_old": "ifeval_old"}


@dataclass
class Converted:
    """What became of the records.

    Attributes:
        written: lines of the output.
        left_out: reason, without what differs by record, -> records; empty unless asked to leave records out.
        first: reason -> the message of the first record.
        verifiers: verifier -> lines.
    """

    written: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    verifiers: Counter[str] = field(default_factory=Counter)


def convert(inputs: Sequence[str], output: Path, *, stage: str, leave_out: bool = False) -> Converted:
    """Writes the lines of a stage, whole or not at all.

    Args:
        inputs: Parquet or JSON lines; files, patterns, folders.
        output: a ``.jsonl`` file.
        leave_out: leaves out a record that cannot be a line, and counts it, in place of refusing it.

    Raises:
        UserError: a file that cannot be read, a record that cannot be a line, or no line at all.
    """
    if output.suffix != ".jsonl":
        raise UserError("--output", output, "a file that ends in .jsonl")
    result = Converted()
    output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_sibling(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for place, record in _records(inputs, FIELDS[stage]):
            try:
                line = to_line(record, stage=stage, place=place)
            except UserError as error:
                if not leave_out:
                    raise
                reason = error.expected
                result.left_out[reason] += 1
                result.first.setdefault(reason, str(error))
                continue
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            result.written += 1
            if "verifier" in line:
                result.verifiers[line["verifier"]] += 1
        if not result.written:
            why = next(iter(result.first.values()), "no record")
            raise UserError("--input", f"no line for {stage} ({why})", f"records with {', '.join(FIELDS[stage])}")
    return result


def to_line(record: dict[str, Any], *, stage: str, place: str) -> dict[str, Any]:
    """The line of a stage from a record of published data.

    Raises:
        UserError: it cannot be one; names ``place``.
    """
    for name in FIELDS[stage]:
        if record.get(name) is None:
            raise UserError(place, f"no {name}", f"a record with {', '.join(FIELDS[stage])}")
    line = {"sft": _sft, "dpo": _dpo, "rlvr": _rlvr}[stage](record, place)
    checked = check_fields(place, line, stage)
    if stage == "rlvr":
        example = Example(place, checked)
        # The completion is wrong; what matters is that its answer can be read.
        VerifiedReward([example], None).score(0, "0")
    return checked


def _sft(record: dict[str, Any], place: str) -> dict[str, Any]:
    return {"messages": _talk(place, "messages", record["messages"])}


def _dpo(record: dict[str, Any], place: str) -> dict[str, Any]:
    chosen, rejected = (_talk(place, name, record[name]) for name in ("chosen", "rejected"))
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise UserError(place, "chosen and rejected of different prompts", "conversations with one prompt")
    roles = [talk[-1].get("role") for talk in (chosen, rejected)]
    if roles != ["assistant", "assistant"]:
        raise UserError(place, f"an answer of {show(roles[0])} or {show(roles[1])}", "one of the assistant")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _rlvr(record: dict[str, Any], place: str) -> dict[str, Any]:
    talk = _talk(place, "messages", record["messages"])
    names, answers = (_one(place, name, record[name]) for name in ("dataset", "ground_truth"))
    name = str(names).lower()
    if name not in _VERIFIERS:
        near = did_you_mean(name, list(_VERIFIERS))
        raise UserError(place, f"dataset {show(names)}", f"a verifier of remit's: {', '.join(_VERIFIERS)}{near}")
    if name == "ifeval" and isinstance(answers, str) and "func_name" not in answers:
        expected = "one with func_name: IFEvalG's instructions are not verified by remit"
        raise UserError(place, f"ground_truth {show(answers)}", expected)
    answer = json.dumps(answers) if isinstance(answers, dict) else answers
    prompt = talk if len(talk) == 1 else talk[:-1]
    return {"prompt": prompt, "answer": answer, "verifier": _VERIFIERS[name]}


def _one(place: str, name: str, value: Any) -> Any:
    """A value, or the only one of a list; of several, every one would have a verdict."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise UserError(place, f"{len(value)} values of {name}", "one: a line has one verifier")
    return value[0]


def _talk(place: str, name: str, value: Any) -> list[dict[str, Any]]:
    """Messages without the fields that are null, which a table has where some other row has a value."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UserError(place, f"{name} {show(value)}", "a list of messages")
    return [{key: inner for key, inner in message.items() if inner is not None} for message in value]


def _records(inputs: Sequence[str], fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in expand_inputs(inputs):
        if file.endswith(".parquet"):
            yield from _rows(file, fields)
        elif file.endswith(".arrow"):
            raise UserError("--input", file, "Parquet or JSON lines")
        else:
            for name, number, record in iter_records([file], fields=fields):
                yield f"{name}:{number}", record


def _rows(file: str, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
            for name in fields:
                if name not in table.schema_arrow.names:
                    found = f"columns {', '.join(table.schema_arrow.names)}"
                    raise UserError(file, found, f"columns {', '.join(fields)}")
            for batch in table.iter_batches(batch_size=1024, columns=list(fields), use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(file, f"a file that cannot be read ({str(error).splitlines()[0]})", "Parquet, whole") from None
